"""`slicer merge`: merges a LoRA adapter into a checkpoint, tensor by tensor; loads a model only to verify.

W + (alpha / r) B A is computed in float32 from the stored W and rounded once to its dtype; all other tensors are
copied. The adapter is merged into the full-precision checkpoint, even if it was trained on a quantized one.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint import architectures, hub, verify
from slicer.checkpoint import tensors as stored
from slicer.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, Adapter, Place, placed
from slicer.checkpoint.export import check_output, copy_unchanged, refuse_quantized
from slicer.checkpoint.foundation import check_base
from slicer.checkpoint.model import load_model
from slicer.checkpoint.reader import Checkpoint, TensorSpan
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES
from slicer.errors import HealError, SlicerError, UsageError, VerificationError
from slicer.plan.plan import Plan
from slicer.plan.records import MergeRecord
from slicer.progress import Progress
from slicer.runtime.compat import named_as_loaded, quiet_bitsandbytes
from slicer.runtime.files import atomic_directory, check_space
from slicer.runtime.memory import fits

# Maximum differences of logits relative to the largest, in float32: from the same weights (order of summation), and
# from the unmerged adapter, because the merged weights are stored in this dtype.
SAME = 1e-4
ROUNDING = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-2, "BF16": 5e-2}


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


@dataclass(frozen=True)
class Probe:
    """Reference logits for a merged checkpoint, computed in float32.

    Attributes:
        tokens: int64 [batch, seq].
        exact: logits [batch, seq, V] of base and adapter, unmerged and unrounded.
        rounded: logits of the merged weights, rounded to their stored dtype.
    """

    tokens: torch.Tensor
    exact: torch.Tensor
    rounded: torch.Tensor


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


def merged_spans(checkpoint: Checkpoint, adapter: Adapter, places: Iterable[Place]) -> dict[str, TensorSpan]:
    """Raw key -> merged tensor to write in its place."""
    return {
        place.key: span.made(place.key, partial(_merged, span, adapter, place))
        for place in places
        for span in (checkpoint.tensors[place.key],)
    }


def _merged(span: TensorSpan, adapter: Adapter, place: Place) -> torch.Tensor:
    first, second = (stored.read(part).float() for part in adapter.pairs[place.origin])
    delta = adapter.scale(place.origin) * (second @ first)
    old = stored.read(span)
    return (old.float() + (delta.T if place.transposed else delta)).to(old.dtype)


def reference_logits(
    checkpoint: Checkpoint,
    adapter: Adapter,
    places: Sequence[Place],
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Probe:
    """Logits of the checkpoint with the adapter applied by peft, and with it merged by peft; in float32.

    Raises HealError if peft cannot apply it to the loaded model.
    """
    for place in places:
        if place.module is None:
            raise HealError(
                f"{adapter.path}: the loaded model has no separate module for {place.key}, so peft cannot apply the "
                "adapter; use --verify load to merge without comparing logits"
            )
    quiet_bitsandbytes()
    try:
        from peft import PeftModel
    except ImportError:
        raise HealError(
            "comparing logits needs peft: pip install 'slicer-llm[heal]', or use --verify load"
        ) from None
    from safetensors.torch import save_file

    model = load_model(checkpoint.path, dtype="float32", device=device, trust_remote_code=trust_remote_code)
    vocabulary = architectures.text_config(checkpoint.config).get("vocab_size") or model.config.vocab_size
    tokens = verify.probe_tokens(vocabulary)
    pairs = {str(place.module): adapter.pairs[place.origin] for place in places}
    with tempfile.TemporaryDirectory(prefix="slicer-adapter-") as scratch:
        again = {
            f"{PREFIX}{module}.lora_{name}.weight": stored.read(span)
            for module, pair in pairs.items()
            for name, span in zip(("A", "B"), pair, strict=True)
        }
        save_file(again, Path(scratch) / WEIGHTS)
        config = {  # omit the adapter's initialisation and exclusions, which no longer matter
            "peft_type": "LORA",
            "init_lora_weights": True,
            "target_modules": sorted(pairs),
            "rank_pattern": {module: pair[0].shape[0] for module, pair in pairs.items()},
            "alpha_pattern": {str(place.module): adapter.alpha(place.origin) for place in places},
            "use_rslora": bool(adapter.config.get("use_rslora")),
            "fan_in_fan_out": any(place.transposed for place in places),
            "inference_mode": True,
        }
        (Path(scratch) / CONFIG).write_text(json.dumps(config), "utf-8")
        try:
            with named_as_loaded():
                adapted = PeftModel.from_pretrained(model, scratch)
            missing = sorted(module for module in pairs if not hasattr(model.get_submodule(module), "lora_A"))
            if missing:
                raise ValueError(f"it skips {missing[0]}")
        except Exception as error:  # peft raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise HealError(
                f"{adapter.path}: peft cannot apply it to {checkpoint.path}: {reason}; use --verify load to merge "
                "without comparing logits"
            ) from None
        exact = verify.logits_of(adapted.eval(), tokens)
        adapted.merge_adapter(safe_merge=True)
        for place in places:
            weight = model.get_submodule(str(place.module)).base_layer.weight
            weight.data = weight.data.to(stored.torch_dtype(checkpoint.tensors[place.key].dtype)).float()
        return Probe(tokens, exact, verify.logits_of(adapted, tokens))


def check_merged(
    checkpoint: Checkpoint,
    directory: Path,
    probe: Probe,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[float, float]:
    """Compare the logits of the merged checkpoint in `directory` with those of `probe`, in float32.

    Returns max |a - b| / max |b| from the weights merged and rounded by peft (at most `SAME`, else the merge is wrong),
    and from the unmerged adapter (the error of rounding; at most `ROUNDING`, but reported only for a mixture of
    experts, where a tiny difference may change the router's choice). Raises VerificationError.
    """
    try:
        model = load_model(directory, dtype="float32", device=device, trust_remote_code=trust_remote_code)
    except SlicerError as error:
        raise VerificationError(f"the written checkpoint does not load: {error}") from None
    logits = verify.logits_of(model, probe.tokens)
    same = verify.compare_logits(logits, probe.rounded, SAME)
    limit = max(ROUNDING.get(span.dtype, 1e-5) for span in checkpoint.tensors.values())
    if any("expert" in key for key in checkpoint.tensors):
        limit = math.inf
    return same, verify.compare_logits(logits, probe.exact, limit)


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
