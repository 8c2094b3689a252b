"""Whose a work directory is, who is at work in it, and what of it is taken up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from slicer.errors import OutputError
from slicer.runtime.workdir import SIGN, Notebook, Workdir, beside, claimed, lock, owned, sign_of, undamaged


@contextmanager
def another_process(code: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has run `code` and waits; it is killed when the block ends."""
    waiting = textwrap.dedent(code) + "\nprint('ready', flush=True)\nimport time\ntime.sleep(60)\n"
    command = [sys.executable, "-c", waiting, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        try:
            yield child
        finally:
            child.send_signal(signal.SIGKILL)


LOCKED = """
    import sys
    from pathlib import Path
    from slicer.runtime.workdir import lock
    held = lock(Path(sys.argv[1]), shared=len(sys.argv) > 2)
"""
CLAIMED = """
    import sys
    from pathlib import Path
    from slicer.runtime.workdir import Workdir
    work = Workdir(Path(sys.argv[1]), {"steps": 1})
    work.claim()
    (work.path / "half").write_text("done")
"""


def test_a_lock_has_one_holder_until_that_process_ends(tmp_path: Path) -> None:
    with another_process(LOCKED, tmp_path / "lock"):
        assert lock(tmp_path / "lock") is None
    held = lock(tmp_path / "lock")
    assert held is not None and lock(tmp_path / "lock") is None
    held.close()
    with another_process(LOCKED, tmp_path / "lock", "shared"):
        assert lock(tmp_path / "lock") is None
        beside_it = lock(tmp_path / "lock", shared=True)
        assert beside_it is not None
        beside_it.close()


def test_a_lock_is_on_the_file_that_is_there(tmp_path: Path) -> None:
    """Not on one that was removed by the run that held it."""
    held = lock(tmp_path / "lock")
    assert held is not None
    (tmp_path / "lock").unlink()
    other = lock(tmp_path / "lock")
    assert other is not None and os.path.samestat(os.fstat(other.fileno()), (tmp_path / "lock").stat())
    held.close()
    other.close()


def test_one_run_at_a_time_and_the_next_goes_on_after_a_kill(tmp_path: Path) -> None:
    work = tmp_path / "out.training"
    with (
        another_process(CLAIMED, work),
        pytest.raises(OutputError, match="another run is using it"),
        claimed(work, steps=1),
    ):
        raise AssertionError("both are at work")
    with claimed(work, steps=1) as found:
        assert (found.path / "half").read_text() == "done"
    assert not work.exists()


@pytest.mark.parametrize("content", ["diary.txt", ".hidden", "folder/"])
def test_what_is_not_slicers_is_neither_used_nor_removed(tmp_path: Path, content: str) -> None:
    work = beside(tmp_path / "out")
    work.mkdir()
    (work / content).mkdir() if content.endswith("/") else (work / content).write_text("Mine.")
    for overwrite in (None, True):
        with pytest.raises(OutputError, match="not created by slicer"), claimed(work, overwrite=overwrite):
            raise AssertionError("it was used")
        assert os.listdir(work) == [content.rstrip("/")]


def test_a_sign_of_somebody_else_is_not_slicers(tmp_path: Path) -> None:
    for text in ("{}", "[]", "not JSON", '{"what": "x", "identity": 3}'):
        (tmp_path / SIGN).write_text(text)
        with pytest.raises(OutputError, match="not written by slicer"), claimed(tmp_path, overwrite=True):
            raise AssertionError("it was used")
        assert (tmp_path / SIGN).read_text() == text


def test_work_of_other_options_needs_permission(tmp_path: Path) -> None:
    """The message names the first value that differs, however deep it lies."""
    work = tmp_path / "work"
    with owned(work, text={"seed": 0, "files": [(1, 2)]}, steps=10) as first:
        (first.path / "hours").write_text("of work")
    with owned(work, text={"seed": 0, "files": [(1, 2)]}, steps=10):
        assert (work / "hours").is_file()
    given = {"text": {"seed": 1, "files": [(1, 2)]}, "steps": 10}
    with (
        pytest.raises(OutputError, match=r"an unfinished training with text seed 0, not 1.*--overwrite"),
        owned(work, overwrite=False, **given),
    ):
        raise AssertionError("it was used")
    with pytest.raises(OutputError) as refused, owned(work, **given):
        raise AssertionError("it was used")
    assert "--overwrite" not in str(refused.value), "there is no such option here"
    with pytest.raises(OutputError, match="steps 10, not unknown"), owned(work, text=given["text"] | {"seed": 0}):
        raise AssertionError("it was used")
    assert (work / "hours").is_file()
    with owned(work, overwrite=True, **given):
        assert not (work / "hours").exists()
    with (
        pytest.raises(OutputError, match="holds an unfinished training"),
        owned(work, what="a sweep", overwrite=True, **given),
    ):
        raise AssertionError("it was used")


def test_where_nothing_would_be_lost_other_work_begins_anew(tmp_path: Path) -> None:
    """Only what is named is removed."""
    for steps in (1, 2):
        with owned(tmp_path / "w", resumable=lambda: False, removed=("runs*",), steps=steps):
            assert not (tmp_path / "w" / "runs.jsonl").exists()
            assert (tmp_path / "w" / "notes.txt").exists() == (steps == 2)
            (tmp_path / "w" / "runs.jsonl").write_text("")
            (tmp_path / "w" / "notes.txt").write_text("Mine.")


@pytest.mark.parametrize(
    ("error", "resumable", "stays"),
    [(None, True, False), (RuntimeError, False, False), (RuntimeError, True, True), (KeyboardInterrupt, False, True)],
)
def test_a_claimed_directory_goes_unless_there_is_something_to_resume(
    tmp_path: Path, error: type[BaseException] | None, resumable: bool, stays: bool
) -> None:
    work = tmp_path / "work"
    try:
        with claimed(work, resumable=lambda: resumable):
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert work.exists() == stays
    with claimed(work, resumable=lambda: resumable):
        pass  # and it can be claimed again


def test_processes_of_one_identity_share_a_directory(tmp_path: Path) -> None:
    def work(steps: int) -> Workdir:
        return Workdir(tmp_path / "s", {"steps": steps}, "a sweep", shared=True, resumable=lambda: False)

    one, two, other = work(1), work(1), work(2)
    one.claim()
    two.claim()
    with pytest.raises(OutputError, match="steps 1, not 2"):
        other.claim()
    one.close()
    with pytest.raises(OutputError, match="steps 1, not 2"):
        other.claim()
    two.close()
    other.claim()  # nobody is at work there, and nothing was done
    assert (sign_of(tmp_path / "s") or {})["identity"] == {"steps": 2}
    other.close()


def test_many_processes_may_begin_at_once(tmp_path: Path) -> None:
    """None takes the lock or the half-made sign of another for a stranger's file."""
    code = """
        import sys
        from pathlib import Path
        from slicer.runtime.workdir import Workdir
        for i in range(40):
            work = Workdir(Path(sys.argv[1]) / str(i), {"a": 1}, "a sweep", shared=True)
            work.claim()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    children = [subprocess.Popen(command) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]


def test_a_place_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, words in ((tmp_path / "file", "not a directory"), (tmp_path / "file" / "x", "cannot be written")):
        with pytest.raises(OutputError, match=words), claimed(place):
            raise AssertionError("it was used")


def test_a_notebook_keeps_what_was_made(tmp_path: Path) -> None:
    made: list[str] = []

    def make(value: str) -> str:
        made.append(value)
        return value

    for file in (tmp_path / "book.json", None):
        book = Notebook(file)
        assert [book.take("a", lambda: make("x")), book.take("a", lambda: make("y"))] == ["x", "x"]
    assert made == ["x", "x"]
    again = Notebook(tmp_path / "book.json")
    assert again.take("a", lambda: make("z")) == "x" and again.take("b", lambda: None) is None
    assert json.loads((tmp_path / "book.json").read_text()) == {"a": "x", "b": None} == again.values


def test_a_value_that_is_null_on_one_side_only_is_named(tmp_path: Path) -> None:
    with owned(tmp_path / "w", steps=1, teacher=None):
        pass
    with pytest.raises(OutputError, match="teacher null, not unknown"), owned(tmp_path / "w", steps=1):
        raise AssertionError("it was used")


def test_the_sign_is_removed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what is left of a removal that was stopped can be removed by the next run."""
    place = tmp_path / "work"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), claimed(place, steps=1) as work:
        for name in "abc":
            (work.path / name).mkdir()
        patch.setattr(shutil, "rmtree", stop)
    assert sign_of(place) is not None
    with claimed(place, steps=1):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [json.JSONDecodeError("no value", "", 0), SafetensorError("header too small"), EOFError(),
     RuntimeError("PytorchStreamReader failed")],
    ids=["json", "safetensors", "pickle", "torch"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line_with_the_remedy(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"^{tmp_path}: damaged.*; remove it to start over$"), undamaged(tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="^other$"), undamaged(tmp_path):
        raise RuntimeError("other")
