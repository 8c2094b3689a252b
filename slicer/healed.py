"""Rank after healing: the closest blocks, each healed in closed form and compared on held-out loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError
from slicer.heal.compensate.fold import fold
from slicer.heal.patch import holds, written_dtype
from slicer.measure.analysis import Distances
from slicer.measure.stream import Walk
from slicer.plan.blocks import rank
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime.workdir import Notebook

CANDIDATES = 4


def rank_after_healing(
    checkpoint: Checkpoint,
    walk: Walk,
    batches: Sequence[torch.Tensor],
    distances: Distances,
    sizes: Sequence[int],
    *,
    candidates: int = CANDIDATES,
    notebook: Path | None = None,
    progress: Progress | None = None,
) -> Distances:
    """For each n of `sizes`: the `candidates` closest blocks by `distances`, healed by least squares.

    The table "healed_loss" has the increase over the whole model's loss, nats a token on the sequences that the solver
    held out; NaN for blocks that were not tried, or that cannot be healed. It has no standard errors. Finished
    candidates are kept in `notebook`.
    """
    book = Notebook(notebook)

    def increase(dropped: Sequence[int]) -> float | None:
        try:
            loss = fold(
                walk,
                batches,
                Plan.dropping(walk.depth, dropped),
                holds=holds(checkpoint),
                written=written_dtype(checkpoint, None),
                progress=progress,
            ).losses
        except HealError:
            return None
        assert loss.after is not None and loss.source is not None
        return loss.after - loss.source

    rows: dict[int, list[float]] = {}
    for n in sizes:
        rows[n] = [math.nan] * (distances.depth - n + 1)
        for block in rank(distances, n)[:candidates]:
            value = book.take(f"{block.start}+{n}", partial(increase, block.dropped))
            rows[n][block.start] = math.nan if value is None else value
    rows = {n: row for n, row in rows.items() if not all(map(math.isnan, row))}
    if not rows:
        raise HealError("none of the closest blocks can be healed; leave --healed out")
    unknown = {n: [math.nan] * len(row) for n, row in rows.items()}
    return Distances(
        distances.depth, distances.samples, distances.seq_len, rows, unknown, "healed_loss", dict(unknown)
    )
