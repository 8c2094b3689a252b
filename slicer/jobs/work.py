"""The work directory beside a result: the finished stages of a conversion or fold, from which it resumes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slicer.checkpoint.export import output_name
from slicer.checkpoint.hub import Source
from slicer.data.calibration import TokenBatches
from slicer.errors import DiskFull, OutOfMemory, PlanError
from slicer.jobs.recipe import Recipe
from slicer.jobs.request import Output
from slicer.measure.analysis import Analysis
from slicer.measure.distances import measure
from slicer.model.walk import Walk
from slicer.progress import Progress
from slicer.runtime.files import within_disk, write_atomically
from slicer.runtime.memory import smaller, within_memory
from slicer.runtime.versions import versions
from slicer.runtime.workdir import beside, claimed

_MEASURED = "measured.json"


@contextmanager
def working(recipe: Recipe, source: Source, output: Output) -> Iterator[Path | None]:
    """A work directory, locked by this run; None if no text is read or nothing is written.

    It is removed when the block ends, but kept if the block is stopped, or runs out of memory or disk, after a
    measurement or a stage of a fold was finished. Another cut of the same source and text may resume from it, also on
    another device or with another batch size. Raises OutputError for a directory with other work.
    """
    if recipe.text is None or not recipe.writes:
        yield None
        return
    place = beside(output.out or Path(output_name(source.name, "cut")), "work")
    useless = False  # another attempt would fail too
    with claimed(
        place, what="unfinished work", overwrite=output.overwrite,
        resumable=lambda: not useless and ((place / _MEASURED).is_file() or any(place.glob("stages-*/*"))),
        checkpoint=source.checkpoint.identity, text=recipe.text.identity, dtype=recipe.compute.dtype,
        halves=recipe.halves, versions=versions(),
    ) as work:  # fmt: skip
        try:
            with within_disk(place):
                yield work.path
        except Exception as error:
            useless = not isinstance(error, (OutOfMemory, DiskFull))
            raise


def measured(walk: Walk | None, text: TokenBatches | None, recipe: Recipe, progress: Progress) -> Analysis | None:
    """The distances to choose the cut by, measured now or by a stopped run; None if nothing is measured.

    Raises CalibrationError and ArchitectureError as `measure`.
    """
    if not recipe.measures or walk is None or text is None:
        return None
    file = None if walk.directory is None else walk.directory / _MEASURED
    if file is not None and file.is_file():
        with suppress(PlanError):  # damaged: measure again
            kept = Analysis.load(file)
            progress.note(f"resuming from {walk.directory}")
            return kept
    with within_memory("measuring", smaller(len(text.batches[0]))):
        analysis = measure(walk, text, recipe.halves, progress)
    if file is not None:
        write_atomically(file, analysis.to_json())
    return analysis
