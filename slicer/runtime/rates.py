"""How fast this machine computes and reads, measured in the first second of a command, for its forecast."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.runtime.compute import Compute

if TYPE_CHECKING:
    import torch

_SECONDS = 0.3  # of one measurement, at most; the first call, which takes longer, is not counted
_SHARE = 0.01  # of the forecast that a measurement may take: short work is hardly measured
_SIDE = 4096  # of the matrices, at most: larger ones are no faster
_ROWS = 256  # tokens, at most, on a CPU: more are no faster
_BLOCK = 16 << 20  # bytes of one request to the disk
_READ = 256 << 20  # bytes to read, at most


@dataclass(frozen=True)
class Rates:
    """`flops`: torch dtype -> FLOP/s of products with the matrices of a layer, and what lies between them; "float64":
    of solving. `reads`: bytes/s of the source's disk, past the page cache; None: not measured."""

    flops: Mapping[str, float]
    reads: float | None = None


def measured(
    work: Mapping[str, float], shapes: Iterable[tuple[int, int]], tokens: int, compute: Compute, file: Path | None
) -> Rates:
    """The rates of this machine for `work`: torch dtype -> FLOPs.

    `shapes`: [out, in] of a layer's matrices; `tokens`: of a batch; `file`: a large one of the source, or None.
    """
    flops: dict[str, float] = {}
    if any(work.values()):
        sides, device = [(min(out, _SIDE), min(into, _SIDE)) for out, into in shapes], compute.torch_device()
        flops = {dtype: _products(sides, tokens, dtype, amount, device) for dtype, amount in work.items() if amount}
    return Rates(flops, None if file is None else _reading(file))


def _products(shapes: list[tuple[int, int]], tokens: int, dtype: str, amount: float, device: torch.device) -> float:
    """FLOP/s of all `shapes`, one after the other, each with an elementwise function behind it."""
    import torch

    tokens = min(tokens, _ROWS) if device.type == "cpu" else tokens
    if dtype == "float64":  # matrices are solved, not multiplied by tokens
        shapes, tokens = [(min(1024, max(max(shape) for shape in shapes)),) * 2], 1024
    sizes = {*shapes, *((tokens, into) for _, into in shapes)}
    made = {size: torch.full(size, 0.01, dtype=getattr(torch, dtype), device=device) for size in sizes}
    pairs = [(made[tokens, into], made[out, into]) for out, into in shapes]

    def layer() -> None:
        for x, weight in pairs:
            torch.nn.functional.silu(x @ weight.T)

    once = sum(2.0 * tokens * out * into for out, into in shapes)
    return once / _seconds(layer, amount / once, device)


def _seconds(work: Callable[[], Any], times: float, device: torch.device) -> float:
    """Median seconds of `work`, which is to be done so many `times`: other programs disturb single calls."""
    import torch

    first, spent = 0.0, list[float]()
    with torch.inference_mode():
        while True:
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            if not first:  # the first call loads kernels and touches new memory
                first = seconds
                if first * times < _SECONDS:
                    return first
                continue
            spent.append(seconds)
            if sum(spent) > min(_SECONDS, _SHARE * first * times):
                return statistics.median(spent)


def _reading(file: Path) -> float | None:
    """Bytes/s of reading from `file`, past the page cache where the file system can; None if it is short."""
    started = time.perf_counter()
    direct = getattr(os, "O_DIRECT", 0)
    done, size, buffer = 0, file.stat().st_size, mmap.mmap(-1, _BLOCK)
    for flags in (os.O_RDONLY | direct, os.O_RDONLY):
        with suppress(OSError):
            descriptor = os.open(file, flags)
            try:
                while done + _BLOCK <= min(size, _READ) and time.perf_counter() - started < _SECONDS:
                    done += os.preadv(descriptor, [buffer], done)
            finally:
                os.close(descriptor)
            break
    return done / (time.perf_counter() - started) if done else None
