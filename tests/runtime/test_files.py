"""A file or directory appears whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from slicer.errors import DiskFull, OutputError
from slicer.runtime import files


def test_too_little_space_is_seen_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="free"):
        files.check_space(tmp_path / "not" / "there", 10**18)


@pytest.mark.parametrize("replace", [True, False])
def test_an_exception_leaves_what_was_there(tmp_path: Path, replace: bool) -> None:
    out = tmp_path / "out"
    if replace:
        out.mkdir()
        (out / "old").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_directory(out, replace=replace) as made:
        (made / "new").write_text("new")
        raise RuntimeError
    assert os.listdir(tmp_path) == (["out"] if replace else [])


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_leaves_only_the_new(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with files.atomic_directory(out, replace=True) as made:
        (made / "new").write_text("new")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["new"]


def test_a_directory_that_fills_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="meanwhile"), files.atomic_directory(out):
        out.mkdir()
        (out / "theirs").write_text("x")
    assert os.listdir(out) == ["theirs"] and os.listdir(tmp_path) == ["out"]


def test_the_result_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with files.atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from slicer.runtime.files import atomic_directory
        with atomic_directory(Path(sys.argv[1])) as made:
            (made / "half").write_text("x")
            print("writing", flush=True)
            time.sleep(60)
    """
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(out)], stdout=subprocess.PIPE, env={**os.environ}
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    time.sleep(0.01)
    assert not out.exists()
    with files.atomic_directory(out) as made:
        (made / "whole").write_text("x")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["whole"]


def killed_while(code: str, *arguments: object) -> None:
    """Run `code` in a process of its own and kill it when it prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        child.send_signal(signal.SIGKILL)


def test_a_kill_between_writing_and_renaming_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old")
    code = """
        import sys, time
        from pathlib import Path
        from slicer.runtime.files import atomic_file
        with atomic_file(Path(sys.argv[1])) as part:
            part.write_text("half")
            print("written", flush=True)
            time.sleep(60)
    """
    killed_while(code, file)
    assert file.read_text() == "old"
    files.write_atomically(file, "new")
    assert file.read_text() == "new"


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old")
    for kind in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(kind), files.atomic_file(file) as part:
            part.write_text("half")
            raise kind
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["plan.json"]


def test_what_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "none" / "x.json", tmp_path / "file" / "x.json", tmp_path):
        with pytest.raises(OutputError, match="cannot be written"):
            files.write_atomically(place, "{}")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="disk is full"):
        files.write_atomically(tmp_path / "x.json", "{}")
    assert os.listdir(tmp_path) == ["file"]


def test_many_writers_of_one_file_leave_one_of_their_texts(tmp_path: Path) -> None:
    file = tmp_path / "grid.json"
    code = """
        import sys
        from pathlib import Path
        from slicer.runtime.files import write_atomically
        for _ in range(200):
            write_atomically(Path(sys.argv[1]), sys.argv[2] * 5000)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(file)]
    children = [subprocess.Popen([*command, letter]) for letter in "ab"]
    seen: set[str] = set()
    while any(child.poll() is None for child in children):
        if file.is_file():
            seen.add(file.read_text())
    assert all(child.returncode == 0 for child in children)
    assert seen <= {"a" * 5000, "b" * 5000} and os.listdir(tmp_path) == ["grid.json"]


def test_a_digest_changes_with_the_contents_and_not_with_the_order(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_text("a")
    two.write_text("b")
    before = files.digest_of([one, two])
    assert before == files.digest_of([two, one, one]) and files.digest_of([]) is None
    two.write_text("c")
    assert files.digest_of([one, two]) != before


@pytest.mark.parametrize("links", [True, False])
def test_a_linked_file_stays_when_the_other_name_goes(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", _no_links, raising=False)
    (tmp_path / "old").write_text("x")
    files.link_or_copy(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old").unlink()
    assert (tmp_path / "new").read_text() == "x"


def _no_links(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_source_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(100))
    with open(tmp_path / "target", "wb") as target, pytest.raises(OSError, match="shorter"):
        files.copy_range(source, 0, 200, target.fileno(), 0, shared=False, progress=lambda _: None)


TORCH_CANNOT_WRITE = "[enforce fail at inline_container.cc:672] . unexpected pos 95296 vs 95188"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError(TORCH_CANNOT_WRITE),
     SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")],
    ids=["Python", "torch", "safetensors"],
)  # fmt: skip
def test_a_full_disk_is_one_line_whoever_found_it(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the place with the least free space: most errors name none."""
    full = tmp_path / "work"
    monkeypatch.setattr(files, "_free", lambda place: 0 if place == full else 10**9)
    with pytest.raises(DiskFull, match=f"^{full}: the disk is full; .* -o$"), files.within_disk(full):
        raise error
    full = Path(tempfile.gettempdir())
    with pytest.raises(DiskFull, match=f"^{full}: the disk is full; .*TMPDIR"), files.within_disk(tmp_path / "work"):
        raise error
    with pytest.raises(type(other := RuntimeError("unexpected")), match="unexpected"), files.within_disk(tmp_path):
        raise other


def test_a_message_names_the_directory_that_was_asked_for(tmp_path: Path) -> None:
    """Not the sibling that is gone."""
    out = tmp_path / "out"
    with pytest.raises(DiskFull, match=f"^{out}: needs 9000TB") as caught, files.atomic_directory(out) as directory:
        files.check_space(directory, 9 * 10**15)
    assert "slicer-" not in str(caught.value)
