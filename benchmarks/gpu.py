"""Checks slicer on one GPU in a few minutes: speed against plain rivals, streamed against loaded, memory by formula.

    python -m slicer.benchmarks.gpu [--output-dir gpu] [--device auto] [--minutes 8] [--sizes 1b,8b] [--tiny]

Needs no network and no data, and only the libraries that run models: torch, transformers, accelerate, safetensors and
matplotlib; peft and bitsandbytes where they are installed. Writes checkpoints of random weights into the output
directory and deletes them afterwards; `8b` takes 30 GB of disk. Every line says PASS, FAIL or SKIP. `gpu.json` and
`gpu.md` are written anew after each. The phases run in a process of their own: one that fails, or kills the process,
does not keep the others from running. What exceeds --minutes is skipped. --tiny takes tiny shapes, for a CPU. Exits
with 1 if a line is FAIL.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slicer.benchmarks import machine
from slicer.benchmarks.page import markdown_table
from slicer.benchmarks.process import module_command
from slicer.benchmarks.script import options
from slicer.errors import SlicerError
from slicer.runtime.files import write_atomically
from slicer.runtime.versions import versions

SIZES = ("tiny", "1b", "8b")
_OF_EACH = ("write {}", "depth {}", "analyze {}", "convert {} loaded", "convert {} streamed")
_AT_LAST = ("train {} lora", "train {} qlora")


def phases(sizes: Sequence[str]) -> list[str]:
    """The phases in order: the name of a method of `gpu_phases.Bench`, and its arguments."""
    of_all = [[phase.format(size) for size in sizes for phase in group] for group in (_OF_EACH, _AT_LAST)]
    return ["demo", "convert demo loaded", "convert demo streamed", *of_all[0], *of_all[1]]


class Report:
    """gpu.json and gpu.md: written after every line, and read by the process that goes on after one that died."""

    def __init__(self, directory: Path, found: dict[str, Any] | None = None) -> None:
        """`found`: the start of a new report; None: the one in `directory`."""
        self._json, self._page = directory / "gpu.json", directory / "gpu.md"
        self.found = json.loads(self._json.read_text("utf-8")) if found is None else found
        self.seconds: dict[str, float | None] = self.found.setdefault("seconds", {})  # None: not ended
        self.lines: list[dict[str, str]] = self.found.setdefault("lines", [])

    def line(self, phase: str, verdict: str, what: str, figure: str, **more: str) -> None:
        """Print and keep one line."""
        print(f"{verdict}  {phase}: {what}: {figure}", flush=True)
        self.lines.append({"phase": phase, "verdict": verdict, "what": what, "figure": figure, **more})
        self.save()

    def count(self, verdict: str) -> int:
        """Number of lines with this verdict."""
        return sum(line["verdict"] == verdict for line in self.lines)

    def summary(self) -> str:
        """The number of lines with each verdict."""
        return ", ".join(f"{self.count(verdict)} {verdict}" for verdict in ("PASS", "FAIL", "SKIP"))

    def save(self) -> None:
        """Write both files."""
        write_atomically(self._json, json.dumps(self.found, indent=1) + "\n")
        about = self.found["machine"]
        hardware = ", ".join(about["gpus"]) or f"{about['processor']} ({about['cores']} cores)"
        libraries = ", ".join(f"{name} {number}" for name, number in self.found["versions"].items())
        head = ["phase", "verdict", "what", "figure"]
        times = [[name, f"{seconds:.1f}"] for name, seconds in self.seconds.items() if seconds is not None]
        page = [
            *("# slicer on this machine", "", f"**{self.summary()}**", "", f"`{self.found['command']}`", ""),
            f"{hardware}, {about['memory_bytes'] / 1e9:.0f} GB of memory; {libraries}. Random weights, except for the "
            "embedded model (demo).",
            *("", *markdown_table(head, [[line[name] for name in head] for line in self.lines])),
            *("", *markdown_table(["phase", "seconds"], times)),
        ]
        write_atomically(self._page, "\n".join(page) + "\n")


def main() -> None:
    parser = options(__doc__, output_dir=Path("gpu"), device="auto", minutes=8.0, sizes="1b,8b", tiny=False)
    given = parser.parse_args()
    sizes = ["tiny"] if given.tiny else given.sizes.split(",")
    if strange := sorted({*sizes} - {*SIZES}):
        parser.error(f"--sizes {strange[0]}: choose from {', '.join(SIZES)}")
    if given.worker:
        work(given, phases(sizes), float(given.worker[0]), Path(given.worker[1]))
        return
    given.output_dir.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m slicer.benchmarks.gpu", *sys.argv[1:]])
    used = versions("accelerate", "peft", "bitsandbytes")
    report = Report(given.output_dir, {"command": command, "machine": machine.describe(), "versions": used})
    report.save()
    deadline, code = time.monotonic() + 60 * given.minutes, None
    with tempfile.TemporaryDirectory(prefix="models-", dir=given.output_dir, ignore_cleanup_errors=True) as scratch:
        while (left := deadline - time.monotonic()) > 0:
            begun = len(report.seconds)
            child = subprocess.Popen(module_command("gpu", *sys.argv[1:], "--worker", deadline, scratch))
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(left)
            code = child.poll()
            child.kill()
            child.wait()
            report = Report(given.output_dir)
            for name in [name for name, seconds in report.seconds.items() if seconds is None]:
                report.seconds[name] = 0.0
                ended = ("SKIP", "the time is over") if code is None else ("FAIL", f"its process ended with {code}")
                report.line(name, ended[0], "stopped", ended[1])
            if code and len(report.seconds) == begun:
                sys.exit(code)  # it has said why it cannot begin
            if not code:
                break
    for name in phases(sizes):
        if name not in report.seconds:
            report.line(name, "SKIP", "not begun", "the time is over")
    print(report.summary(), flush=True)
    sys.exit(1 if report.count("FAIL") or not report.count("PASS") else 0)


def work(given: argparse.Namespace, names: Sequence[str], deadline: float, scratch: Path) -> None:
    """The child: runs the phases that none before it has begun, until the deadline (of `time.monotonic`)."""
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that "auto" means the CPU everywhere
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from slicer.benchmarks.gpu_phases import Bench
    from slicer.runtime.compute import Compute

    try:
        device = Compute(given.device).torch_device()
    except SlicerError as error:
        sys.exit(str(error))
    if device.index is not None:
        torch.cuda.set_device(device)  # "auto" means this one
    report = Report(given.output_dir)
    bench = Bench(scratch, device, given.tiny, report.found.setdefault("figures", {}))
    for name in names:
        if name in report.seconds:
            continue
        if time.monotonic() > deadline:
            break
        began, report.seconds[name] = time.monotonic(), None
        report.save()
        try:
            for line in bench.run(name):
                report.line(name, *line)
        except Exception as error:  # whatever it is, the other phases go on
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            report.line(name, "FAIL", "ended with an error", reason, traceback=traceback.format_exc())
        report.seconds[name] = time.monotonic() - began
        report.save()
        bench.check_device()


if __name__ == "__main__":
    main()
