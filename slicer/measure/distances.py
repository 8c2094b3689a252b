"""Distances between sublayers: the residual stream is also tapped after every attention, all in one pass.

The model is seen as 2L sublayers: 2l is the attention of layer l, 2l+1 its feed-forward part. A block of even size that
starts at an odd one is a half-offset cut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slicer.data.calibration import TokenBatches
from slicer.errors import ArchitectureError
from slicer.measure import metrics
from slicer.measure.analysis import Analysis, Distances
from slicer.measure.metrics import angles, check_finite, per_sequence, standard_error
from slicer.measure.recorder import Recording, record
from slicer.model.layers import watch
from slicer.model.sublayers import MidLayerTap
from slicer.model.walk import Walk
from slicer.plan.plan import METRIC
from slicer.progress import Progress
from slicer.runtime.distributed import Processes

Listener = Callable[[int, torch.Tensor], None]


def measure_text(walk: Walk, text: TokenBatches, halves: bool | None, progress: Progress) -> Analysis:
    """The angular distances of last tokens over `text`, in one pass.

    `halves`: between half-layers too; None: where the layers can be run within. Raises as `measure_halves`.
    """
    batches, sublayers = text.batches, {}
    if halves is not False:
        try:
            layers, sublayers[METRIC] = measure_halves(walk, batches, progress=progress)
        except ArchitectureError:
            if halves:
                raise
    if not sublayers and walk.streamed:
        with tempfile.TemporaryDirectory(prefix="slicer-") as work:
            layers = measure_walk(walk, batches, Path(work), progress=progress)
    elif not sublayers:
        progress.stage("Measuring layers", len(batches), "batches")
        layers = measure(walk.model, batches, progress=lambda done, total: progress.advance())
    return Analysis(
        layers.depth,
        layers.samples,
        layers.seq_len,
        {METRIC: layers},
        sublayers=sublayers,
        calibration=text.record.to_dict(),
    )


def measure_halves(
    walk: Walk, batches: Sequence[torch.Tensor], *, progress: Progress | None = None
) -> tuple[Distances, Distances]:
    """Measure the angular distances of last tokens between layers (as in `summary.measure`) and between sublayers (a
    table of depth 2L), in one pass over `batches` (int64 [batch, seq] each, no padding).

    Raises CalibrationError for states that are not finite, ArchitectureError for a layer without attention or
    feed-forward part, or if the layers cannot be run one by one.
    """
    stacked = record_halves(walk, batches, progress=progress)
    values = torch.cat([angles(some.float()).cpu() for some in torch.split(stacked, 4, 1)])
    length = batches[0].shape[1]
    return table(METRIC, values[:, ::2, ::2], seq_len=length), table(METRIC, values, seq_len=length)


def tables_of_halves(stacked: torch.Tensor, seq_len: int) -> dict[str, Distances]:
    """Every metric that averages over tokens, at each sequence's last token, between sublayers; `stacked`:
    [2L+1, samples, d] from `record_halves`."""
    found: dict[str, list[torch.Tensor]] = {}
    for one in torch.split(stacked, 1, 1):
        for name, value in per_sequence(one[:, :, None]).items():
            if name == "angular_mean":
                continue  # with one token the same as angular_last_token
            found.setdefault(name, []).append(value)
    return {name: table(name, torch.cat(values), seq_len=seq_len) for name, values in found.items()}


def record_halves(
    walk: Walk, batches: Sequence[torch.Tensor], *, progress: Progress | None = None
) -> torch.Tensor:
    """The last token's residual stream before, inside and after every layer: [2L+1, samples, d].

    Raises as `measure_halves`.
    """
    progress = progress or Progress()
    states = walk.start(batches)
    midway = MidLayerTap(walk)
    points: list[list[torch.Tensor]] = [[] for _ in range(2 * walk.depth + 1)]
    for state in states:
        points[0].append(_last(state))
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


def measure(
    model: Any, batches: Iterable[torch.Tensor], *, progress: Callable[[int, int], None] | None = None
) -> Distances:
    """Measure every d(l, l+n) of a loaded model in one pass over `batches` (int64 [batch, seq] each, no padding).

    Keeps only the last token's states, [L+1, batch, d], and skips the logits if the class allows it. Calls
    `progress(done, total)` after each batch. Raises CalibrationError for states that are not finite.
    """
    batches = list(batches)
    found: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    device = model.get_input_embeddings().weight.device

    def listener(index: int, states: torch.Tensor) -> None:
        last.append(states[:, -1].detach().to(device, torch.float32))

    decoder = model.base_model  # without the head: logits are not needed
    with torch.inference_mode(), watch(model, listener):
        for done, batch in enumerate(batches, 1):
            last.clear()
            decoder(input_ids=batch.to(device), use_cache=False)
            stacked = torch.stack(last)
            check_finite(stacked)
            found.append(angles(stacked).cpu())
            if progress is not None:
                progress(done, len(batches))
    values = torch.cat(found)
    return table(METRIC, values, seq_len=batches[0].shape[1])


def measure_walk(
    walk: Walk, batches: Sequence[torch.Tensor], directory: Path, *, progress: Any = None
) -> Distances:
    """The same distances as `measure`, for a model run layer by layer; temporary files go to `directory`."""
    trace = record(walk, batches, directory, positions=1, progress=progress)
    last = trace.sequences(0, trace.samples)[:, :, -1]
    return table(METRIC, angles(last.float()), seq_len=batches[0].shape[1])


def summarise(
    trace: Recording,
    processes: Processes,
    first: int,
    samples: int,
    points: int,
    seq_len: int,
    progress: Any = None,
) -> dict[str, Distances]:
    """Every one-pass metric of a trace; `first`: number of its first sample among all `samples`.

    `points`: maximum number of tokens for CKA and the fold residual.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in metrics.PER_SEQUENCE}
    for at in range(0, trace.samples, _AT_ONCE):
        until = min(at + _AT_ONCE, trace.samples)
        for name, value in metrics.per_sequence(trace.sequences(at, until)).items():
            found[name].append(value)
        if progress is not None:
            progress.advance(until - at)
    parts = [torch.cat(values) for values in found.values()]
    each = len(trace.point_positions)
    sequences = min(samples, max(1, points // each)) if each else 0
    taken: Sequence[torch.Tensor] = _Lazy(trace.depth + 1, lambda i: trace.points(i, sequences))
    mlp: Sequence[torch.Tensor] = _Lazy(trace.depth, lambda i: trace.mlp(i, sequences))
    if processes.world > 1 and each:
        own = trace.samples
        parts.append(
            torch.stack([_by_sequence(trace.points(i, own), own) for i in range(trace.depth + 1)], 1)
        )
        if trace.has_mlp:
            parts.append(torch.stack([_by_sequence(trace.mlp(i, own), own) for i in range(trace.depth)], 1))
    joined = processes.join(parts, first, samples)
    if processes.world > 1 and each:
        gathered = joined[len(found) :]
        taken = list(gathered[0][:sequences].transpose(0, 1).flatten(1, 2))
        if trace.has_mlp:
            mlp = list(gathered[1][:sequences].transpose(0, 1).flatten(1, 2))
    tables = {
        name: table(name, values, seq_len=seq_len, samples=samples)
        for name, values in zip(found, joined, strict=False)
    }
    if each and sequences * each > 1:
        value, pseudo = metrics.cka(taken, sequences)
        tables["cka"] = table("cka", pseudo, seq_len=seq_len, samples=samples, mean=value)
        if trace.has_mlp:
            residual = metrics.fold_residual(taken, mlp, sequences)
            tables["fold_residual"] = table("fold_residual", residual, seq_len=seq_len, samples=samples)
    return tables


_AT_ONCE = 4  # sequences whose states are in memory at a time


def _by_sequence(points: torch.Tensor, sequences: int) -> torch.Tensor:
    """[N, d] -> [sequences, N / sequences, d]."""
    return points.view(sequences, -1, points.shape[-1])


class _Lazy(Sequence[Any]):
    """`make(i)` for i < length, computed on access."""

    def __init__(self, length: int, make: Callable[[int], Any]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._make(index)


def table(
    metric: str,
    values: torch.Tensor,
    *,
    seq_len: int,
    samples: int | None = None,
    mean: torch.Tensor | None = None,
) -> Distances:
    """The table of a metric from its values per sample, [samples, L+1, L+1]; `mean` if it is not their mean."""
    depth = values.shape[-1] - 1
    return table_of_rows(
        metric,
        {n: values.diagonal(n, -2, -1) for n in range(1, depth + 1)},
        depth,
        seq_len=seq_len,
        samples=len(values) if samples is None else samples,
        means=None if mean is None else {n: mean.diagonal(n) for n in range(1, depth + 1)},
    )


def table_of_rows(
    metric: str,
    rows: Mapping[int, torch.Tensor],
    depth: int,
    *,
    seq_len: int,
    samples: int,
    means: Mapping[int, torch.Tensor] | None = None,
) -> Distances:
    """The table of a metric from n -> [samples, L-n+1]; `means` if they are not the rows' means."""
    middle, errors, differences = {}, {}, {}
    for n, values in rows.items():
        middle[n] = (values.mean(0) if means is None else means[n]).tolist()
        errors[n] = standard_error(values).tolist()
        best = middle[n].index(min(middle[n]))
        differences[n] = standard_error(values - values[:, best : best + 1]).tolist()
    return Distances(depth, samples, seq_len, middle, errors, metric, differences)
