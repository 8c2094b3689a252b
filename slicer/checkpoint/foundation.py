"""Which weights an adapter stands on: a small file beside one that slicer trained, and a look at it before a merge.

peft knows an adapter's base by its path alone. A cut that was folded before it was trained has the names and shapes of
the bare cut, so an adapter put on the wrong one of the two fits, and gives another model without a word.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from slicer.checkpoint import tensors
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError

FILE = "slicer.json"
BASE = "base"  # beside the adapter, where its base would be gone otherwise
_BEGINNING = 1 << 20  # bytes of each tensor


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the names, dtypes, shapes and beginnings of all tensors, in hexadecimal."""
    found = hashlib.sha256()
    for key, span in sorted(checkpoint.tensors.items()):
        found.update(json.dumps([key, span.dtype, span.shape]).encode())
        found.update(next(tensors.chunks(span, span.dtype), b"")[:_BEGINNING])
    return found.hexdigest()


def note_base(adapter: Path, base: Checkpoint, place: str) -> None:
    """Write beside the adapter what it was trained on: the weights of `base`, which are to be found at `place`."""
    record = {"base": place, "digest": digest(base)}
    (adapter / FILE).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def check_base(adapter: Path, checkpoint: Checkpoint) -> None:
    """Raise HealError where slicer trained `adapter` on other weights than those of `checkpoint`."""
    file = adapter / FILE
    if not file.is_file():
        return
    try:
        record = json.loads(file.read_text("utf-8"))
        place, wanted = str(record["base"]), record["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise HealError(f"{file}: cannot be read; remove it to merge the adapter unchecked") from None
    if wanted != digest(checkpoint):
        base = adapter / BASE if (adapter / BASE / "config.json").is_file() else place
        raise HealError(
            f"{adapter}: was trained on other weights than those of {checkpoint.path}; merge it into {base}"
        )
