"""What a kill cost is known from the stages that the runs after it kept."""

from __future__ import annotations

import signal

from slicer.benchmarks.rivals.killed import Run, done_again

WHOLE = Run(0, 9.0, (("a", 10), ("b", 30), ("c", 50)), 60, 1)


def killed(work: int, *kept: tuple[str, int]) -> Run:
    return Run(-signal.SIGKILL, 1.0, kept, work, 1)


def test_work_that_is_done_again_is_counted_for_each_kill() -> None:
    runs = [
        killed(25, ("a", 10)),  # 15 after its last stage
        killed(8),  # kept nothing: all of it is done again
        killed(44, ("b", 22), ("c", 42)),  # 2 beside the 20 of the stage: it resumed at 8
        Run(0, 1.0, (), 10, 1),
    ]
    assert done_again(runs, WHOLE) == [17, 8, 2]
    assert sum(run.work for run in runs) == WHOLE.work + 17 + 8 + 2


def test_without_kills_nothing_is() -> None:
    assert done_again([WHOLE], WHOLE) == []
