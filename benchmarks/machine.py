"""Describes this machine and measures its memory bandwidth and matrix rate, which limit the time per token.

    python -m slicer.benchmarks.machine [DTYPE]        prints one JSON object

Runs in a separate process, with as many threads as the engines use.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from slicer.benchmarks.process import run_module, seconds_of
from slicer.runtime.memory import available

_TRIES = 7
_MOST_BYTES = 1 << 30  # much larger than any cache


def measure(dtype: str, on_cpu: bool) -> dict[str, Any]:
    """Bandwidth (bytes/s) and rate (FLOP/s) of this machine, from a fresh process. Raises BenchError."""
    return run_module("measuring the machine", "machine", dtype, "cpu" if on_cpu else "cuda")


def describe() -> dict[str, Any]:
    """Hardware and versions, as far as the system reports them."""
    return {
        "processor": _processor(),
        "cores": _cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """The child: print bytes read per second and floating-point operations per second."""
    dtype, device = getattr(torch, sys.argv[1]), torch.device(sys.argv[2])
    if device.type == "cpu":
        torch.set_num_threads(_cores())
        size, side = min(_MOST_BYTES, available() // 8), 2048
    else:
        size, side = _MOST_BYTES, 8192
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    read = size / _least(lambda: source.sum(), device)
    copied = 2 * size / _least(lambda: target.copy_(source), device)
    rate = 2 * side**3 / _least(lambda: left @ right, device)
    print(json.dumps({"bytes_per_second": max(read, copied), "flops_per_second": rate, "dtype": sys.argv[1]}))


def _least(work: Callable[[], Any], device: Any) -> float:
    """Seconds of the fastest of several tries."""
    return min([seconds_of(work, device) for _ in range(_TRIES + 1)][1:])


if __name__ == "__main__":
    main()
