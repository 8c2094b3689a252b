"""Work directories: ownership, locking, and whether unfinished work may be resumed.

A directory that slicer works in contains the file `SIGN`, with what the directory contains, and its identity: the JSON
values that must be the same for a run to resume the work of another. A directory that is not empty and has no such file
does not belong to slicer: it is never written to, and never removed.

    with claimed(beside(out), Processes.of_environment(), cut=cut.identity, steps=100) as work:
        ...                       # work.path is this run's alone; it is removed at the end, or resumed later
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any

from slicer.errors import OutputError, reason_of
from slicer.runtime.distributed import Processes
from slicer.runtime.files import atomic_file, not_writable, remove_empty, within_disk, write_atomically

if TYPE_CHECKING:
    import torch

SIGN = "slicer-work.json"
_OWN = ".slicer"  # the names of the lock, and of a sign that is being written, start with this
_LOCK = f"{_OWN}.lock"
_TRAINING = "an unfinished training"


def beside(out: Path, kind: str = "training") -> Path:
    """The work directory of the result `out`: a sibling, which is removed when `out` is complete."""
    return out.with_name(f"{out.name}.{kind}")


def lock(file: Path, *, shared: bool = False) -> IO[bytes] | None:
    """`file`, open and locked until it is closed or this process ends, however it ends.

    None if another process has it. Several `shared` locks can be held together; they wait for one that is not shared.
    Raises OSError if the file cannot be opened or the file system has no locks.
    """
    while True:
        opened = open(file, "ab")  # noqa: SIM115
        try:
            fcntl.flock(opened, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                    return opened
        except BaseException as error:
            opened.close()
            if isinstance(error, BlockingIOError):
                return None
            raise
        opened.close()  # the file was removed, and perhaps made again, before it was locked: lock the present one


@dataclass
class Workdir:
    """A directory that slicer works in. `owned` and `claimed` make one for a block; otherwise call `claim` and `close`.

    Attributes:
        path: the directory.
        identity: JSON values that a run must share with the one whose work it resumes.
        what: the contents, for messages, with an article.
        overwrite: whether work of another identity is removed; None: the command has no option for it.
        shared: whether processes of the same identity may use it at the same time.
        resumable: whether there is work that would be lost; if not, another identity needs no `overwrite`.
        removed: glob patterns, within the directory, of what is removed when work starts over.
    """

    path: Path
    identity: Mapping[str, Any]
    what: str = _TRAINING
    overwrite: bool | None = None
    shared: bool = False
    resumable: Callable[[], bool] = lambda: True
    removed: tuple[str, ...] = ("*",)
    _lock: IO[bytes] | None = field(default=None, init=False, repr=False)
    _made: list[Path] = field(default_factory=list, init=False, repr=False)  # directories around it

    def claim(self) -> None:
        """Make the directory, or take it where slicer made it, and lock it.

        Raises OutputError if slicer did not make it, another run is using it, or it holds work of another identity.
        """
        try:
            check_owner(self.path)
            self._made = [parent for parent in self.path.parents if not parent.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / _LOCK)
            alone = self._lock is not None
            if not alone:
                if not self.shared:
                    raise OutputError(
                        f"{self.path}: another run is using it; wait for it, or choose another place with -o"
                    )
                self._lock = lock(self.path / _LOCK, shared=True)
            self._take(alone)
            if self.shared and self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_SH)
                self._take(False)  # changing a lock releases it for a moment
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise not_writable(self.path, error) from None
            raise

    def close(self) -> None:
        """Release the lock: other runs may use the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Remove the directory and all that is in it, and the directories made around it that are empty.

        The sign goes last: what is left after a stop on the way still belongs to slicer.
        """
        others = [entry for entry in self.path.iterdir() if entry.name != SIGN] if self.path.is_dir() else []
        with contextlib.suppress(OSError):
            for entry in others:
                _remove(entry)
            shutil.rmtree(self.path)
        remove_empty(self._made)

    def _take(self, alone: bool) -> None:
        """Check the identity of the work in the directory; with `alone`, start over if that is allowed."""
        found, identity = sign_of(self.path), json.loads(json.dumps(self.identity, default=str))
        if found is not None and found["what"] != self.what:
            raise _of_another(self.path, f"holds {found['what']}")
        if found is not None and found["identity"] != identity:
            if not alone or not (self.overwrite or not self.resumable()):
                key, before, now = _difference(found["identity"], identity)
                again = "" if self.overwrite is None else ", or --overwrite to start over"
                raise OutputError(
                    f"{self.path}: holds {self.what} with {key} {before}, not {now}; give the same options again, "
                    f"choose another place with -o{again}"
                )
            found = None
        if found is None:
            for pattern in self.removed:
                for old in self.path.glob(pattern):
                    if not old.name.startswith(_OWN):
                        _remove(old)
            sign = {"what": self.what, "identity": identity}
            write_atomically(self.path / SIGN, json.dumps(sign, indent=1) + "\n")


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def check_owner(path: Path) -> None:
    """Raise OutputError unless `path` is free for slicer to work in: not there, empty, or with its sign."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: exists and is not a directory; choose another place with -o")
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    # Looked for after the listing: slicer writes the sign before anything else, perhaps at this moment.
    if not all(name.startswith(_OWN) for name in names) and not (path / SIGN).is_file():
        raise _of_another(path, f"already exists and was not created by slicer (no {SIGN} in it)")


