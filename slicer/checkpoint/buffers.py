"""Tensors read past the page cache into memory that is used again.

Reading a layer into fresh memory costs more than the reading: on a virtual machine, touching new pages and copying out
of the page cache took 1.7 s of processor time for 634 MB that the disk gave in 0.45 s. So bytes that the page cache
does not have go from the disk straight into a buffer (O_DIRECT), which is filled again once no tensor lies in it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from slicer.checkpoint import tensors as torch_tensors
from slicer.checkpoint.reader import TensorSpan
from slicer.errors import SourceError

_BLOCK = 16 << 20  # bytes asked for at once: enough for a disk's full rate
_PAGE = 4096  # offsets, lengths and addresses of direct reading are multiples of this
_GAP = 1 << 20  # bytes of other tensors between two wanted ones that are read along
_KEPT = 2  # buffers: one in use, one being filled
_UNREFERENCED = 2  # what sys.getrefcount says of a buffer in the pool's list that no tensor holds


class Buffers:
    """Reads tensors, each group of them into one buffer. Safe to use from several threads.

    `capacity` is what the largest group takes (see `room`), so that every buffer suits every group.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._held: list[mmap.mmap] = []

    def read(self, spans: Mapping[str, TensorSpan]) -> dict[str, torch.Tensor]:
        """Key -> tensor. The memory is theirs until the last of them (and of their views) is gone.

        Raises SourceError when a file cannot be read, or ends too early.
        """
        found: dict[str, torch.Tensor] = {}
        plain = {key: span for key, span in spans.items() if span.key is None}
        for key in spans.keys() - plain.keys():
            found[key] = torch_tensors.load(spans[key].file)[str(spans[key].key)].clone()
        buffer = self._take(room(plain.values()))
        at = 0
        for run in _runs(plain):
            file, start, end = run[0][1].file, run[0][1].start, max(span.end for _, span in run)
            first = start - start % _PAGE
            part = buffer[at : at + _rounded(end - first)]
            _fill(part, file, first, end - first)
            for key, span in run:
                piece = part[span.start - first : span.end - first]
                dtype = torch_tensors.torch_dtype(span.dtype)
                if span.start % dtype.itemsize:
                    piece = piece.clone()
                found[key] = piece.view(dtype).view(span.shape)
            at += len(part)
        return {key: found[key] for key in spans}

    def _take(self, size: int) -> torch.Tensor:
        """`size` bytes that nobody else uses, from the pool or fresh."""
        with self._lock:
            free = [at for at in range(len(self._held)) if sys.getrefcount(self._held[at]) == _UNREFERENCED]
            suiting = [at for at in free if len(self._held[at]) >= size]
            spare = free if not suiting else suiting[1:] if len(self._held) > _KEPT else []
            memory = self._held[suiting[0]] if suiting else _fresh(max(size, self._capacity, 1))
            self._held = [other for at, other in enumerate(self._held) if at not in spare]
            if not suiting:
                self._held.append(memory)
            return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def room(spans: Iterable[TensorSpan]) -> int:
    """Bytes of buffer that a group of tensors takes."""
    runs = _runs({str(at): span for at, span in enumerate(spans) if span.key is None})
    return sum(
        _rounded(max(span.end for _, span in run) - run[0][1].start + run[0][1].start % _PAGE) for run in runs
    )


def _rounded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _runs(spans: Mapping[str, TensorSpan]) -> list[list[tuple[str, TensorSpan]]]:
    """Tensors that lie close together in one file, in the order of their bytes."""
    runs: list[list[tuple[str, TensorSpan]]] = []
    end = 0
    for key, span in sorted(spans.items(), key=lambda item: (str(item[1].file), item[1].start)):
        if runs and runs[-1][0][1].file == span.file and span.start - end <= _GAP:
            runs[-1].append((key, span))
            end = max(end, span.end)
        else:
            runs.append([(key, span)])
            end = span.end
    return runs


def _fresh(size: int) -> mmap.mmap:
    """New memory, in large pages where the system has them."""
    memory = mmap.mmap(-1, _rounded(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _fill(part: torch.Tensor, file: Path, start: int, length: int) -> None:
    """file[start : start + length] -> the front of `part`, whose size is `length` rounded up to pages."""
    view = part.numpy().data
    try:
        with contextlib.ExitStack() as stack:
            usual = os.open(file, os.O_RDONLY)
            stack.callback(os.close, usual)
            direct = _open_direct(file)
            if direct is not None:
                stack.callback(os.close, direct)
            done = 0
            while done < length:
                block = view[done : done + _BLOCK]
                count = _cached(usual, block, start + done) if direct is not None else 0
                if count < min(len(block), length - done):
                    count, direct = _read(usual, direct, block, start + done)
                if not count:
                    raise SourceError(f"{file}: ends before its last tensor; fetch it again")
                done += count
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror}); check the file") from None


def _open_direct(file: Path) -> int | None:
    """A descriptor that reads past the page cache, where the system and the file system have such."""
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        return None


def _cached(descriptor: int, block: memoryview, at: int) -> int:
    """Read what the page cache has at once; returns how much that was."""
    try:
        return os.preadv(descriptor, [block], at, os.RWF_NOWAIT)
    except (AttributeError, OSError):
        return 0


def _read(usual: int, direct: int | None, block: memoryview, at: int) -> tuple[int, int | None]:
    """(bytes read, the descriptor for direct reading if it is of use from here on)."""
    if direct is not None and at % _PAGE == 0:
        try:
            return os.preadv(direct, [block], at), direct
        except OSError:  # the file system wants another alignment, or does not have it after all
            direct = None
    return os.preadv(usual, [block], at), direct
