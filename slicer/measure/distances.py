"""Distances between layers, and between sublayers: the residual stream is also tapped after every attention.

A model of L layers has 2L sublayers: 2l is the attention of layer l, 2l + 1 its feed-forward sublayer. A block of even
size that starts at an odd one is a half-offset cut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slicer.data.calibration import TokenBatches
from slicer.errors import ArchitectureError
from slicer.measure.analysis import Analysis, Distances
from slicer.measure.metrics import METRICS, angles, check_finite, cka, fold_residual, per_sequence, standard_error
from slicer.measure.recorder import Portion, Recording, record
from slicer.model.layers import watch
from slicer.model.load import Model
from slicer.model.states import Batches
from slicer.model.sublayers import MidLayerTap
from slicer.model.walk import Walk
from slicer.plan.plan import METRIC
from slicer.progress import SILENT, Progress

_AT_ONCE = 4  # sequences whose states are in memory at a time
Rows = Mapping[int, torch.Tensor]  # size n of a block -> values by the block's start


def measure(walk: Walk, text: TokenBatches, halves: bool | None, progress: Progress) -> Analysis:
    """The angular distances of last tokens over `text`, in one pass: an analysis with one metric.

    `halves`: between sublayers too; None: where the layers can be run within. Raises CalibrationError for states that
    are not finite, ArchitectureError if `halves` are asked for and a layer lacks a sublayer, or cannot be run alone.
    """
    batches, sublayers = text.batches, {}
    if halves is not False:
        try:
            layers, sublayers[METRIC] = measure_halves(walk, batches, progress=progress)
        except ArchitectureError:
            if halves:
                raise
    if not sublayers and walk.loaded:
        layers = measure_loaded(walk.model, batches, progress)
    elif not sublayers:
        with tempfile.TemporaryDirectory(prefix="slicer-") as scratch:
            kept = walk.directory is not None
            place = walk.directory or Path(scratch)
            recording = record(walk, Portion.of(batches), place, positions=1, resumable=kept, progress=progress)
            last = recording.sequences(0, recording.samples)[:, :, -1]
        layers = table(METRIC, angles(last.float()), seq_len=batches[0].shape[1])
    return Analysis(
        layers.depth, layers.samples, layers.seq_len, {METRIC: layers}, sublayers=sublayers, calibration=text.record
    )


@torch.inference_mode()
def measure_loaded(model: Model, batches: Batches, progress: Progress = SILENT) -> Distances:
    """The angular distances of last tokens between the layers of a loaded model, also where these cannot be run one by
    one; `batches`: int64 [batch, seq] each, no padding.

    Keeps only the last token's states, [L+1, batch, d], and skips the logits.
    """
    progress.stage("Measuring layers", len(batches), "batches")
    found, last = list[torch.Tensor](), list[torch.Tensor]()
    device = model.get_input_embeddings().weight.device

    with watch(model, lambda _, states: last.append(states[:, -1].detach().to(device, torch.float32))):
        for batch in batches:
            last.clear()
            model.base_model(input_ids=batch.to(device), use_cache=False)
            stacked = torch.stack(last)
            check_finite(stacked)
            found.append(angles(stacked).cpu())
            progress.advance()
    return table(METRIC, torch.cat(found), seq_len=batches[0].shape[1])


def measure_halves(walk: Walk, batches: Batches, *, progress: Progress = SILENT) -> tuple[Distances, Distances]:
    """The angular distances of last tokens between layers, and between sublayers (a table of depth 2L), in one pass
    over `batches` (int64 [batch, seq] each, no padding).

    Raises CalibrationError for states that are not finite, ArchitectureError for a layer without attention or
    feed-forward sublayer, or if the layers cannot be run one by one.
    """
    stacked = record_halves(walk, batches, progress=progress)
    values = torch.cat([angles(some.float()).cpu() for some in torch.split(stacked, _AT_ONCE, 1)])
    length = batches[0].shape[1]
    return table(METRIC, values[:, ::2, ::2], seq_len=length), table(METRIC, values, seq_len=length)


def tables_of_halves(stacked: torch.Tensor, seq_len: int) -> dict[str, Distances]:
    """Every metric that averages over tokens, at each sequence's last token, between sublayers; `stacked`:
    [2L+1, samples, d] from `record_halves`."""
    parts = [per_sequence(one[:, :, None]) for one in torch.split(stacked, 1, 1)]
    names = [name for name in parts[0] if METRICS[name].single]
    return {name: table(name, torch.cat([part[name] for part in parts]), seq_len=seq_len) for name in names}


def record_halves(walk: Walk, batches: Batches, *, progress: Progress = SILENT) -> torch.Tensor:
    """The last token's residual stream before, inside and after every layer: [2L+1, samples, d].

    Raises as `measure_halves`.
    """
    states, midway = walk.start(batches), MidLayerTap(walk)
    points = [[_last(state) for state in states], *([] for _ in range(2 * walk.depth))]
    progress.stage("Measuring layers", walk.depth, "layers")
    for i in range(walk.depth):
        with walk.layer(i):
            for b in range(len(states)):
                between, after = midway.states(i, b, states[b])
                points[2 * i + 1].append(_last(between))
                points[2 * i + 2].append(_last(after))
                states[b] = after
        states.layer = i + 1
        progress.advance()
    stacked = torch.stack([torch.cat(each) for each in points])
    check_finite(stacked[::2])
    check_finite(stacked)
    return stacked


def _last(states: torch.Tensor) -> torch.Tensor:
    return states[:, -1].detach().cpu().clone()


def distance_tables(recording: Recording, portion: Portion, progress: Progress) -> dict[str, Distances]:
    """Every metric of one pass, from what each process recorded of its portion."""
    progress.stage("Comparing layers", recording.samples, "sequences")
    parts: list[dict[str, torch.Tensor]] = []
    for at in range(0, recording.samples, _AT_ONCE):
        until = min(at + _AT_ONCE, recording.samples)
        parts.append(per_sequence(recording.sequences(at, until)))
        progress.advance(until - at)
    joined = portion.join(*(torch.cat([part[name] for part in parts]) for name in parts[0]))
    of_all = partial(table, seq_len=portion.seq_len, samples=portion.samples)
    tables = {name: of_all(name, values) for name, values in zip(parts[0], joined, strict=True)}
    return {**tables, **_point_tables(recording, portion)}


def _point_tables(recording: Recording, portion: Portion) -> dict[str, Distances]:
    """CKA and the fold residual, which compare tokens of many sequences together."""
    depth, sequences = recording.depth, recording.point_sequences
    points: Sequence[torch.Tensor] = _Computed(depth + 1, lambda i: recording.points(i, sequences))
    mlp: Sequence[torch.Tensor] = _Computed(depth, lambda i: recording.mlp(i, sequences))
    if portion.processes.world > 1 and sequences:
        points = _gathered(recording.points, depth + 1, recording, portion)
        mlp = _gathered(recording.mlp, depth, recording, portion) if recording.has_mlp else ()
    if recording.point_count <= 1:
        return {}
    value, pseudo = cka(points, sequences)
    tables = {"cka": table("cka", pseudo, seq_len=portion.seq_len, samples=portion.samples, mean=value)}
    if recording.has_mlp:
        residual = fold_residual(points, mlp, sequences)
        tables["fold_residual"] = table("fold_residual", residual, seq_len=portion.seq_len, samples=portion.samples)
    return tables


def _gathered(
    read: Callable[[int, int], torch.Tensor], layers: int, recording: Recording, portion: Portion
) -> list[torch.Tensor]:
    """`read(i, sequences)` [N, d] for every layer i, of the first sequences of all processes together."""
    own = recording.samples
    mine = torch.stack(
        [read(i, own).view(own, recording.point_count // recording.point_sequences, -1) for i in range(layers)], 1
    )
    (whole,) = portion.join(mine)  # [samples, layers, points of a sequence, d]
    return list(whole[: recording.point_sequences].transpose(0, 1).flatten(1, 2))


class _Computed(Sequence[Any]):
    """`make(i)` for i < length, computed on access."""

    def __init__(self, length: int, make: Callable[[int], Any]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._make(index)


def table(
    metric: str, values: torch.Tensor, *, seq_len: int, samples: int | None = None, mean: torch.Tensor | None = None
) -> Distances:
    """The table of a metric from its values per sample, [samples, L+1, L+1]; `mean` if it is not their mean."""
    depth, samples = values.shape[-1] - 1, len(values) if samples is None else samples
    rows = {n: values.diagonal(n, -2, -1) for n in range(1, depth + 1)}
    means = None if mean is None else {n: mean.diagonal(n) for n in rows}
    return table_of_rows(metric, rows, depth, seq_len=seq_len, samples=samples, means=means)


def table_of_rows(
    metric: str, rows: Rows, depth: int, *, seq_len: int, samples: int, means: Rows | None = None
) -> Distances:
    """The table of a metric from n -> [samples, L-n+1]; `means` if they are not the rows' means."""
    middle, errors, differences = {}, {}, {}
    for n, values in rows.items():
        middle[n] = (values.mean(0) if means is None else means[n]).tolist()
        errors[n] = standard_error(values).tolist()
        best = middle[n].index(min(middle[n]))
        differences[n] = standard_error(values - values[:, best : best + 1]).tolist()
    return Distances(depth, samples, seq_len, middle, errors, metric, differences)


def table_of_sums(
    metric: str, scores: torch.Tensor, *, seq_len: int, samples: int, most: int | None = None
) -> Distances:
    """The table of a metric whose value for a block is the sum over its layers or sublayers, from `scores`
    [samples, players]; of blocks of at most `most` (None: all)."""
    players = scores.shape[1]
    rows = {n: scores.unfold(1, n, 1).sum(-1) for n in range(1, (most or players) + 1)}
    return table_of_rows(metric, rows, players, seq_len=seq_len, samples=samples)
