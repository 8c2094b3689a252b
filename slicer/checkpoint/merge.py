"""`slicer merge`: a checkpoint and a LoRA adapter -> a checkpoint, tensor by tensor, no model in memory but to verify.

W + (alpha / r) B A is computed in float32 from the stored W and rounded once to its dtype; all other tensors are
copied. The adapter goes into the full-precision checkpoint, whatever it was trained on.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint import architectures, hub, verify
from slicer.checkpoint import tensors as stored
from slicer.checkpoint.export import check_output, copy_unchanged, refuse_quantized
from slicer.checkpoint.foundation import check_base
from slicer.checkpoint.model import load_model
from slicer.checkpoint.reader import Checkpoint, TensorSpan, read_header
from slicer.checkpoint.sublayers import FEED_FORWARD, part_of
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES, atomic_directory, check_space
from slicer.errors import HealError, SlicerError, UsageError, VerificationError
from slicer.plan import Plan
from slicer.progress import Progress

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# How far logits may be apart, of their largest, all computed in float32: from those of the same weights (a sum rounded
# the other way now and then); and from those of the adapter, since the merged weights are stored in this dtype.
SAME = 1e-4
ROUNDING = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-2, "BF16": 5e-2}
_REFUSED = {  # what changes the arithmetic beyond W + s B A, and how to tell
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "lora_bias": "adapters with a bias",
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk. `pairs`: target module, as in the model it was trained on -> (A [r, in], B [out, r])."""

    path: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[TensorSpan, TensorSpan]]

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Read the config and the header. Raises HealError for what is no adapter, or one of another kind than LoRA."""
        try:
            config = json.loads((path / CONFIG).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise HealError(
                f"{path}: no readable {CONFIG} ({error}); give a directory that peft saved"
            ) from None
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise HealError(f"{path}: not a LoRA adapter; only LoRA can be merged")
        for field, words in _REFUSED.items():
            if config.get(field):
                raise HealError(
                    f"{path}: {words} ({field}) cannot be merged tensor by tensor; merge with peft"
                )
        if config.get("bias", "none") != "none":
            raise HealError(
                f"{path}: trained biases (bias: {config['bias']}) cannot be merged; train with none"
            )
        if not (path / WEIGHTS).is_file():
            raise HealError(f"{path}: no {WEIGHTS}; save the adapter as safetensors")
        spans = read_header(path / WEIGHTS)[0]
        pairs: dict[str, tuple[TensorSpan, TensorSpan]] = {}
        for key, span in spans.items():
            match = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key)
            if match is None:
                raise HealError(f"{path}: tensor {key} is no part of a linear layer's LoRA; merge with peft")
            if match[2] == "A":
                other = spans.get(f"{match[1]}.lora_B.weight")
                if other is None:
                    raise HealError(f"{path}: {match[1]} has an A without its B; save the adapter again")
                pairs[match[1].removeprefix(_PREFIX)] = (span, other)
        if not pairs:
            raise HealError(f"{path}: holds no adapter weights; save the adapter again")
        return cls(path, config, pairs)

    def scale(self, module: str) -> float:
        """alpha / r of a target module (alpha / sqrt(r) with rsLoRA)."""
        rank = self.pairs[module][0].shape[0]
        return self.alpha(module) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def alpha(self, module: str) -> float:
        """alpha of a target module: of the first pattern that ends its name, as in peft, or the common one."""
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(self.config.get("lora_alpha", 8))


@dataclass(frozen=True)
class Merged:
    """What `merge` did: the tensors changed, the adapter's modules left out, the check (see `check_merged`)."""

    out: Path
    tensors: tuple[str, ...]
    left_out: int
    verified: str
    logits_error: float | None
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
    """What a merged checkpoint's logits are compared with, in float32 arithmetic.

    Attributes:
        tokens: int64 [batch, seq].
        exact: logits [batch, seq, V] of the weights before anything is rounded: the base and the adapter apart.
        rounded: logits of the merged weights, rounded to the dtype they are stored in.
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
    progress: Progress | None = None,
) -> Merged:
    """Merge the adapter into the checkpoint `source` and write the result to `out`, whole or not at all.

    With `renumber` the adapter was trained on the unsliced model: its layers are counted anew by the checkpoint's
    plan, and those of dropped layers are left out. Raises HealError where the adapter does not fit.
    """
    if check not in ("auto", "none", "load", "logits"):
        raise UsageError(f"verify {check!r}: choose auto, none, load or logits")
    progress = progress or Progress()
    progress.stage("Opening the checkpoint and the adapter")
    checkpoint = Checkpoint.open(hub.resolve(source).path)
    refuse_quantized(checkpoint)
    if not renumber:
        check_base(adapter_path, checkpoint)
    adapter = Adapter.open(adapter_path)
    check_output(out, checkpoint.path, force=force)
    modules = placed(checkpoint, adapter, renumber)
    replaced = merged_spans(checkpoint, adapter, modules)
    check_space(out, checkpoint.total_bytes)
    fits = verify.fits_in_memory(4 * checkpoint.parameters, device)
    checked = check if check != "auto" else "logits" if fits else "load"
    probe = None
    if checked == "logits":
        progress.stage("Reference logits of the checkpoint with the adapter on")
        probe = reference_logits(checkpoint, adapter, modules, device, trust_remote_code)
        gc.collect()
    errors: tuple[float | None, float | None] = None, None
    with atomic_directory(out, replace=force) as directory:
        progress.stage("Merging", checkpoint.total_bytes, "bytes")
        copy_unchanged(
            checkpoint,
            directory,
            replaced=replaced,
            max_shard_bytes=max_shard_bytes,
            progress=progress.advance,
        )
        _record(checkpoint, adapter, directory, sorted(replaced))
        if checked != "none":
            progress.stage("Checking every key and shape")
            verify.check_load(directory, trust_remote_code=trust_remote_code)
        if probe is not None:
            progress.stage("Comparing logits")
            errors = check_merged(
                checkpoint, directory, probe, device=device, trust_remote_code=trust_remote_code
            )
    return Merged(out, tuple(sorted(replaced)), len(adapter.pairs) - len(modules), checked, *errors)


def merged_spans(
    checkpoint: Checkpoint, adapter: Adapter, modules: Mapping[str, tuple[str, str]]
) -> dict[str, TensorSpan]:
    """Raw key -> the merged tensor that is written in its place; `modules` as of `placed`."""
    return {
        key: checkpoint.tensors[key].made(key, partial(_merged, checkpoint.tensors[key], adapter, origin))
        for key, origin in modules.values()
    }


def placed(checkpoint: Checkpoint, adapter: Adapter, renumber: bool = False) -> dict[str, tuple[str, str]]:
    """Module in the checkpoint's numbering -> (its raw key, the adapter's own module). Raises HealError."""
    plan = Plan.load(checkpoint.path) if renumber else None
    found = {}
    for origin in adapter.pairs:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..+)", origin)
        module = origin
        if match is not None:
            index = int(match[2])
            if plan is not None:
                if index >= plan.depth:
                    raise HealError(
                        f"{adapter.path}: has a layer {index}, but the source had {plan.depth}; it is another model's"
                    )
                name = match[3].split(".")[1]
                homes = [
                    pair[part_of(name, ()) == FEED_FORWARD] for pair in plan.parts
                ]  # of a half-offset cut: two
                if index not in homes:
                    continue
                module = f"{match[1]}{homes.index(index)}{match[3]}"
            elif index >= checkpoint.depth:
                raise HealError(
                    f"{adapter.path}: has a layer {index}, but {checkpoint.path} has {checkpoint.depth} layers; if it "
                    "was trained on the unsliced model, give --renumber"
                )
        key = key_of(checkpoint, module)
        if key is None:
            raise HealError(f"{adapter.path}: its target {module} is not in {checkpoint.path}; wrong model?")
        first, second = adapter.pairs[origin]
        shape = checkpoint.tensors[key].shape
        wanted = (second.shape[0], first.shape[1])
        if _transposed(adapter):
            wanted = wanted[::-1]
        if shape != wanted or first.shape[0] != second.shape[1]:
            raise HealError(
                f"{adapter.path}: its {module} is for a matrix of shape {list(wanted)}, but {key} has {list(shape)}; "
                "the adapter is for another model"
            )
        found[module] = (key, origin)
    if not found:
        raise HealError(f"{adapter.path}: all its layers were dropped; nothing to merge")
    return found


def quiet() -> None:
    """Keep bitsandbytes, which peft imports, from speaking of kernels that it can do without."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def key_of(checkpoint: Checkpoint, module: str) -> str | None:
    """The raw key of the matrix of a module of the loaded model, which may stand under other prefixes than on disk."""
    names = [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
    match = re.fullmatch(r".*?\.(\d+)\.(.+)", module)
    if match is not None:
        names.append(f"{checkpoint.layer_prefix}{match[1]}.{match[2]}.weight")
    return next((name for name in names if name in checkpoint.tensors), None)


def _transposed(adapter: Adapter) -> bool:
    return bool(adapter.config.get("fan_in_fan_out"))


def _merged(span: TensorSpan, adapter: Adapter, module: str) -> torch.Tensor:
    first, second = (stored.read(part).float() for part in adapter.pairs[module])
    delta = adapter.scale(module) * (second @ first)
    old = stored.read(span)
    return (old.float() + (delta.T if _transposed(adapter) else delta)).to(old.dtype)


def reference_logits(
    checkpoint: Checkpoint,
    adapter: Adapter,
    modules: Mapping[str, tuple[str, str]],
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Probe:
    """The logits of the checkpoint with the adapter put on by peft, and merged by it; all in float32 arithmetic."""
    quiet()
    from peft import PeftModel
    from safetensors.torch import save_file

    model = load_model(checkpoint.path, dtype="float32", device=device, trust_remote_code=trust_remote_code)
    vocabulary = architectures.text_config(checkpoint.config).get("vocab_size") or model.config.vocab_size
    tokens = verify.probe_tokens(vocabulary)
    with tempfile.TemporaryDirectory(prefix="slicer-adapter-") as scratch:
        again = {}
        for module, (_, origin) in modules.items():
            for name, span in zip(("A", "B"), adapter.pairs[origin], strict=True):
                again[f"{_PREFIX}{module}.lora_{name}.weight"] = stored.read(span)
        save_file(again, Path(scratch) / WEIGHTS)
        config = {
            **adapter.config,
            "target_modules": sorted(modules),
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": {m: adapter.pairs[o][0].shape[0] for m, (_, o) in modules.items()},
            "alpha_pattern": {m: adapter.alpha(o) for m, (_, o) in modules.items()},
        }
        (Path(scratch) / CONFIG).write_text(json.dumps(config), "utf-8")
        try:
            adapted = PeftModel.from_pretrained(model, scratch)
        except Exception as error:  # peft raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise HealError(f"{adapter.path}: peft cannot put it on {checkpoint.path}: {reason}") from None
        exact = verify.logits_of(adapted.eval(), tokens)
        adapted.merge_adapter(safe_merge=True)
        for module, (key, _) in modules.items():
            weight = model.get_submodule(module).base_layer.weight
            weight.data = weight.data.to(stored.torch_dtype(checkpoint.tensors[key].dtype)).float()
        return Probe(tokens, exact, verify.logits_of(adapted, tokens))


def check_merged(
    checkpoint: Checkpoint,
    directory: Path,
    probe: Probe,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[float, float]:
    """Compare the logits of the merged checkpoint in `directory`, in float32 arithmetic, with those of `probe`.

    Returns max |a - b| / max |b| twice: from the same weights merged by peft and rounded, which says whether the merge
    is right (at most `SAME`), and from the adapter beside the base, which says what is lost by storing the merged
    weights in their dtype (at most `ROUNDING`). Raises VerificationError.
    """
    try:
        model = load_model(directory, dtype="float32", device=device, trust_remote_code=trust_remote_code)
    except SlicerError as error:
        raise VerificationError(f"the written checkpoint does not load: {error}") from None
    logits = verify.logits_of(model, probe.tokens)
    same = verify.compare_logits(logits, probe.rounded, SAME)
    widest = max(
        (span.dtype for span in checkpoint.tensors.values()), key=lambda name: ROUNDING.get(name, 0.0)
    )
    return same, verify.compare_logits(logits, probe.exact, ROUNDING.get(widest, 1e-5))


def _record(checkpoint: Checkpoint, adapter: Adapter, directory: Path, tensors: list[str]) -> None:
    """What was merged, in the plan where there is one, and in the card."""
    record = {
        "method": "merge",
        "adapter": str(adapter.config.get("base_model_name_or_path") or ""),
        "tensors": tensors,
    }
    if (directory / "slicer" / "plan.json").is_file():
        plan = Plan.load(directory)
        merged = replace(plan, merged=record)
        (directory / "slicer" / "plan.json").write_text(merged.to_json(), "utf-8")
    card = checkpoint.path / "README.md"
    if card.is_file():
        text = card.read_text("utf-8")
        text += f"\nA LoRA adapter was merged into {len(tensors)} of its matrices with slicer.\n"
        (directory / "README.md").write_text(text, "utf-8")
