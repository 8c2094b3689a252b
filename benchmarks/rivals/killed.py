"""Kills a conversion at random moments, resumes it, and compares it with the same conversion undisturbed.

    python -m slicer.benchmarks.rivals.killed [--kills 20] [--seed 0] [--directory DIR] -- convert demo --drop 4 ...

After `--` stands a `slicer convert`, or a `slicer heal --method fold`, without -o. It runs once undisturbed. Then it is
killed (SIGKILL) at a random moment of the time that this took, and run again, until it succeeds; and the whole again,
until there were so many kills. Each time the result must have the same files with the same bytes.

What a kill costs is counted in runs of a layer over a batch: tokens, three times as many if gradients are taken. The
unit is a sweep: every layer of the source over the whole text, forward. Text that is sampled, logits that are compared
and files that are written are not counted; after a kill there, they are made again. Where a run resumed is known from
the first stage that it kept: the undisturbed run had a known share of its work behind it there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from slicer.benchmarks.page import markdown_table
from slicer.benchmarks.process import module_command
from slicer.benchmarks.script import options
from slicer.plan.plan import Plan

_END = "the result"
_FORWARD_AND_BACKWARD = 3  # times the work of forward alone


@dataclass(frozen=True)
class Run:
    """One process: `code` is negative if it was killed, `seconds` are those since its imports.

    Attributes:
        kept: (name of a finished stage, the work that this process had done before it), in order.
        work: all work of this process, in tokens.
        tokens: of the text; 0 if the process did not get so far.
    """

    code: int
    seconds: float
    kept: tuple[tuple[str, int], ...]
    work: int
    tokens: int


def main() -> None:
    parser = options(__doc__, kills=20, seed=0, directory=Path(tempfile.gettempdir()))
    parser.add_argument("command", nargs="*", help="a slicer command and its options")
    given = parser.parse_args()
    if given.worker:
        log, *command = given.worker
        work(Path(log), command)
        return
    with tempfile.TemporaryDirectory(prefix="slicer-killed-", dir=given.directory) as scratch:
        sys.exit(compare(Path(scratch), given.command, given.kills, random.Random(given.seed)))


def compare(scratch: Path, command: Sequence[str], kills: int, moments: random.Random) -> int:
    """Run all, print the table; returns the exit code."""
    place, whole = scratch / "out", run(scratch, command)
    if whole.code:
        return whole.code
    expected, depth = digests(place), Plan.load(place).depth
    sweep = depth * whole.tokens
    rows, same, conversions = list[list[str]](), 0, 0
    while len(rows) < kills:
        for old in scratch.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        runs = list[Run]()
        while not runs or runs[-1].code:
            after = moments.uniform(0, whole.seconds) if len(rows) + len(runs) < kills else None
            last = run(scratch, command, after)
            runs.append(replace(last, code=0) if place.exists() else last)  # killed when all was done
            if runs[-1].code not in (0, -signal.SIGKILL):
                return runs[-1].code
        for killed, again in zip(runs, done_again(runs, whole), strict=False):
            stage = killed.kept[-1][0].split()[0] if killed.kept else "none"
            rows.append([f"{len(rows) + 1}", f"{killed.seconds:.1f}", stage, f"{again / sweep:.2f}"])
            print(*rows[-1], sep="\t", file=sys.stderr)
        conversions += 1
        same += digests(place) == expected
    cost = [float(row[-1]) for row in rows]
    print(*markdown_table(["kill", "after s", "last stage kept by that run", "sweeps done again"], rows), sep="\n")
    print(f"\n{conversions} conversions, {same} of them with the files and bytes of the undisturbed one.")
    print(
        f"Done again by a kill: {max(cost):.2f} sweeps at most, {sum(cost) / len(cost):.2f} on average. The conversion "
        f"has {whole.work / sweep:.2f}, and takes {whole.seconds:.1f} s."
    )
    return 0 if same == conversions else 1


def done_again(runs: Sequence[Run], whole: Run) -> list[int]:
    """The work, in tokens, that each of `runs` but the last did and the runs after it did again."""
    behind = {name: before for name, before in reversed((*whole.kept, (_END, whole.work)))}
    found, resumed = list[int](), behind[_END]
    starts = list[int]()  # the work that lay behind each run as it began, the last run first
    for each in reversed(runs):
        ends = (*each.kept, (_END, each.work)) if not each.code else each.kept
        if known := [(name, before) for name, before in ends if name in behind]:
            name, before = known[0]
            resumed = behind[name] - before
        starts.append(resumed)  # a run that kept nothing began where the next one did
    starts.reverse()
    for each, start, next_start in zip(runs, starts, starts[1:], strict=False):
        found.append(start + each.work - next_start)
    return found


def digests(path: Path) -> dict[str, str]:
    """File -> hash of its content."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(scratch: Path, command: Sequence[str], kill_after: float | None = None) -> Run:
    """Run the command in a fresh process, to the end or until so many seconds after its imports."""
    log = Path(tempfile.mkstemp(suffix=".log", dir=scratch)[1])
    arguments = ("rivals.killed", "--worker", log, *command, "-o", scratch / "out")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(module_command(*arguments), stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while not log.stat().st_size and process.poll() is None:
                time.sleep(0.005)
            started = time.perf_counter()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(kill_after)
        finally:
            process.kill()
            process.wait()
        seconds = time.perf_counter() - started
        if process.returncode not in (0, -signal.SIGKILL):
            errors.seek(0)
            sys.stderr.write(errors.read().decode()[-3000:])
    kept, done, tokens = list[tuple[str, int]](), 0, 0
    for line in log.read_text("utf-8").splitlines():
        kind, _, value = line.partition(" ")
        if kind == "kept":
            kept.append((value, done))
        elif kind == "work":
            done += int(value)
        elif kind == "text":
            tokens = max(tokens, int(value))
    return Run(process.returncode, seconds, tuple(kept), done, tokens)


def work(log: Path, command: Sequence[str]) -> None:
    """The command itself, in its own process; writes to `log` what it does, one line at once."""
    from slicer.jobs import work
    from slicer.model.walk import Walk
    from slicer.runtime.workdir import Stages

    stream = open(log, "ab", buffering=0)  # noqa: SIM115

    def note(kind: str, value: object = "") -> None:
        stream.write(f"{kind} {value}\n".encode())

    start, call, save, write = Walk.start, Walk.call, Stages.save, work.write_atomically

    def started(walk: Walk, batches: Any) -> Any:
        note("text", sum(batch.numel() for batch in batches))
        return start(walk, batches)

    def called(walk: Walk, i: int, batch: int, states: Any, *, gradient: bool = False) -> Any:
        note("work", states.shape[:2].numel() * (_FORWARD_AND_BACKWARD if gradient else 1))
        return call(walk, i, batch, states, gradient=gradient)

    def saved(stages: Stages, name: str, tensors: Any, facts: Any = None) -> None:
        save(stages, name, tensors, facts)
        note("kept", f"{name} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:6]}")

    def written(file: Path, text: str) -> None:
        write(file, text)
        note("kept", file.name)

    note("begun")
    sys.argv = ["slicer", *command]
    with (
        mock.patch.multiple(Walk, start=started, call=called),
        mock.patch.object(Stages, "save", saved),
        mock.patch.object(work, "write_atomically", written),
    ):
        runpy.run_module("slicer", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
