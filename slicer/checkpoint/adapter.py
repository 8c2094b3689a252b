"""A LoRA adapter on disk, as peft saves it: its checks, and the checkpoint matrices that it changes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicer.checkpoint import tensors as stored
from slicer.checkpoint.model import build_on_meta, meta_tensors
from slicer.checkpoint.names import Names
from slicer.checkpoint.reader import Checkpoint, TensorSpan, read_header
from slicer.checkpoint.sublayers import FEED_FORWARD, part_of
from slicer.errors import HealError
from slicer.plan.plan import Plan

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # prefix of every tensor name in the file
_REFUSED = {  # features that change more than W + s B A, and the test for each
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "Monte Carlo LoRA",
    "arrow_config": "Arrow's routing",
    "modules_to_save": "whole modules saved with the adapter",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "lora_bias": "adapters with a bias",
}
# Values of init_lora_weights that change W itself before training, so that s B A belongs to another W.
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")  # peft can convert these to plain adapters
_CHANGES_BASE = (*_CONVERTIBLE, "loftq")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        pairs: target module, as named in the model it was trained on -> (A [r, in], B [out, r]).
        copies: target module -> the base matrix it was trained on, which peft saves for an output head.
    """

    path: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[TensorSpan, TensorSpan]]
    copies: Mapping[str, TensorSpan]

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Read the config and the header. Raises HealError if it is not an adapter, or does more than W + s B A."""
        try:
            config = json.loads((path / CONFIG).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise HealError(
                f"{path}: no readable {CONFIG} ({error}); pass a directory saved by peft"
            ) from None
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise HealError(f"{path}: not a LoRA adapter; only LoRA can be merged")
        _check_plain(path, config)
        if not (path / WEIGHTS).is_file():
            raise HealError(f"{path}: no {WEIGHTS}; save the adapter as safetensors")
        halves: dict[str, dict[str, TensorSpan]] = {}
        copies: dict[str, TensorSpan] = {}
        for key, span in read_header(path / WEIGHTS)[0].items():
            match = re.fullmatch(r"(.+)\.(?:lora_(A|B)|base_layer)\.weight", key)
            if match is None or len(span.shape) != 2:  # convolutions have four dimensions
                raise HealError(f"{path}: tensor {key} is not the LoRA of a linear layer; merge with peft")
            module = match[1].removeprefix(PREFIX)
            if match[2] is None:
                copies[module] = span
            else:
                halves.setdefault(module, {})[match[2]] = span
        for module, found in halves.items():
            if len(found) < 2:
                there = next(iter(found))
                other = "B" if there == "A" else "A"
                raise HealError(f"{path}: {module} has {there} but not {other}; save the adapter again")
        if not halves:
            raise HealError(f"{path}: no adapter weights; save the adapter again")
        pairs = {module: (found["A"], found["B"]) for module, found in halves.items()}
        return cls(path, config, pairs, copies)

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights file."""
        with open(self.path / WEIGHTS, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def scale(self, module: str) -> float:
        """alpha / r of a target module (alpha / sqrt(r) for rsLoRA)."""
        rank = self.pairs[module][0].shape[0]
        return self.alpha(module) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def alpha(self, module: str) -> float:
        """alpha of a target module: that of the first matching pattern, as in peft, else the common one."""
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(self.config.get("lora_alpha", 8))


def _check_plain(path: Path, config: Mapping[str, Any]) -> None:
    for field, words in _REFUSED.items():
        if config.get(field):
            raise HealError(f"{path}: {words} ({field}) cannot be merged tensor by tensor; merge with peft")
    if config.get("bias", "none") != "none":
        raise HealError(
            f"{path}: trained biases (bias: {config['bias']}) cannot be merged; train with bias none"
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        remedy = (
            "convert it to a plain adapter with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
            if start.startswith(_CONVERTIBLE)
            else "merge with peft"
        )
        raise HealError(
            f"{path}: the initialisation changed the base weights (init_lora_weights: {start}); {remedy}"
        )


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
    names = Names(checkpoint)
    model = build_on_meta(checkpoint.path, meta_tensors(checkpoint), trust_remote_code=trust_remote_code)[0]
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
            raise HealError(
                f"{adapter.path}: target {origin} is not in {checkpoint.path}; pass its base model"
            )
        module, transposed = modules.get(key, (None, bool(adapter.config.get("fan_in_fan_out"))))
        first, second = adapter.pairs[origin]
        shape = checkpoint.tensors[key].shape
        wanted = (second.shape[0], first.shape[1])[:: -1 if transposed else 1]
        if shape != wanted or first.shape[0] != second.shape[1]:
            raise HealError(
                f"{adapter.path}: {origin} expects a matrix of shape {list(wanted)}, but {key} has {list(shape)}; "
                "pass its base model"
            )
        copy = adapter.copies.get(origin)
        if copy is not None and not _same(copy, checkpoint.tensors[key]):
            raise HealError(
                f"{adapter.path}: contains the {origin} it was trained on, which differs from {key}; merge with peft"
            )
        found.append(Place(origin, key, module, transposed))
    if not found:
        raise HealError(f"{adapter.path}: all its layers were dropped; nothing to merge")
    return found


def _same(copy: TensorSpan, span: TensorSpan) -> bool:
    """Whether the matrices are equal in the dtype of `copy`."""
    other = stored.read(copy)
    return torch.equal(stored.read(span).to(other.dtype), other)


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


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, a linear layer with a matrix [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
