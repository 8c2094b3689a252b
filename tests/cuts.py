"""Cuts on disk, as the writer of every command writes them, without a command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from slicer.checkpoint.export import sliced
from slicer.checkpoint.hub import Source
from slicer.checkpoint.reader import Checkpoint
from slicer.heal.patch import NONE, Patch
from slicer.jobs.output import Result, write_verified
from slicer.jobs.request import Output
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime.compute import Compute


def cutting(
    depth: int, layers: Iterable[int] = (), attention: Iterable[int] = (), ffn: Iterable[int] = (), form: str = "native"
) -> Plan:
    """The plan that drops `layers`, the attention of some and the feed-forward part of some (source indices)."""
    base = Plan.dropping(depth, gone) if (gone := set(layers)) else Plan.whole(depth)
    return replace(base.without(attention, ffn), form=form)


def export(checkpoint: Checkpoint, plan: Plan, out: Path, patch: Patch = NONE, *, dtype: str | None = None) -> Path:
    """Write the cut of `plan` from `checkpoint`, repaired by `patch`, to `out`; changed tensors alone are checked."""
    source = Source(str(checkpoint.path), checkpoint.path, checkpoint=checkpoint)
    result = Result.of_cut(source, replace(plan, dtype=dtype), patch)
    write_verified(result, None, Output(out, verify="none"), Compute("cpu"), Progress())
    return out


def changed(source: Checkpoint, plan: Plan, patch: Patch) -> dict[str, torch.Tensor]:
    """Key of the result -> the tensor that `patch` puts there."""
    contents = sliced(source, plan, {}, patch.replaced, patch.added)
    return {key: make() for key, make in contents.changed.items()}