def _of_another(path: Path, reason: str) -> OutputError:
    return OutputError(f"{path}: {reason}; move it, or choose another place with -o")


def sign_of(directory: Path) -> dict[str, Any] | None:
    """The content of the sign of `directory`, "what" and "identity"; None if there is no such file.

    Raises OutputError for one that slicer did not write.
    """
    try:
        found = json.loads((directory / SIGN).read_text("utf-8"))
        return {"what": str(found["what"]), "identity": dict(found["identity"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise not_writable(directory, error) from None
    except (ValueError, KeyError, TypeError):
        raise OutputError(
            f"{directory / SIGN}: damaged, or not written by slicer; remove {directory}, or choose another place with "
            "-o"
        ) from None


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """(name, old value, new value) of the first value that differs, as text; of a nested one with both names."""
    key = next(k for k in {**now, **before} if k not in before or k not in now or before[k] != now[k])
    a, b = before.get(key), now.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
        inner, *values = _difference(a, b)
        return f"{key} {inner}", *values
    return key, _spelled(before, key), _spelled(now, key)


def _spelled(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key]) if key in values else "unknown"  # another version of slicer may not record it
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def owned(path: Path, processes: Processes = Processes(), /, **given: Any) -> Iterator[Workdir]:  # noqa: B008 (frozen)
    """Inside the block the first of `processes` holds the lock of `path`, whose identity was checked for all of them.

    `given`: `what`, `overwrite`, `resumable` and `removed` of `Workdir`; the others are its identity. Raises
    OutputError, in every process; DiskFull for a full disk inside the block.
    """
    options = {name: given.pop(name) for name in ("what", "overwrite", "resumable", "removed") if name in given}
    work = Workdir(path, given, **options)
    try:
        processes.first(work.claim)
        with within_disk(path):
            yield work
    finally:
        work.close()


@contextlib.contextmanager
def claimed(path: Path, processes: Processes = Processes(), /, **given: Any) -> Iterator[Workdir]:  # noqa: B008
    """As `owned`, for work whose result is written elsewhere: the directory is removed when the block ends.

    It is kept if the block is interrupted, or fails and there is something to resume.
    """
    with owned(path, processes, **given) as work:
        try:
            yield work
        except Exception:
            if processes.is_first and not work.resumable():
                work.remove()
            raise
        processes.meet()  # the others may still read its files
        if processes.is_first:
            work.remove()


@contextlib.contextmanager
def undamaged(work: Path) -> Iterator[None]:
    """A file of the directory `work` that libraries cannot read, inside the block, is raised as OutputError."""
    from safetensors import SafetensorError

    try:
        yield
    except (json.JSONDecodeError, SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        reason = reason_of(error)[:100]
        raise OutputError(f"{work}: damaged, so it cannot be resumed ({reason}); remove it to start over") from None


class Notebook:
    """Finished values (JSON) under a name each, kept in `file`, or only in memory if that is None."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.values: dict[str, Any] = {}
        if file is not None and file.is_file():
            with contextlib.suppress(ValueError, TypeError):  # damaged: make them again
                self.values = dict(json.loads(file.read_text("utf-8")))

    def take(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned under this name, now or in an earlier run."""
        if name not in self.values:
            self.values[name] = make()
            if self._file is not None:
                write_atomically(self._file, json.dumps(self.values) + "\n")
        return self.values[name]


class Stages:
    """Finished stages of a long computation: tensors and facts (JSON) under a name each, as files in `directory`; None:
    nothing is kept.

    `of`: bytes that must be equal for a run to resume from the stages of another; other stages are removed.
    """

    def __init__(self, directory: Path | None, of: bytes) -> None:
        self._place = None if directory is None else directory / f"stages-{hashlib.sha256(of).hexdigest()[:16]}"
        if directory is not None and self._place is not None:
            for old in directory.glob("stages-*"):
                if old != self._place:
                    shutil.rmtree(old, ignore_errors=True)

    @property
    def kept(self) -> bool:
        """Whether anything is kept."""
        return self._place is not None

    def _file(self, name: str) -> Path | None:
        return None if self._place is None else self._place / f"{name}.safetensors"

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """(tensors, facts) of a finished stage, or None."""
        from safetensors import SafetensorError, safe_open

        file = self._file(name)
        if file is None:
            return None
        try:
            with safe_open(file, "pt") as stored:
                return {key: stored.get_tensor(key) for key in stored.keys()}, json.loads(stored.metadata()["facts"])  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # not there, or damaged: compute it
            return None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Any = None) -> None:
        """Keep a finished stage. Raises OutputError."""
        from safetensors.torch import save_file

        if (file := self._file(name)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as part:
                save_file({k: t.contiguous() for k, t in tensors.items()}, part, {"facts": json.dumps(facts)})
