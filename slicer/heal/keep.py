"""`--save-adapter DIR`: the adapter as peft saves it, with its base weights if they would be deleted otherwise.

DIR/adapter_config.json, adapter_model.safetensors
DIR/slicer.json     which base weights it belongs to (`slicer.checkpoint.foundation`)
DIR/base            those weights, if training started from a fold, or from a cut that convert made temporarily
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from slicer.checkpoint.foundation import BASE, note_base
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import OutputError, UsageError
from slicer.progress import Progress
from slicer.runtime.files import atomic_directory, link_or_copy
from slicer.runtime.workdir import beside

_CONFIG = "adapter_config.json"


def _going(out: Path) -> list[Path]:
    """The directories that are removed once `out` is there."""
    return [beside(out, kind) for kind in ("training", "ranks", "cut")]


def check_keeping(place: Path | None, method: str, out: Path, others: Iterable[Path], *, force: bool) -> None:
    """Raise UsageError or OutputError if the adapter of a training for `out` cannot be saved at `place`.

    `others`: the checkpoints it is made from. `force` replaces an existing adapter.
    """
    if place is None:
        return
    if method == "full":
        raise UsageError("--save-adapter: --method full has no adapter; leave it out")
    real = place.resolve()
    for other in (out, *_going(out), *others):
        if real.is_relative_to(other.resolve()) or other.resolve().is_relative_to(real):
            raise OutputError(f"--save-adapter {place}: overlaps {other}; choose another directory")
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise OutputError(f"--save-adapter {place}: not a directory; choose another one")
    if place.is_dir() and any(place.iterdir()):
        if not force:
            raise OutputError(f"--save-adapter {place}: not empty; choose another directory, or use --force")
        if not (place / _CONFIG).is_file():
            raise OutputError(
                f"--save-adapter {place}: --force replaces only adapters, and this has no {_CONFIG}; remove it yourself"
            )
    parent = next(path for path in real.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"--save-adapter {place}: {parent} is not writable; choose another directory")


@contextlib.contextmanager
def keeping(
    place: Path | None, weights: Path | None, base: Checkpoint, out: Path, *, force: bool, progress: Progress
) -> Iterator[None]:
    """Put the adapter `weights`, trained on `base`, at `place` when the block ends without an exception.

    A `base` in one of the work directories of `out`, which go, is kept beside the adapter.
    """
    if place is None or weights is None:
        if place is not None:
            progress.note(f"no adapter saved in {place}: no step was better than the start")
        yield
        return
    with atomic_directory(place, replace=force) as directory:
        shutil.copytree(
            weights, directory, ignore=shutil.ignore_patterns("training_args.bin"), dirs_exist_ok=True
        )
        found = base.path.resolve()
        if any(found.is_relative_to(work.resolve()) for work in _going(out)):
            shutil.copytree(found, directory / BASE, copy_function=link_or_copy)
            found = place.resolve() / BASE
        note_base(directory, base, str(found))
        config = json.loads((directory / _CONFIG).read_text("utf-8"))
        before, config["base_model_name_or_path"] = config.get("base_model_name_or_path"), str(found)
        (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        card = directory / "README.md"
        if before and card.is_file():
            card.write_text(card.read_text("utf-8").replace(before, str(found)), "utf-8")
        yield
