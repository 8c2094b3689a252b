"""The directory of an unfinished training, beside where its result is to be: whose it is, what may be taken up.

Such a directory holds one of `_SIGNS`. One that holds none of them, and is not empty, is somebody else's: it is never
written to, and never removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slicer.checkpoint.reader import Checkpoint
from slicer.errors import OutputError
from slicer.measure.calibration import CalibrationSpec
from slicer.measure.share import Share
from slicer.measure.workplace import fingerprint

_SIGNS = ("made-by-slicer", "mark", "cut.json")  # the first is made with the directory


def workplace_of(out: Path) -> Path:
    """The directory of an unfinished training whose result is to be `out`."""
    return out.with_name(out.name + ".training")


def ranks_of(out: Path) -> Path:
    """The directory of what is trained with one rank after another, until the best becomes `out`."""
    return out.with_name(out.name + ".ranks")


def _own(work: Path) -> None:
    """Make the directory `work`, or take it where slicer made it. Raises OutputError where it is another's."""
    try:
        if not any((work / sign).is_file() for sign in _SIGNS):
            if work.exists() and (not work.is_dir() or any(work.iterdir())):
                raise OutputError(
                    f"{work}: is in the way, and not slicer's to use or remove; move it, or choose another -o"
                )
            work.mkdir(parents=True, exist_ok=True)
            (work / _SIGNS[0]).touch()
    except OSError as error:
        raise OutputError(f"{work}: cannot be written ({error.strerror}); choose another -o") from None


def cut_for(
    out: Path,
    checkpoint: Checkpoint,
    spec: CalibrationSpec,
    asked: Mapping[str, Any],
    make: Callable[[Path], Any],
    *,
    force: bool,
) -> Path:
    """The bare cut of `checkpoint` that a training for `out` starts from: `make` writes it, unless an earlier run with
    the same `asked` did. Raises OutputError where another's lies there."""
    work = workplace_of(out)
    cut, file = work / "cut", work / "cut.json"
    mark = fingerprint(checkpoint, asdict(spec), **asked)
    _own(work)
    known = file.is_file() and file.read_text("utf-8") == mark
    if not known and any((work / sign).is_file() for sign in _SIGNS[1:]):
        if not force:
            raise _another(work)
        shutil.rmtree(work)
        _own(work)
    if not file.is_file():
        try:
            make(cut)
            file.write_text(mark, "utf-8")
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return cut


@contextlib.contextmanager
def discarding(out: Path) -> Iterator[None]:
    """What fails inside the block leaves no workplace behind, unless a training can go on from it."""
    work = workplace_of(out)
    try:
        yield
    except Exception:  # anything but being stopped by hand, after which the same command goes on
        if not _worth_keeping(work) and not (ranks_of(out) / "mark").is_file():
            shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def first_alone(share: Share, work: Path, mark: str, *, force: bool) -> Iterator[None]:
    """Inside the block the first process has `work` for itself; it goes at the end, unless there is something to go on
    from. Raises OutputError where another run is at work there, or an unfinished one of another mark lies there."""
    lock = None

    def claim() -> None:
        nonlocal lock
        _own(work)
        try:
            lock = open(work / "lock", "w")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{work}: another run is at work there; wait for it, or choose another -o"
            ) from None
        except OSError as error:
            raise OutputError(f"{work}: cannot be written ({error.strerror}); choose another -o") from None
        file = work / "mark"
        if file.is_file() and file.read_text("utf-8") != mark:
            if not force:
                raise _another(work)
            for old in work.iterdir():
                if old.name not in (_SIGNS[0], "lock", "cut", "cut.json"):
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        file.write_text(mark, "utf-8")

    try:
        share.first(claim)
        yield
    except Exception as error:
        if share.is_first and not isinstance(error, OutputError) and not _worth_keeping(work):
            shutil.rmtree(work, ignore_errors=True)
        raise
    else:
        if share.is_first:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        if lock is not None:
            lock.close()


def write_whole(file: Path, text: str) -> None:
    """Write `file` so that it is there whole or not at all."""
    new = file.with_name(file.name + ".new")
    new.write_text(text, "utf-8")
    new.rename(file)


def _another(work: Path) -> OutputError:
    return OutputError(
        f"{work}: holds an unfinished training of another model or with other options; give those again, choose "
        "another -o, or --force to start over"
    )


def _worth_keeping(work: Path) -> bool:
    """Whether a training can go on from what is there: a checkpoint, its end, or a rank that was trained."""
    found = ("run/checkpoint-*/whole", "course.json", "rank-*/config.json")
    return any(any(work.glob(name)) for name in found) or any(
        _worth_keeping(part) for part in work.glob("rank-*.training")
    )
