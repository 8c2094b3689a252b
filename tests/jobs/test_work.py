"""A conversion or a fold that is stopped goes on from its work directory, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import slicer, succeeds
from processes import ForkServer
from safetensors import SafetensorError

from slicer.heal.compensate import fold
from slicer.heal.compensate.newton import STEPS, Newton
from slicer.heal.compensate.objective import Objective
from slicer.jobs import analyze, work
from slicer.model import verify
from slicer.runtime.workdir import SIGN, Stages


def tree(path: Path) -> dict[str, bytes]:
    """File -> content; the command is recorded in the plan, with its own output."""
    names = {str(f.relative_to(path)): f for f in path.rglob("*") if f.is_file()}
    return {name: f.read_bytes().replace(str(path).encode(), b"OUT") for name, f in names.items()}


def converting(text: Path, out: Path) -> list[object]:
    return [
        "convert",
        "demo",
        "--drop",
        4,
        "--heal",
        "fold",
        "--calibration",
        text,
        "--samples",
        16,
        "--seq-len",
        48,
        "-o",
        out,
    ]


@pytest.fixture(scope="module")
def done(held_out_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    succeeds(*converting(held_out_file, out))
    return out


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: list[str]) -> None:
    before = getattr(owner, name)

    def call(*given: Any, **more: Any) -> Any:
        calls.append(name)
        return before(*given, **more)

    patch.setattr(owner, name, call)


@pytest.mark.parametrize("streams", [False, True], ids=["loaded", "streamed"])
def test_stopped_after_a_stage_it_does_nothing_twice(
    streams: bool, done: Path, held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layers' work; a forward sweep over those before the layer of a stage is repeated."""
    calls: list[str] = []
    work_of = ((work, "measure"), (fold, "solve"), (Newton, "_back"), (Objective, "judge"))
    for owner, name in work_of:
        counted(monkeypatch, owner, name, calls)
    save: Callable[..., None] = Stages.save
    saved = list[str]()

    def stop(self: Stages, name: str, *given: Any) -> None:
        save(self, name, *given)
        if not name.startswith(("factors", "direction")):  # parts of a stage
            saved.append(name)
            if len(saved) < 4 or len(saved) % 4 == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(Stages, "save", stop)
    out = tmp_path / "out"
    command = [*converting(held_out_file, out), *(["--memory", "5MB"] if streams else [])]
    while (result := slicer(*command)).exit_code:
        assert result.exit_code == 130 and not out.exists(), result.output
        assert [p.name for p in tmp_path.iterdir()] == ["out.work"]
    assert calls.count("measure") == 1 and saved.count("slopes") > 2 * STEPS and saved.count("steps") == STEPS
    monkeypatch.setattr(Stages, "save", save)
    found = {name: calls.count(name) for _, name in work_of}
    calls.clear()
    succeeds(*converting(held_out_file, tmp_path / "again"))
    assert found == {name: calls.count(name) for _, name in work_of}
    expected, found_files = tree(done), tree(out)
    differ = {name for name in expected if expected[name] != found_files.get(name)}
    assert expected.keys() == found_files.keys()
    assert differ <= ({"slicer/plan.json", "README.md"} if streams else set())
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["again", "out"]


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    forks: ForkServer, done: Path, held_out_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    moments = random.Random(0)
    for _ in range(6):
        run = forks.start(*map(str, converting(held_out_file, out)))
        try:
            run.wait(timeout=moments.uniform(0.2, 6))
        except AssertionError:
            run.kill()
        if out.exists():
            break
    if not out.exists():
        succeeds(*converting(held_out_file, out))
    assert tree(out) == tree(done) and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def stopped(held_out_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a conversion that was stopped in its last step."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    save: Callable[..., None] = Stages.save

    def stop(self: Stages, name: str, tensors: Any, facts: Any = None) -> None:
        save(self, name, tensors, facts)
        if name == "steps" and facts[0] == STEPS - 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "save", stop)
        assert slicer(*converting(held_out_file, out)).exit_code == 130
    return out.with_name("out.work")


