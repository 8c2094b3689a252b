"""Every error slicer raises on purpose, drawn as a tree.

    SlicerError
    ├── UsageError              the command line or an argument makes no sense (exit code 2)
    └── everything below        the input or the world is not as needed (exit code 1)
        ├── SourceError         the source is not a usable checkpoint
        │   └── HubError        the Hub could not give it
        ├── ArchitectureError   the architecture, or this cut of it, cannot be expressed
        ├── PlanError           a plan that does not fit the model
        ├── CalibrationError    no, unreadable or too little calibration data
        ├── HealError           a cut that cannot be healed this way, or not with this data
        │   ├── Diverged        a training whose loss was not finite before anything was gained
        │   └── OutOfMemory     a healing that does not fit here and now: no result of it
        ├── OutputError         the output cannot be written there
        ├── VerificationError   the written checkpoint is not what it should be
        ├── EvaluationError     a task, its data or a result of it is not there or not as needed
        ├── ServeError          vLLM is missing, cannot serve this, or went down
        └── BenchError          a benchmark that cannot be run, or resumed, as asked

A message is one line: what is wrong, where, and what to do.
"""

from __future__ import annotations


class SlicerError(Exception):
    """Base of all errors the command line reports as one line."""

    exit_code = 1


class UsageError(SlicerError):
    """An argument that no model could satisfy."""

    exit_code = 2


class SourceError(SlicerError):
    """The source is not a usable checkpoint."""


class HubError(SourceError):
    """The Hub, or its cache, could not give the source."""


class ArchitectureError(SlicerError):
    """The architecture is unknown, or this cut cannot be expressed in its config."""


class PlanError(SlicerError):
    """A plan or an amount that does not fit the model."""


class CalibrationError(SlicerError):
    """Calibration data is missing, unreadable or too short."""


class HealError(SlicerError):
    """The cut cannot be healed this way, or not with this data."""


class Diverged(HealError):
    """The loss of a training was not finite before anything was gained."""


class OutOfMemory(HealError):
    """Memory ran out while healing: a failure of the moment and the machine, which says nothing of the cut."""


class OutputError(SlicerError):
    """The output directory cannot be written."""


class VerificationError(SlicerError):
    """The written checkpoint failed its check."""


class EvaluationError(SlicerError):
    """A task is unknown, its data is missing or malformed, or results cannot be compared."""


class ServeError(SlicerError):
    """vLLM is not installed, cannot serve the checkpoint as asked, or ended with an error."""


class BenchError(SlicerError):
    """A benchmark cannot be run as asked, or its output directory belongs to another."""
