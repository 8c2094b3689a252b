"""Reads tensors past the page cache into reused memory.

Reading a layer into new memory is slow: on a virtual machine, touching new pages and copying out of the page cache took
1.7 s of processor time for 634 MB that the disk delivered in 0.45 s. So bytes that are not in the page cache go from
the disk directly (O_DIRECT) into a buffer, which is reused when no tensor is left in it. Several requests are in flight
at a time. Buffers for a GPU are pinned, so that it copies from them while it computes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint import tensors
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import SourceError

_BLOCK = 16 << 20  # bytes per request
_REQUESTS = 4  # in flight: one alone leaves a fast disk, and a copy out of the page cache, below its full rate
_PAGE = 4096  # direct reads need offsets, lengths and addresses that are multiples of this
_GAP = 1 << 20  # largest gap between two wanted tensors that is read along with them
_KEPT = 2  # number of buffers: one in use, one being filled
_UNREFERENCED = 2  # sys.getrefcount of a pooled buffer that no tensor uses


class Buffers:
    """Reads each group of tensors into one buffer. Thread-safe.

    `capacity`: bytes of the largest group (see `buffer_bytes`), so that every buffer fits every group. `pinned`: for
    copies to a GPU; memory that cannot be pinned stays as it is.
    """

    def __init__(self, capacity: int, *, pinned: bool = False) -> None:
        self._capacity, self._pinned = capacity, pinned
        self._lock = threading.Lock()
        self._held: list[mmap.mmap] = []
        self._readers = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="slicer-request")

    def read(self, spans: Mapping[str, TensorSpan]) -> dict[str, torch.Tensor]:
        """Key -> tensor. The memory is reused after the last of them (and of their views) is freed.

        Raises SourceError if a file cannot be read or is truncated.
        """
        found: dict[str, torch.Tensor] = {}
        plain = {key: span for key, span in spans.items() if span.key is None}
        for key in spans.keys() - plain.keys():
            found[key] = tensors.load(spans[key].file)[str(spans[key].key)].clone()
        buffer = self._take(buffer_bytes(plain.values()))
        parts, at = [], 0
        for run in _runs(plain):
            start, end = run[0][1].start, max(span.end for _, span in run)
            first = start - start % _PAGE
            parts.append((run, first, end, buffer[at : at + _rounded(end - first)]))
            at += len(parts[-1][-1])
        blocks = deque(
            (part[done : done + _BLOCK], run[0][1].file, first + done, end - first - done)
            for run, first, end, part in parts
            for done in range(0, end - first, _BLOCK)
        )
        readers = [self._readers.submit(_fill_all, blocks) for _ in range(min(_REQUESTS, len(blocks)))]
        wait(readers)  # for all of them, also if one fails: they write into the buffer
        for reader in readers:
            reader.result()
        for run, first, _, part in parts:
            for key, span in run:
                piece = part[span.start - first : span.end - first]
                dtype = tensors.torch_dtype(span.dtype)
                if span.start % dtype.itemsize:
                    piece = piece.clone()
                found[key] = piece.view(dtype).view(span.shape)
        return {key: found[key] for key in spans}

    def _take(self, size: int) -> torch.Tensor:
        """`size` unused bytes, from the pool or new."""
        with self._lock:
            free = [at for at in range(len(self._held)) if sys.getrefcount(self._held[at]) == _UNREFERENCED]
            suiting = [at for at in free if len(self._held[at]) >= size]
            spare = free if not suiting else suiting[1:] if len(self._held) > _KEPT else []
            memory = self._held[suiting[0]] if suiting else _fresh(max(size, self._capacity, 1), pinned=self._pinned)
            self._held = [other for at, other in enumerate(self._held) if at not in spare]
            if not suiting:
                self._held.append(memory)
            return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def buffer_bytes(spans: Iterable[TensorSpan]) -> int:
    """Bytes of buffer that a group of tensors needs."""
    runs = _runs({str(at): span for at, span in enumerate(spans) if span.key is None})
    return sum(_rounded(max(span.end for _, span in run) - run[0][1].start + run[0][1].start % _PAGE) for run in runs)


def _rounded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _runs(spans: Mapping[str, TensorSpan]) -> list[list[tuple[str, TensorSpan]]]:
    """Groups of tensors that are close together in one file, in byte order."""
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


class _Memory(mmap.mmap):
    """Anonymous memory, which may be pinned."""

    _address = 0  # where it is pinned

    def pin(self) -> None:
        """Register it with CUDA, if CUDA can do that."""
        cuda: Any = torch.cuda
        runtime = cuda.cudart()
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        if int(runtime.cudaHostRegister(address, len(self), 0)) == 0:
            self._address, self._unpin = address, runtime.cudaHostUnregister
        else:
            with contextlib.suppress(RuntimeError):  # CUDA raises a failure once more with the next work, which is this
                torch.zeros(1, device="cuda")

    def __del__(self) -> None:  # before mmap's own end, which frees the memory
        if self._address:
            self._unpin(self._address)


def _fresh(size: int, *, pinned: bool) -> mmap.mmap:
    """New memory, in huge pages if the system has them."""
    memory = _Memory(-1, _rounded(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    if pinned:
        memory.pin()
    return memory


def _fill_all(blocks: deque[tuple[torch.Tensor, Path, int, int]]) -> None:
    """Read the blocks, together with other threads that take from the same queue; none after one has failed."""
    while True:
        try:
            _fill(*blocks.popleft())
        except IndexError:
            return
        except SourceError:
            blocks.clear()
            raise


def _fill(part: torch.Tensor, file: Path, start: int, length: int) -> None:
    """Read file[start : start + length], or the beginning of it, into `part`: whole pages, of which the last may be
    beyond the end."""
    view = part.numpy().data
    wanted, done = min(len(view), length), 0
    try:
        with contextlib.ExitStack() as stack:
            usual = os.open(file, os.O_RDONLY)
            stack.callback(os.close, usual)
            direct = _open_direct(file)
            if direct is not None:
                stack.callback(os.close, direct)
            while done < wanted:
                block = view[done:]
                count = _cached(usual, block, start + done) if direct is not None else 0
                if count < wanted - done:
                    count, direct = _read(usual, direct, block, start + done)
                if not count:
                    raise SourceError(f"{file}: ends before its last tensor; fetch it again")
                done += count
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror}); check the file") from None


def _open_direct(file: Path) -> int | None:
    """A descriptor for O_DIRECT, or None if the system or the file system does not support it."""
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        return None


def _cached(descriptor: int, block: memoryview, at: int) -> int:
    """Read what is in the page cache at `at` without blocking; returns the number of bytes."""
    try:
        return os.preadv(descriptor, [block], at, os.RWF_NOWAIT)
    except (AttributeError, OSError):
        return 0


def _read(usual: int, direct: int | None, block: memoryview, at: int) -> tuple[int, int | None]:
    """(bytes read, descriptor for direct reading, None if it no longer works)."""
    if direct is not None and at % _PAGE == 0:
        try:
            return os.preadv(direct, [block], at), direct
        except OSError:  # the file system needs another alignment, or does not support it
            direct = None
    return os.preadv(usual, [block], at), direct
