"""What a training gives: the tensors of the base that change, the logits they must give, and the saved adapter.

`--save-adapter DIR` saves it as peft does, with its base weights if they would be deleted otherwise:

    DIR/adapter_config.json, adapter_model.safetensors
    DIR/slicer.json     which base weights it belongs to (`slicer.checkpoint.adapter`)
    DIR/base            those weights, if training started from weights in a work directory
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from slicer.checkpoint.adapter import BASE, CONFIG, Adapter, note_base
from slicer.checkpoint.export import check_replaceable
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import HealError, OutputError, UsageError
from slicer.heal.finetune.settings import TrainingSettings
from slicer.model.adapter import adapter_logits, merged_spans, placed
from slicer.model.trained import homes_of, spans_of, trained_logits
from slicer.model.verify import Expected
from slicer.progress import Progress
from slicer.runtime.compute import Compute
from slicer.runtime.files import atomic_directory, link_or_copy
from slicer.runtime.workdir import beside


def result_of(
    base: Checkpoint,
    weights: Path | None,
    settings: TrainingSettings,
    compute: Compute,
    verify: str,
    progress: Progress,
) -> tuple[dict[str, TensorSpan], Expected | None]:
    """(raw key of `base` -> the tensor to write, the logits that the result must have).

    `weights`: directory of the trained weights; None: none were better than those of the base. `verify`: "none" and
    "load": no logits; "logits"; "auto": logits unless peft cannot apply the adapter. Raises HealError for "logits" if
    it cannot, and for weights that do not fit the base.
    """
    if weights is None:
        return {}, None
    if compared := verify in ("auto", "logits"):
        progress.stage("Reference logits of the trained weights")
    if settings.asked.method == "full":
        trained = Checkpoint.open(weights)
        homes = homes_of(base, trust_remote_code=compute.trust_remote_code)
        expected = trained_logits(base, trained, homes, compute) if compared else None
        return spans_of(base, trained, homes), expected
    adapter = Adapter.open(weights)
    places = placed(base, adapter, trust_remote_code=compute.trust_remote_code)
    spans = merged_spans(base, adapter, places)
    try:
        return spans, adapter_logits(base, adapter, places, compute) if compared else None
    except HealError as error:
        if verify == "logits":
            raise
        progress.note(f"checking keys and shapes only, not logits: {error}")
        return spans, None


def _work_directories(out: Path) -> list[Path]:
    """The directories that are removed once `out` is there."""
    return [beside(out, kind) for kind in ("training", "ranks", "cut")]


def check_adapter_output(
    directory: Path | None, method: str, out: Path, sources: Iterable[Path], *, overwrite: bool
) -> None:
    """Raise UsageError or OutputError if the adapter of a training for `out` cannot be saved in `directory`.

    `sources`: the checkpoints it is made from. `overwrite` replaces an existing adapter.
    """
    if directory is None:
        return
    option = f"--save-adapter {directory}"
    if method == "full":
        raise UsageError("--save-adapter: --method full has no adapter; leave it out")
    real = directory.resolve()
    for other in (out, *_work_directories(out), *sources):
        if real.is_relative_to(other.resolve()) or other.resolve().is_relative_to(real):
            raise OutputError(f"{option}: overlaps {other}; choose another directory")
    check_replaceable(directory, "adapters", CONFIG, overwrite=overwrite, name=option)
    parent = next(path for path in real.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{option}: {parent} is not writable; choose another directory")


def save_adapter(directory: Path, weights: Path | None, base: Checkpoint, out: Path, progress: Progress) -> None:
    """Save the adapter `weights`, trained on `base`, in `directory`, whole or not at all, replacing what is there.

    Called when the checkpoint is in place at `out`. A `base` in one of the work directories of `out`, which are
    removed, is kept beside the adapter.
    """
    if weights is None:
        progress.note(f"no adapter saved in {directory}: no step was better than the start")
        return
    with atomic_directory(directory, replace=True) as new:
        shutil.copytree(weights, new, ignore=shutil.ignore_patterns("training_args.bin"), dirs_exist_ok=True)
        path = base.path.resolve()
        if any(path.is_relative_to(work.resolve()) for work in _work_directories(out)):
            shutil.copytree(path, new / BASE, copy_function=link_or_copy)
            path = directory.resolve() / BASE
        note_base(new, base, str(path))
        config = json.loads((new / CONFIG).read_text("utf-8"))
        before, config["base_model_name_or_path"] = config.get("base_model_name_or_path"), str(path)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        card = new / "README.md"
        if before and card.is_file():
            card.write_text(card.read_text("utf-8").replace(before, str(path)), "utf-8")
