"""`slicer merge`: merges a LoRA adapter into a checkpoint, tensor by tensor; loads a model only to verify.

W + (alpha / r) B A is computed in float32 from the stored W and rounded once to its dtype; all other tensors are
copied. The adapter is merged into the full-precision checkpoint, even if it was trained on a quantized one.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slicer.checkpoint import hub
from slicer.checkpoint.adapter import Adapter, check_base
from slicer.checkpoint.export import check_output, copy_unchanged
from slicer.checkpoint.reader import Checkpoint, refuse_quantized
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES
from slicer.errors import HealError, UsageError
from slicer.model import verify
from slicer.model.adapter import check_merged, merged_spans, placed, reference_logits
from slicer.plan.plan import Plan
from slicer.plan.records import MergeRecord
from slicer.progress import Progress
from slicer.runtime.files import atomic_directory, check_space
from slicer.runtime.memory import fits


@dataclass(frozen=True)
class Merged:
    """Result of `merge`: changed tensors, adapter modules left out, logits errors (see `check_merged`)."""

    out: Path
    tensors: tuple[str, ...]
    left_out: int
    verified: str
    logits_error: float | None = None
    rounding_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "tensors": list(self.tensors),
            "left_out": self.left_out,
            "verified": self.verified,
            "logits_error": self.logits_error,
            "rounding_error": self.rounding_error,
        }


def merge(
    source: str,
    adapter_path: Path,
    out: Path,
    *,
    renumber: bool = False,
    check: str = "auto",
    device: str = "auto",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merge the adapter into the checkpoint `source` and write the result to `out`, atomically.

    `renumber`: the adapter was trained on the unsliced model; its layer numbers are mapped by the checkpoint's plan,
    and those of dropped layers are left out. Raises HealError if the adapter does not fit, other SlicerErrors.
    """
    if check not in ("auto", "none", "load", "logits"):
        raise UsageError(f"verify {check!r}: choose from auto, none, load, logits")
    progress = progress or Progress()
    progress.stage("Opening the checkpoint and the adapter")
    checkpoint = Checkpoint.open(hub.resolve(source).path)
    refuse_quantized(checkpoint)
    if not renumber:
        check_base(adapter_path, checkpoint)
    adapter = Adapter.open(adapter_path)
    check_output(out, checkpoint.path, force=force)
    places = placed(checkpoint, adapter, renumber=renumber, trust_remote_code=trust_remote_code)
    replaced = merged_spans(checkpoint, adapter, places)
    check_space(out, checkpoint.total_bytes)
    checked = check if check != "auto" else "logits" if fits(4 * checkpoint.parameters, device) else "load"
    probe = None
    if checked == "logits":
        progress.stage("Reference logits of the checkpoint with the adapter")
        try:
            probe = reference_logits(checkpoint, adapter, places, device, trust_remote_code)
        except HealError as error:
            if check != "auto":
                raise
            progress.note(f"checking keys and shapes only, not logits: {error}")
            checked = "load"
        gc.collect()
    done = Merged(out, tuple(sorted(replaced)), len(adapter.pairs) - len(places), checked)
    with atomic_directory(out, replace=force) as directory:
        progress.stage("Merging", checkpoint.total_bytes, "bytes")
        copy_unchanged(
            checkpoint,
            directory,
            replaced=replaced,
            max_shard_bytes=max_shard_bytes,
            progress=progress.advance,
        )
        if checked != "none":
            progress.stage("Checking every key and shape")
            verify.check_load(directory, trust_remote_code=trust_remote_code)
        if probe is not None:
            progress.stage("Comparing logits")
            same, rounding = check_merged(
                checkpoint, directory, probe, device=device, trust_remote_code=trust_remote_code
            )
            done = replace(done, logits_error=same, rounding_error=rounding)
        _record(checkpoint, adapter, done, directory, renumber, command)
    return done


def _record(
    checkpoint: Checkpoint,
    adapter: Adapter,
    done: Merged,
    directory: Path,
    renumber: bool,
    command: str | None,
) -> None:
    """What was merged, in the plan where there is one, after what was merged before; and in the card."""
    record = MergeRecord(
        adapter=str(adapter.path),
        sha256=adapter.sha256,
        base_model=adapter.config.get("base_model_name_or_path"),
        renumber=renumber,
        tensors=done.tensors,
        verified=done.verified,
        logits_error=done.logits_error,
        rounding_error=done.rounding_error,
        command=command,
    )
    if (directory / "slicer" / "plan.json").is_file():
        plan = Plan.load(directory)
        merged = replace(plan, merged=(*plan.merged, record))
        (directory / "slicer" / "plan.json").write_text(merged.to_json(), "utf-8")
    card = checkpoint.path / "README.md"
    if card.is_file():
        text = card.read_text("utf-8")
        text += f"\nA LoRA adapter was merged into {len(done.tensors)} of its matrices with slicer.\n"
        (directory / "README.md").write_text(text, "utf-8")
