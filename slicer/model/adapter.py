"""Where the products of a LoRA adapter belong in a checkpoint, the merged tensors, and the logits that they must give.

W + (alpha / r) B A is computed in float32 from the stored W and rounded once to its dtype. The adapter is merged into
the full-precision checkpoint, even if it was trained on a quantized one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from slicer.checkpoint import tensors
from slicer.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, Adapter
from slicer.checkpoint.keys import KeyMap
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sublayers import FEED_FORWARD, part_of
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import HealError, reason_of
from slicer.model.layers import is_conv1d, logits_of
from slicer.model.load import build_on_meta, load_model
from slicer.model.verify import Expected, probe_tokens
from slicer.plan.plan import Plan
from slicer.runtime.compat import named_as_loaded, quiet_bitsandbytes
from slicer.runtime.compute import Compute
from slicer.runtime.memory import released


def merged_spans(checkpoint: Checkpoint, adapter: Adapter, places: Iterable[Place]) -> dict[str, TensorSpan]:
    """Raw key -> merged tensor to write in its place."""
    old = checkpoint.tensors
    return {p.key: old[p.key].made(p.key, partial(_merged, old[p.key], adapter, p)) for p in places}


def _merged(span: TensorSpan, adapter: Adapter, place: Place) -> torch.Tensor:
    first, second = (tensors.read(part).float() for part in adapter.pairs[place.origin])
    delta = adapter.scale(place.origin) * (second @ first)
    old = tensors.read(span)
    return (old.float() + (delta.T if place.transposed else delta)).to(old.dtype)


@released()
def adapter_logits(checkpoint: Checkpoint, adapter: Adapter, places: Sequence[Place], compute: Compute) -> Expected:
    """The logits, in float32, of the checkpoint with the adapter: merged by peft and rounded to the stored dtypes, and
    exact, unmerged.

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
        raise HealError("comparing logits needs peft: pip install 'slicer-llm[heal]', or use --verify load") from None
    model = load_model(checkpoint.path, compute, dtype="float32")
    tokens = probe_tokens(model.config.get_text_config().vocab_size)
    pairs = {str(place.module): adapter.pairs[place.origin] for place in places}
    with tempfile.TemporaryDirectory(prefix="slicer-adapter-") as scratch:
        again = {
            f"{PREFIX}{module}.lora_{name}.weight": tensors.read(span)
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
            raise HealError(
                f"{adapter.path}: peft cannot apply it to {checkpoint.path}: {reason_of(error)}; use --verify load to "
                "merge without comparing logits"
            ) from None
        exact = logits_of(adapted.eval(), tokens)
        adapted.merge_adapter(safe_merge=True)
        for place in places:
            weight = model.get_submodule(str(place.module)).base_layer.weight
            weight.data = weight.data.to(tensors.torch_dtype(checkpoint.tensors[place.key].dtype)).float()
        return Expected(tokens, logits_of(adapted, tokens), exact)


@dataclass(frozen=True)
class Place:
    """The checkpoint matrix that one product B A of an adapter changes.

    Attributes:
        origin: the adapter's own module name.
        key: raw key of the matrix in the checkpoint.
        module: the module of the loaded model that holds it; None if it has none of its own, such as an expert that is
            loaded as a slice of one tensor.
        transposed: whether the matrix is stored as [in, out] (GPT-2's Conv1D).
    """

    origin: str
    key: str
    module: str | None
    transposed: bool


def placed(
    checkpoint: Checkpoint, adapter: Adapter, *, renumber: bool = False, trust_remote_code: bool = False
) -> list[Place]:
    """The matrices that the adapter's products change. Raises HealError if the adapter does not fit.

    `renumber`: the layer numbers are those of the unsliced model. They are mapped by the checkpoint's plan, and those
    of dropped layers are left out. The storage layout of each matrix is taken from the model's class.
    """
    plan = Plan.load(checkpoint.path) if renumber else None
    names = KeyMap(checkpoint)
    model = build_on_meta(checkpoint, trust_remote_code=trust_remote_code)[0]
    modules = {
        names.key(f"{name}.weight"): (name, is_conv1d(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = {*ties, *ties.values()}
    found = []
    for origin in adapter.pairs:
        if {f"{origin}.weight", f"{origin.partition('.')[2]}.weight"} & tied:
            raise HealError(
                f"{adapter.path}: target {origin} shares its matrix with the embeddings in {checkpoint.path} "
                "(tie_word_embeddings), so it cannot change alone; train the adapter without it"
            )
        layer = names.layer(f"{origin}.weight")
        if layer is None:
            key = names.key(f"{origin}.weight")
        else:
            index = _index(checkpoint, adapter, plan, *layer)
            if index is None:
                continue
            key = names.in_layer(index, layer[1])
        if key is None or key not in checkpoint.tensors:
            raise HealError(f"{adapter.path}: target {origin} is not in {checkpoint.path}; pass its base model")
        module, transposed = modules.get(key, (None, bool(adapter.config.get("fan_in_fan_out"))))
        first, second = adapter.pairs[origin]
        shape = checkpoint.tensors[key].shape
        wanted = (second.shape[0], first.shape[1])[:: -1 if transposed else 1]
        if shape != wanted or first.shape[0] != second.shape[1]:
            raise HealError(
                f"{adapter.path}: {origin} expects a matrix of shape {list(wanted)}, but {key} has {list(shape)}; "
                "pass its base model"
            )
        if origin in adapter.copies:
            copy, stored = tensors.read(adapter.copies[origin]), tensors.read(checkpoint.tensors[key])
            if not torch.equal(stored.to(copy.dtype), copy):
                raise HealError(
                    f"{adapter.path}: contains the {origin} it was trained on, which differs from {key}; merge with "
                    "peft"
                )
        found.append(Place(origin, key, module, transposed))
    if not found:
        raise HealError(f"{adapter.path}: all its layers were dropped; nothing to merge")
    return found


def _index(checkpoint: Checkpoint, adapter: Adapter, plan: Plan | None, index: int, name: str) -> int | None:
    """The checkpoint's index of the adapter's layer `index`, which contains `name`; None for a dropped layer."""
    if plan is None:
        if index >= checkpoint.depth:
            raise HealError(
                f"{adapter.path}: has layer {index}, but {checkpoint.path} has only {checkpoint.depth} layers; if it "
                "was trained on the unsliced model, use --renumber"
            )
        return index
    if index >= plan.depth:
        raise HealError(
            f"{adapter.path}: has layer {index}, but the source had {plan.depth} layers; pass an adapter of this model"
        )
    behind = part_of(name.partition(".")[0], ()) == FEED_FORWARD
    homes = [pair[behind] for pair in plan.sublayers]  # of a half-offset cut: two layers make one
    return homes.index(index) if index in homes else None
