"""Records which base weights an adapter was trained on and checks this before merging.

peft records only the path of the base. A cut that was folded before training has the tensor names and shapes of the
bare cut, so an adapter on the wrong one of the two would load and give wrong results without an error.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from slicer.checkpoint import tensors
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError

FILE = "slicer.json"
BASE = "base"  # directory with the base weights beside the adapter, if they exist nowhere else
_BEGINNING = 1 << 20  # bytes of each tensor that are hashed


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 (hexadecimal) of the names, dtypes, shapes and first bytes of all tensors."""
    found = hashlib.sha256()
    for key, span in sorted(checkpoint.tensors.items()):
        found.update(json.dumps([key, span.dtype, span.shape]).encode())
        found.update(next(tensors.chunks(span, span.dtype), b"")[:_BEGINNING])
    return found.hexdigest()


def note_base(adapter: Path, base: Checkpoint, place: str) -> None:
    """Record beside the adapter that it was trained on the weights of `base`, which are stored at `place`."""
    record = {"base": place, "digest": digest(base)}
    (adapter / FILE).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def check_base(adapter: Path, checkpoint: Checkpoint) -> None:
    """Raise HealError if slicer trained `adapter` on other weights than those of `checkpoint`."""
    file = adapter / FILE
    if not file.is_file():
        return
    try:
        record = json.loads(file.read_text("utf-8"))
        place, wanted = str(record["base"]), record["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise HealError(f"{file}: cannot be read; remove it to merge without this check") from None
    if wanted != digest(checkpoint):
        base = adapter / BASE if (adapter / BASE / "config.json").is_file() else place
        raise HealError(
            f"{adapter}: was not trained on the weights of {checkpoint.path}; merge it into {base}"
        )
