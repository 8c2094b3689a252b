"""The work directory of an analysis: ownership, locking and resuming."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from slicer.checkpoint.reader import Checkpoint
from slicer.errors import OutputError

PARTIAL = ".partial"


def fingerprint(checkpoint: Checkpoint, calibration: Mapping[str, Any], **rest: Any) -> str:
    """Hash of what must be equal for a run to resume another: the weights, the text and `rest`."""
    source = calibration.get("source")
    text = Path(source).stat() if source and Path(source).is_file() else None
    tensors = [
        [key, span.file.name, span.dtype, span.shape, span.start, span.file.stat().st_mtime_ns]
        for key, span in checkpoint.tensors.items()
    ]
    record = [checkpoint.config, tensors, calibration, text and [text.st_size, text.st_mtime_ns], rest]
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def workplace(out: Path, mark: str, rank: int, *, force: bool = False) -> Iterator[Path]:
    """Yield `out/.partial/RANK`, locked for this process, with the files of an earlier run of the same `mark`.

    Raises OutputError if `out` is in use, holds an analysis or an unfinished one with another mark (`force` replaces
    both), or is not an analysis directory.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: not a directory; choose another one with -o")
    partial = out / PARTIAL
    if out.is_dir() and not partial.exists():
        if (out / "analysis.json").exists():
            if not force:
                raise OutputError(
                    f"{out}: already contains an analysis; choose another -o, or --force to replace it"
                )
        elif strange := sorted(p.name for p in out.iterdir()):
            raise OutputError(
                f"{out}: contains {strange[0]}, which is not part of an analysis; choose another directory with -o"
            )
    work = partial / str(rank)
    with contextlib.ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            _lock(stack.enter_context(open(work / "lock", "w")), out)
            _claim(work, mark, out, rank, force)
        except OSError as error:
            raise OutputError(f"{out}: cannot be written ({error.strerror}); choose another -o") from None
        yield work


def _lock(lock: IO[str], out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OutputError(f"{out}: in use by another run; wait or choose another -o") from None


def _claim(work: Path, mark: str, out: Path, rank: int, force: bool) -> None:
    file = work / "run"
    if file.is_file() and file.read_text("utf-8") == mark:
        return
    if file.is_file() and not force:
        raise OutputError(
            f"{out}: contains an unfinished analysis of another source or with other options; "
            "use the same ones, choose another -o, or use --force to start over"
        )
    for old in (*work.iterdir(), *(work.parent.glob("tokens.*") if rank == 0 else ())):
        if old.name != "lock":
            old.unlink()
    file.write_text(mark, "utf-8")
