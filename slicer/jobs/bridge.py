"""To be replaced by the same names of model/walk, data/calibration and measure/distances."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.checkpoint.reader import Checkpoint
from slicer.data.calibration import TokenBatches, token_batches
from slicer.data.sources import TextSpec
from slicer.measure.analysis import Analysis
from slicer.model.walk import Walk
from slicer.plan.records import TextRecord
from slicer.progress import Progress
from slicer.runtime.compute import Compute


@dataclass(frozen=True)
class Text(TokenBatches):
    @property
    def record(self) -> TextRecord:
        return TextRecord.of(self.provenance)


@contextlib.contextmanager
def open_walk(
    checkpoint: Checkpoint,
    compute: Compute,
    *,
    loads: bool,
    wanted: bool = True,
    directory: Path | None = None,
) -> Iterator[Walk | None]:
    from slicer.model.load import load_model
    from slicer.runtime import memory

    if not wanted:
        yield None
        return
    given: dict[str, Any] = {
        "dtype": compute.dtype or "auto",
        "device": compute.device,
        "trust_remote_code": compute.trust_remote_code,
    }
    room = memory.budget(compute.memory)
    if loads:
        model = load_model(checkpoint.path, **given)
        rest = max(0, room - checkpoint.bytes_as(compute.dtype))
        walk = Walk.in_memory(model, memory_bytes=rest, directory=directory)
        del model
    else:
        walk = Walk.out_of_core(checkpoint, memory_bytes=room, directory=directory, **given)
    walk.trusted = compute.trust_remote_code  # type: ignore[attr-defined]
    try:
        yield walk
    finally:
        walk.model = None
        walk.layers = None  # type: ignore[assignment]
        walk._lazy = None
        del walk
        gc.collect()


def read_text(spec: TextSpec | None, path: Path, walk: Walk | None, progress: Progress) -> Text | None:
    if spec is None:
        return None
    assert walk is not None
    progress.stage("Calibration data")
    data = token_batches(
        spec,
        path,
        walk.model,
        streamed=walk.streamed,
        trust_remote_code=walk.trusted,  # type: ignore[attr-defined]
    )
    return Text(data.batches, data.provenance)


def measure(
    walk: Walk | None, text: TokenBatches | None, halves: bool | None, progress: Progress
) -> Analysis:
    from slicer.measure.distances import measure_text

    assert walk is not None and text is not None
    return measure_text(walk, text, halves, progress)
