"""All exceptions of slicer.

    SlicerError
    ├── UsageError              invalid command line or argument (exit code 2)
    └── everything below        unusable input or environment (exit code 1)
        ├── SourceError         the source is not a usable checkpoint
        │   └── HubError        the Hub cannot provide it
        ├── ArchitectureError   the architecture is unknown, or its config cannot express the cut
        ├── PlanError           the plan does not fit the model
        ├── CalibrationError    calibration text is missing, unreadable or too short
        ├── HealError           the cut cannot be healed with this method or text
        │   ├── Diverged        the training loss became non-finite before it improved
        │   └── OutOfMemory     healing ran out of memory, or too little is free to begin
        ├── OutputError         the output cannot be written
        │   └── DiskFull        the disk is full, or will be
        ├── VerificationError   the written checkpoint is wrong
        ├── EvaluationError     a task, its data or a result is missing or invalid
        ├── ServeError          vLLM is missing, cannot serve the checkpoint, or stopped
        └── BenchError          a benchmark cannot be run or resumed as requested

Each message is one line: what is wrong, where, and what to do.
"""

from __future__ import annotations


class SlicerError(Exception):
    """Base class; the command line reports these as one line."""

    exit_code = 1


class UsageError(SlicerError):
    """An argument that is invalid for every model."""

    exit_code = 2


class SourceError(SlicerError):
    """The source is not a usable checkpoint."""


class HubError(SourceError):
    """The Hub or its cache cannot provide the source."""


class ArchitectureError(SlicerError):
    """The architecture is unknown, or its config cannot express the cut."""


class PlanError(SlicerError):
    """A plan or an amount does not fit the model."""


class CalibrationError(SlicerError):
    """Calibration text is missing, unreadable or too short."""


class HealError(SlicerError):
    """The cut cannot be healed with this method or text."""


class Diverged(HealError):
    """The training loss became non-finite before it improved."""


class OutOfMemory(HealError):
    """Memory ran out while healing, or too little is free to begin. Not a property of the cut: it may work on another
    machine or at another time."""


class OutputError(SlicerError):
    """The output directory cannot be written."""


class DiskFull(OutputError):
    """The disk is full, or has too little space for what will be written."""


class VerificationError(SlicerError):
    """The written checkpoint failed its check."""


class EvaluationError(SlicerError):
    """A task is unknown, its data is missing or malformed, or results cannot be compared."""


class ServeError(SlicerError):
    """vLLM is not installed, cannot serve the checkpoint as requested, or stopped with an error."""


class BenchError(SlicerError):
    """A benchmark cannot be run as requested, or its output directory belongs to another."""


def reason_of(error: BaseException) -> str:
    """The message of a library's error on one line, cut at 300 characters; its class if it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Why a text file cannot be read."""
    return getattr(error, "strerror", None) or "not UTF-8 text"
