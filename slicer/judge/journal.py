"""Finished work kept on disk, so that a killed run goes on where it was: one file for each piece, written at once."""

from __future__ import annotations

import os
from pathlib import Path

from slicer.errors import OutputError


def write_atomically(file: Path, text: str) -> None:
    """Write `text` beside `file` and rename: a reader, or a kill, sees all of it or the old one. Raises OutputError."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
