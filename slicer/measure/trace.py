"""What a walk leaves behind for the metrics: the residual stream of some tokens at every layer, in a file a layer.

The files also make the walk resumable: after each layer the states of all tokens are saved beside them, and a walk
begun again over the same directory goes on after the last layer that was finished.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.model import mlp_of
from slicer.measure.metrics import check_finite
from slicer.measure.states import States
from slicer.measure.stream import Walk
from slicer.progress import Progress
from slicer.runtime.files import atomic_file

STATES = "states.safetensors"


@dataclass(frozen=True)
class Trace:
    """A finished recording.

    Attributes:
        directory: holds layer-000.safetensors (x(0)) to that of x(L).
        depth: L.
        samples: sequences S.
        positions: which tokens of each sequence, ascending; the last one is the sequence's last.
        point_positions: which of these CKA and the fold residual take, as indices into `positions`.
        has_mlp: whether every layer has a feed-forward part, whose output at the points was kept.
    """

    directory: Path
    depth: int
    samples: int
    positions: tuple[int, ...]
    point_positions: tuple[int, ...]
    has_mlp: bool

    def sequences(self, first: int, last: int) -> torch.Tensor:
        """x(0)..x(L) of the sequences first <= s < last at the positions: [L+1, last-first, P, d]."""
        return torch.stack([self._read(i, "states", first, last) for i in range(self.depth + 1)])

    def points(self, layer: int, sequences: int) -> torch.Tensor:
        """x(layer) at the points of the first `sequences`: [N, d], sequence by sequence."""
        at = torch.tensor(self.point_positions)
        return self._read(layer, "states", 0, sequences)[:, at].flatten(0, 1)

    def mlp(self, layer: int, sequences: int) -> torch.Tensor:
        """What the feed-forward part of `layer` put out at the points: [N, d]."""
        return self._read(layer + 1, "mlp", 0, sequences).flatten(0, 1)

    def _read(self, layer: int, name: str, first: int, last: int) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(_file(self.directory, layer), "pt") as stored:
            tensor: torch.Tensor = stored.get_slice(name)[first:last]
        return tensor


def spread(length: int, count: int) -> tuple[int, ...]:
    """`count` positions of `length`, evenly apart, the last one among them; all of them where there are fewer."""
    count = min(count, length)
    return tuple((j + 1) * length // count - 1 for j in range(count))


def record(
    walk: Walk,
    batches: Sequence[torch.Tensor],
    directory: Path,
    *,
    positions: int = 16,
    points: int = 0,
    samples: int | None = None,
    resumable: bool = False,
    progress: Progress | None = None,
) -> Trace:
    """Run all `batches` (int64 [batch, seq], one length) through all layers, keeping x(l) at `positions` tokens of each
    sequence.

    `points` of these tokens, an equal number of each of `samples` sequences (default: those of `batches`), also keep
    the output of the feed-forward part (0: none). With `resumable` the states are saved after every layer, and a
    recording that was cut short goes on where it was; the caller vouches that model and batches are the same. Raises
    CalibrationError for states that are not finite.
    """
    progress = progress or Progress()
    own = sum(len(batch) for batch in batches)
    at = spread(batches[0].shape[1], positions)
    each = max(1, points // (samples or own)) if points else 0
    inner = spread(len(at), each) if each else ()
    has_mlp = bool(inner) and all(mlp_of(layer) is not None for layer in walk.layers)
    trace = Trace(directory, walk.depth, own, at, inner, has_mlp)
    states = walk.start(batches)
    if resumable and not _resume(trace, states):
        states = walk.start(batches)
    if states.layer == 0:
        kept = torch.cat([state[:, list(at)] for state in states])
        _write(trace, 0, {"states": kept})
    progress.stage("Measuring layers", walk.depth, "layers")
    if states.layer:
        progress.note(f"going on after layer {states.layer - 1}, where an earlier run ended")
        progress.advance(states.layer)
    for i in range(states.layer, walk.depth):
        before, started = walk.bytes_read, time.perf_counter()
        _advance(trace, walk, i, states)
        if resumable:
            states.save(directory / STATES)
        seconds = time.perf_counter() - started
        read = walk.layer_bytes(i) if walk.bytes_read > before or walk.prefetch else 0
        disk = f"{read / seconds / 1e6:,.0f} MB/s, " if read else ""
        progress.detail(f"{disk}{states.token_count / seconds:,.0f} tokens/s a layer")
        progress.advance()
    return trace


def _advance(trace: Trace, walk: Walk, i: int, states: States) -> None:
    """x(i) -> x(i+1) with what is kept of it written."""
    at = list(trace.positions)
    inner = [trace.positions[p] for p in trace.point_positions]
    kept: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def keep(_batch: int, new: torch.Tensor) -> None:
        kept.append(new[:, at].cpu())

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        tokens = states.tokens[len(outputs)]
        outputs.append(output.reshape(*tokens.shape, -1)[:, inner].cpu())

    with ExitStack() as stack:
        layer = stack.enter_context(walk.layer(i))
        part = mlp_of(layer) if trace.has_mlp else None
        if part is not None:
            handle = part.register_forward_hook(hook)
            stack.callback(handle.remove)
        walk.advance(i, states, keep)
    tensors = {"states": torch.cat(kept)}
    check_finite(tensors["states"][None], first=i + 1)
    if trace.has_mlp:
        tensors["mlp"] = torch.cat(outputs)
    _write(trace, i + 1, tensors)


def _file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer:03d}.safetensors"


def _write(trace: Trace, layer: int, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    with atomic_file(_file(trace.directory, layer)) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part)


def _resume(trace: Trace, states: States) -> bool:
    """Take up the states of the last finished layer; False when they, or what was kept before them, are not whole."""
    saved = trace.directory / STATES
    if not saved.is_file():
        return True
    with suppress(OSError, ValueError):
        states.restore(saved)
        return all(_file(trace.directory, i).is_file() for i in range(states.layer + 1))
    return False
