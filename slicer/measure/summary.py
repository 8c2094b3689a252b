"""Tables of distances from recorded states, averaged over samples, with standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint.model import watch
from slicer.measure import metrics
from slicer.measure.analysis import Distances
from slicer.measure.metrics import angles, check_finite, standard_error
from slicer.measure.stream import Walk
from slicer.measure.trace import Trace, record
from slicer.plan.plan import METRIC
from slicer.runtime.distributed import Processes


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
    trace: Trace,
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
