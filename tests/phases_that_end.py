"""Phases of `slicer.benchmarks.gpu` that end in a bad way; a module of its own, so that other processes find it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from slicer.benchmarks.gpu import Bench, Line


class Ending(Bench):
    def fails(self) -> Iterator[Line]:
        yield Line(True, "first", "said before the failure")
        raise RuntimeError("no kernel\nfor this")

    def dies(self) -> Iterator[Line]:
        os.kill(os.getpid(), 9)
        yield Line(True, "never", "said")

    def waits(self) -> Iterator[Line]:
        time.sleep(600)
        yield Line(True, "never", "said")
