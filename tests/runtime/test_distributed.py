"""Processes of one launch share work and agree on what the first one found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from slicer.errors import OutputError, UsageError
from slicer.runtime import distributed
from slicer.runtime.distributed import Processes


def test_too_few_batches_for_the_processes() -> None:
    with pytest.raises(UsageError, match="--samples"):
        Processes(0, 3).of([torch.zeros(1, 2)] * 2)


def test_the_parts_are_all_batches_in_order() -> None:
    batches = [torch.full((n, 2), n) for n in (2, 2, 2, 1, 1)]
    parts = [Processes(rank, 3).of(batches) for rank in range(3)]
    assert [batch for own, _ in parts for batch in own] == batches
    assert [first for _, first in parts] == [0, 2, 6]


def test_one_process_needs_no_group() -> None:
    one = Processes.of_environment()
    assert one == Processes(0, 1) and one.is_first and not torch.distributed.is_initialized()
    made: list[int] = []
    assert one.first_then_all(lambda: made.append(1) or len(made)) == 1
    parts = [torch.ones(3, 2)]
    assert one.agree("x") == "x" and one.join(parts, 0, 3) == parts
    one.leave()


def test_several_processes_join_their_parts_and_share_a_failure(tmp_path: Path) -> None:
    """By torchrun on the CPU: what is summed is exact, work is done by the first one first, and its error is
    everybody's."""
    code = f"""
        import json, sys
        from pathlib import Path
        import torch
        from slicer.errors import OutputError
        from slicer.runtime.distributed import Processes, first_process
        from slicer.runtime.workdir import claimed

        place = Path({str(tmp_path)!r})
        processes = Processes.of_environment()
        assert processes.is_first == first_process()
        own, first = processes.of([torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
                                   for i in range(5)])
        whole = processes.join([torch.cat(own), torch.cat(own)[:, 0].to(torch.bfloat16)], first, 10)

        def made():
            file = place / "made"
            file.write_text(file.read_text() + "x" if file.is_file() else "x")
            return len(file.read_text())

        seen = processes.first_then_all(made)
        work = place / "work"
        with claimed(work, processes, steps=1) as found:
            there = found.path.is_dir()
        (place / "theirs").mkdir(exist_ok=True)
        (place / "theirs" / "diary.txt").touch()
        try:
            with claimed(place / "theirs", processes):
                error = None
        except OutputError as raised:
            error = str(raised)
        processes.agree(None)
        told = {{"sum": whole[0].sum(0).tolist(), "half": whole[1].tolist(), "seen": seen, "there": there,
                 "gone": processes.first(lambda: not work.exists()), "error": error}}
        (place / f"{{processes.rank}}.json").write_text(json.dumps(told))
        processes.leave()
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    parts = [torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    assert one["sum"] == two["sum"] == torch.cat(parts).sum(0).tolist()
    assert one["half"] == two["half"] == torch.cat(parts)[:, 0].to(torch.bfloat16).tolist()
    assert (one["seen"], two["seen"]) == (1, 2)
    assert one["there"] and two["there"] and one["gone"] and two["gone"]
    assert one["error"] == two["error"] and "not created by slicer" in one["error"]


def test_an_error_of_the_first_is_raised_once_when_it_is_alone() -> None:
    def fails() -> None:
        raise OutputError("full")

    with pytest.raises(OutputError, match="full"):
        Processes().first(fails)


def test_alone_a_process_is_not_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert distributed.world() == 4 and not distributed.first_process() and distributed.sharded()
    with pytest.raises(RuntimeError), distributed.alone():
        assert distributed.world() == 1 and distributed.first_process() and not distributed.sharded()
        raise RuntimeError
    assert distributed.world() == 4 and distributed.sharded()


def test_each_process_takes_its_own_gpu_before_it_does_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the current device later, as quantizers and accelerate's sharding do, gets that one."""
    for name, value in {"WORLD_SIZE": "8", "RANK": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: done.append("joins"))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 6)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    assert Processes.of_environment() == Processes(6, 8) and done == [2, "joins"]
