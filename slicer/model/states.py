"""Hidden states of all sequences between two layers: on the GPU up to a limit, then in the host's memory up to another,
the rest in memory-mapped files."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slicer.errors import DiskFull
from slicer.runtime.files import atomic_file

Batches = Sequence[torch.Tensor]  # int64 [batch, seq] each, no padding


class StateBudget:
    """Memory budget in bytes for states: `on_device` of the GPU that computes them, `limit` of the host; None: any
    number. What does not fit goes to files in `directory`."""

    def __init__(self, limit: int | None = None, directory: Path | None = None, on_device: int = 0) -> None:
        self.limit, self.directory, self.on_device = limit, directory, on_device
        self._used = {"cpu": 0, "cuda": 0}

    def tensor(self, shape: Iterable[int], dtype: torch.dtype, *, pin: bool = False) -> torch.Tensor:
        """An uninitialised tensor on the host; its bytes are released with it. Raises DiskFull."""
        shape = tuple(shape)
        if self.limit is not None and self._used["cpu"] + math.prod(shape) * dtype.itemsize > self.limit:
            return _mapped(shape, dtype, self.directory)
        return self._counted(torch.empty(shape, dtype=dtype, pin_memory=pin))

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """A new tensor for the states `value`: on their GPU if it fits, else on the host. Raises DiskFull."""
        if value.is_cuda and self._used["cuda"] + value.nbytes <= self.on_device:
            return self._counted(torch.empty(value.shape, dtype=value.dtype, device=value.device))
        pin = value.is_cuda or value.is_pinned()  # copies to the device need not wait then
        return self.tensor(value.shape, value.dtype, pin=pin)

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self._count(tensor.device.type, tensor.nbytes)
        weakref.finalize(tensor, self._count, tensor.device.type, -tensor.nbytes)
        return tensor

    def _count(self, device: str, nbytes: int) -> None:
        self._used[device] += nbytes


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, directory: Path | None) -> torch.Tensor:
    """A tensor in an unlinked file, which is deleted when the tensor is freed."""
    count = math.prod(shape)
    try:
        descriptor, name = tempfile.mkstemp(prefix="slicer-states-", dir=directory)
        try:
            os.posix_fallocate(descriptor, 0, max(1, count * dtype.itemsize))
            return torch.from_file(name, shared=True, size=count, dtype=dtype).view(shape)
        finally:
            os.close(descriptor)
            os.unlink(name)
    except OSError as error:
        place = directory or Path(tempfile.gettempdir())
        raise DiskFull(
            f"{place}: no space for {count * dtype.itemsize} bytes of hidden states ({error.strerror}); "
            "pass more --memory, fewer --samples, or use a disk with more space"
        ) from None


class States:
    """x(`layer`) of every batch: `states[b]` is a tensor [batch, seq, d] in the model's dtype, by the budget on the GPU
    or the host. No result may depend on that: move it to one device before anything is computed from it.

    Attributes:
        layer: l, the layer that these states enter (l = L: the final norm).
        tokens: the input batches, int64 [batch, seq].
    """

    def __init__(self, tokens: list[torch.Tensor], budget: StateBudget) -> None:
        self.layer = 0
        self.tokens = tokens
        self._budget = budget
        self._held: list[torch.Tensor | None] = [None] * len(tokens)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, batch: int) -> torch.Tensor:
        held = self._held[batch]
        assert held is not None, "these states were not started"
        return held

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[b] for b in range(len(self)))

    def __setitem__(self, batch: int, value: torch.Tensor) -> None:
        """Replace a batch's states by `value` (on any device)."""
        held = self._held[batch]
        if held is None or held.shape != value.shape or held.dtype != value.dtype:
            self._held[batch] = held = self._budget.like(value)
        held.copy_(value)

    @property
    def nbytes(self) -> int:
        """Size of all states in bytes."""
        return sum(state.nbytes for state in self)

    def copy(self) -> States:
        """A copy that later calls of `advance` do not change."""
        other = States(self.tokens, self._budget)
        other.layer = self.layer
        for at, state in enumerate(self):
            other[at] = state
        return other

    def save(self, path: Path) -> None:
        """Write the states as safetensors, atomically. Raises OutputError."""
        with atomic_file(path) as part:
            save_file({f"{b}": s.cpu() for b, s in enumerate(self)}, part, metadata={"layer": str(self.layer)})

    def restore(self, path: Path) -> None:
        """Load states that `save` wrote for the same batches. Raises OSError or ValueError if they do not match."""
        try:
            with safe_open(path, "pt") as stored:
                found = {b: stored.get_tensor(f"{b}") for b in range(len(self))}
                layer = int((stored.metadata() or {})["layer"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not the states of these batches ({error})") from None
        for b, state in found.items():
            if state.shape != self[b].shape or state.dtype != self[b].dtype:
                raise ValueError(f"{path}: not the states of these batches")
            self[b] = state
        self.layer = layer
