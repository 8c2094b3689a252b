"""Which sequences this process measures, and a recording of their residual stream: one file per layer, for the metrics.

A recording can be resumable: the states of all tokens are saved after each layer, and a run in the same directory
continues after the last finished layer.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from slicer.measure.metrics import check_finite
from slicer.model.layers import hidden_of
from slicer.model.states import Batches, States
from slicer.model.sublayers import mlp_of
from slicer.model.walk import Walk
from slicer.progress import SILENT, Progress
from slicer.runtime.distributed import Processes
from slicer.runtime.files import atomic_file

STATES = "states.safetensors"


@dataclass(frozen=True)
class Portion:
    """The sequences that this process measures, of those that all processes of a launch measure together.

    Attributes:
        batches: int64 [batch, seq] each, all of one length.
        first: number of its first sequence.
        samples: sequences of all processes.
    """

    batches: Batches
    first: int
    samples: int
    processes: Processes = Processes()

    @classmethod
    def of(cls, batches: Batches, processes: Processes = Processes()) -> Portion:  # noqa: B008
        """This process's portion of all `batches`. Raises UsageError if some process gets none."""
        own, first = processes.of(batches)
        return cls(own, first, sum(map(len, batches)), processes)

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return int(self.batches[0].shape[1])

    def join(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        """Tensors [own sequences, ...] of every process as tensors [samples, ...], in each of them."""
        return self.processes.join(parts, self.first, self.samples)


@dataclass(frozen=True)
class Recording:
    """A finished recording.

    Attributes:
        directory: holds layer-000.safetensors (x(0)) to that of x(L).
        depth: L; samples: sequences S.
        positions: recorded tokens of each sequence, ascending; the last one is the sequence's last token.
        point_positions: those used by CKA and the fold residual, as indices into `positions`.
        point_sequences: sequences, of all processes together, whose points these two use.
        has_mlp: whether every layer has a feed-forward sublayer; its output at the points is recorded then.
    """

    directory: Path
    depth: int
    samples: int
    positions: tuple[int, ...]
    point_positions: tuple[int, ...]
    point_sequences: int
    has_mlp: bool

    def sequences(self, first: int, last: int) -> torch.Tensor:
        """x(0)..x(L) of the sequences first <= s < last at the positions: [L+1, last-first, P, d]."""
        return torch.stack([self._read(i, "states", first, last) for i in range(self.depth + 1)])

    @property
    def point_count(self) -> int:
        """Tokens that CKA and the fold residual use."""
        return len(self.point_positions) * self.point_sequences

    def points(self, layer: int, sequences: int) -> torch.Tensor:
        """x(layer) at the points of the first `sequences`: [N, d], sequence by sequence."""
        at = torch.tensor(self.point_positions)
        return self._read(layer, "states", 0, sequences)[:, at].flatten(0, 1)

    def mlp(self, layer: int, sequences: int) -> torch.Tensor:
        """Feed-forward output of `layer` at the points: [N, d]."""
        return self._read(layer + 1, "mlp", 0, sequences).flatten(0, 1)

    def _read(self, layer: int, name: str, first: int, last: int) -> torch.Tensor:
        with safe_open(_file(self.directory, layer), "pt") as stored:
            tensor: torch.Tensor = stored.get_slice(name)[first:last]
        return tensor


def spread(length: int, count: int) -> tuple[int, ...]:
    """`count` evenly spaced positions of `length`, including the last; all of them if there are fewer."""
    count = min(count, length)
    return tuple((j + 1) * length // count - 1 for j in range(count))


def record(
    walk: Walk,
    portion: Portion,
    directory: Path,
    *,
    positions: int,
    points: int = 0,
    resumable: bool = False,
    progress: Progress = SILENT,
) -> Recording:
    """Run `portion` through all layers and record x(l) at `positions` tokens of each sequence.

    At `points` of these tokens (equally many of each sequence of all processes; 0: none) the feed-forward output is
    recorded too. With `resumable`, states are saved after every layer and a stopped recording continues; the caller
    must use the same model and batches. Raises CalibrationError for states that are not finite, OutputError.
    """
    batches = portion.batches
    at = spread(portion.seq_len, positions)
    inner = spread(len(at), max(1, points // portion.samples)) if points else ()
    sequences = min(portion.samples, max(1, points // len(inner))) if inner else 0
    has_mlp = bool(inner) and all(mlp_of(layer) is not None for layer in walk.layers)
    own = sum(map(len, batches))
    recording = Recording(directory, walk.depth, own, at, inner, sequences, has_mlp)
    states = walk.start(batches)
    if resumable and not _resume(recording, states):
        states = walk.start(batches)
    if states.layer == 0:
        _write(recording, 0, {"states": torch.cat([state[:, list(at)].cpu() for state in states])})
    progress.stage("Measuring layers", walk.depth, "layers")
    if states.layer:
        progress.note(f"resuming after layer {states.layer - 1}")
        progress.advance(states.layer)
    for i in range(states.layer, walk.depth):
        started = time.perf_counter()
        _advance(recording, walk, i, states)
        if resumable:
            states.save(directory / STATES)
        seconds = time.perf_counter() - started
        disk = f"{read / seconds / 1e6:,.0f} MB/s, " if (read := walk.layer_bytes(i)) else ""
        progress.detail(f"{disk}{own * portion.seq_len / seconds:,.0f} tokens/s per layer")
        progress.advance()
    return recording


def _advance(recording: Recording, walk: Walk, i: int, states: States) -> None:
    """Replace x(i) by x(i+1) and write its recorded parts."""
    at = list(recording.positions)
    inner = [recording.positions[p] for p in recording.point_positions]
    kept, outputs = list[torch.Tensor](), list[torch.Tensor]()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tokens = states.tokens[len(outputs)]
        outputs.append(hidden_of(output).reshape(*tokens.shape, -1)[:, inner].cpu())

    with ExitStack() as stack:
        layer = stack.enter_context(walk.layer(i))
        part = mlp_of(layer) if recording.has_mlp else None
        if part is not None:
            stack.enter_context(part.register_forward_hook(hook))
        walk.advance(i, states, lambda _, new: kept.append(new[:, at].cpu()))
    tensors = {"states": torch.cat(kept)}
    check_finite(tensors["states"][None], first=i + 1)
    if recording.has_mlp:
        tensors["mlp"] = torch.cat(outputs)
    _write(recording, i + 1, tensors)


def _file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer:03d}.safetensors"


def _write(recording: Recording, layer: int, tensors: dict[str, torch.Tensor]) -> None:
    with atomic_file(_file(recording.directory, layer)) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part)


def _resume(recording: Recording, states: States) -> bool:
    """Load the states of the last finished layer; False if they, or the recordings before them, are incomplete."""
    saved = recording.directory / STATES
    if not saved.is_file():
        return True
    with suppress(OSError, ValueError, SafetensorError):
        states.restore(saved)
        for i in range(states.layer + 1):
            with safe_open(_file(recording.directory, i), "pt"):  # reads the header, and checks the length
                pass
        return True
    return False