@pytest.mark.parametrize("damage", ["empty", "cut short", "random bytes"])
@pytest.mark.parametrize("files", ["measured.json", "stages-*/*", "text/*/*"])
def test_what_is_damaged_in_the_directory_is_made_again(
    damage: str, files: str, stopped: Path, done: Path, held_out_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "out.work")
    found = list((tmp_path / "out.work").glob(files))
    for file in found:
        content = file.read_bytes()
        half, other = content[: len(content) // 2], random.Random(0).randbytes(5000)
        file.write_bytes({"empty": b"", "cut short": half, "random bytes": other}[damage])
    assert found
    succeeds(*converting(held_out_file, tmp_path / "out"))
    assert tree(tmp_path / "out") == tree(done) and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", ["", '{"what": "unfin', "[]", '{"what": "another thing", "identity": {}}'])
def test_a_directory_whose_sign_is_damaged_is_one_line(
    content: str, stopped: Path, held_out_file: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out.work"
    shutil.copytree(stopped, place)
    (place / SIGN).write_text(content)
    failed = slicer(*converting(held_out_file, tmp_path / "out"))
    said = failed.stderr.strip().splitlines()
    assert failed.exit_code == 1 and len(said) == 1 and str(place) in said[0]
    assert (place / "measured.json").is_file() and os.listdir(tmp_path) == ["out.work"], "nothing was removed"


def test_other_work_in_the_directory_is_one_line(held_out_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    place = tmp_path / "out.work"
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    failed = slicer(*converting(held_out_file, out))
    assert failed.exit_code == 1 and len(failed.stderr.strip().splitlines()) == 1 and "out.work" in failed.stderr
    assert [p.name for p in place.iterdir()] == ["mine.txt"] and not out.exists()


def test_out_of_memory_in_healing_that_was_asked_for_keeps_the_work(
    done: Path, held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; then the same command resumes, and so does the one that the line advises. The fold that nobody asked
    for is in tests/test_devices.py."""

    def full(*_: Any) -> bool:
        raise MemoryError

    calls: list[str] = []
    counted(monkeypatch, work, "measure", calls)
    for name, advised in (("same", False), ("advised", True)):
        out = tmp_path / name
        command = converting(held_out_file, out)
        with monkeypatch.context() as patch:
            patch.setattr(Newton, "step", full)
            failed = slicer(*command)
        said = failed.stderr.splitlines()[-1]
        assert failed.exit_code == 1 and "out of memory healing the cut; give --batch-size 1 or --device cpu" in said
        assert (tmp_path / f"{name}.work").is_dir() and not out.exists()
        succeeds(*command, *(["--batch-size", 1, "--device", "cpu"] if advised else []))
        assert advised or (out / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()
    assert calls == ["measure"] * 2 and sorted(p.name for p in tmp_path.iterdir()) == ["advised", "same"]


@pytest.mark.parametrize(("command", "owner", "name"), [("convert", work, "measure"), ("analyze", analyze, "record")])
def test_out_of_memory_in_measuring_is_one_line(
    command: str, owner: Any, name: str, held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(owner, name, full)
    _, *given = converting(held_out_file, tmp_path / "out")
    failed = slicer(command, *(given if command == "convert" else [given[0], *given[5:]]))
    said = failed.stderr.strip().splitlines()[-1]
    assert failed.exit_code == 1 and said == "slicer: out of memory measuring; give --batch-size 1 or --device cpu"
    assert not (tmp_path / "out.work").exists()


def test_a_full_disk_is_one_line_and_keeps_the_work(
    done: Path, held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors reports it by an error of its own."""
    import safetensors.torch

    save: Callable[..., None] = safetensors.torch.save_file

    def full(tensors: Any, file: Path, *given: Any) -> None:
        if "steps" in file.name:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, file, *given)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        failed = slicer(*converting(held_out_file, out))
    assert failed.exit_code == 1 and "steps.safetensors: the disk is full" in failed.stderr.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["out.work"]
    succeeds(*converting(held_out_file, out))
    assert tree(out) == tree(done)


@pytest.mark.parametrize("call", [1, 2], ids=["of the source", "of the result"])
def test_out_of_memory_in_the_logits_keeps_the_work(
    call: int, done: Path, held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of the written checkpoint; and without logits nothing is measured or solved again."""
    logits, calls = verify.pruned_logits, list[str]()

    def full(*given: Any) -> torch.Tensor:
        calls.append("logits")
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return logits(*given)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(verify, "pruned_logits", full)
        failed = slicer(*converting(held_out_file, out))
    said = "slicer: out of memory comparing logits; give --verify load or --device cpu"
    assert failed.exit_code == 1 and failed.stderr.strip().splitlines()[-1] == said
    assert [p.name for p in tmp_path.iterdir()] == ["out.work"]
    calls.clear()
    for owner, name in ((work, "measure"), (Newton, "step")):
        counted(monkeypatch, owner, name, calls)
    succeeds(*converting(held_out_file, out), "--verify", "load")
    assert not calls and (out / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()
