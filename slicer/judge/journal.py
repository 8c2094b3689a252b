"""Stores the finished cells of a sweep on disk, so that a stopped sweep can resume and several processes can share it.

Each result is one JSON file, written to a temporary file and renamed, so it is never seen partly written. A process
holds a file lock while it works on a cell; the operating system releases it when the process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slicer.errors import OutputError

FORMAT = 1


def write_atomically(file: Path, text: str) -> None:
    """Write `text` to a temporary file beside `file`, then rename it. Raises OutputError."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def began_with(directory: Path) -> Mapping[str, Any]:
    """The settings of the sweep in `directory`; empty if there is none."""
    try:
        found = json.loads((directory / "sweep.json").read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def digest_of(files: Iterable[Path]) -> str | None:
    """Hash of the names and contents of `files`; None if there are none. Raises OutputError."""
    total = hashlib.sha256()
    names = sorted(set(files))
    for file in names:
        try:
            with open(file, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise OutputError(f"{file}: cannot be read ({error.strerror})") from None
        total.update(f"{file.name} {content}\n".encode())
    return total.hexdigest()[:16] if names else None


class Journal:
    """A sweep directory: `sweep.json` (settings), `cells/` (results), locks.

    All cells share `settings`. Raises OutputError if the directory holds a sweep with other settings that has finished
    cells or is open in another process.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self._cells = directory / "cells"
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory}: not a directory; choose another one with -o")
        marker = directory / "sweep.json"
        if directory.is_dir() and any(directory.iterdir()) and not marker.is_file():
            strangers = [
                p.name for p in directory.iterdir() if p.name != "cells" and not p.name.startswith(".")
            ]
            if strangers:
                raise OutputError(f"{directory}: not empty and not a sweep; choose another directory with -o")
        try:
            self._cells.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{directory}: cannot be created ({error.strerror})") from None
        # Shared by all processes of this sweep. If this one is alone and no cell is finished, the settings may change.
        self._held = open(self._cells / ".sweep.lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            anew = not any(self._cells.glob("*.json"))
        except OSError:
            fcntl.flock(self._held, fcntl.LOCK_SH)
            anew = False
        try:
            if marker.is_file() and not anew:
                self._check(marker, settings)
            else:
                write_atomically(
                    marker, json.dumps({"format": FORMAT, "settings": settings}, indent=1) + "\n"
                )
        except OutputError:
            self.close()
            raise
        fcntl.flock(self._held, fcntl.LOCK_SH)

    def close(self) -> None:
        """Release the directory, also for sweeps with other settings."""
        self._held.close()

    def _check(self, marker: Path, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads(marker.read_text("utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(f"{marker}: not a sweep of slicer; choose another directory with -o") from None
        now = json.loads(json.dumps(settings))
        different = [key for key in now if before.get(key) != now[key]]
        if different:
            key = different[0]
            if key not in before:
                raise OutputError(
                    f"{self.directory}: this sweep was started by an earlier version that did not record {key}; "
                    "choose another directory with -o"
                )
            raise OutputError(
                f"{self.directory}: contains a sweep with {key} {_short(before.get(key))}, not {_short(now[key])}; "
                "choose another directory with -o"
            )

    def get(self, name: str) -> dict[str, Any] | None:
        """The finished record `name`, or None."""
        try:
            found = json.loads((self._cells / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        """Store a finished record."""
        write_atomically(self._cells / f"{name}.json", json.dumps(record) + "\n")

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Lock `name` for this process inside the block; yields whether the lock was free."""
        with open(self._cells / f".{name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
