"""Runs modules of the benchmarks in fresh processes, and measures the time and the memory of a process."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slicer.errors import BenchError


def module_command(module: str, *arguments: object) -> list[str]:
    """The command line that runs a module of the benchmarks, such as "machine"."""
    return [sys.executable, "-m", f"slicer.benchmarks.{module}", *map(str, arguments)]


def run_module(what: str, module: str, *arguments: object, stdin: str | None = None) -> dict[str, Any]:
    """Run a module of the benchmarks in a fresh process; returns the JSON object in its last line of output. Raises
    BenchError with the last line of its error output; the message begins with `what`."""
    done = subprocess.run(module_command(module, *arguments), input=stdin, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        raise BenchError(f"{what}: its process was killed, probably out of memory")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BenchError(f"{what} failed: {reason[:300]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def synchronize(device: Any) -> None:
    """Wait until a torch device has done all its work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: Any) -> float:
    """Seconds of one call, with all its work on the device."""
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def memory_of(field: str) -> int:
    """Bytes of this process by a field of /proc/self/status; by VmRSS in sandboxes that do not have the field.
    (getrusage would include the parent's at the fork.)"""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    known = {name: value for name, _, value in lines}
    return 1024 * int((known.get(field) or known["VmRSS"]).split()[0])


def peak_memory(on_gpu: bool) -> int:
    """Peak bytes of this process: of its GPU allocator, or resident."""
    import torch

    return torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Peak:
    """A context manager that samples `read()` in a thread; `before` is the first value in bytes, `most` the largest."""

    def __init__(self, read: Callable[[], int], interval: float = 0.02) -> None:
        self._read, self._interval, self._done = read, interval, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self.before = self.most = self._read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.most = max(self.most, self._read())
