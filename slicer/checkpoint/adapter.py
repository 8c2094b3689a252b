"""A LoRA adapter on disk, as peft saves it: its checks, and the checkpoint matrices that it changes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.checkpoint import tensors
from slicer.checkpoint.reader import Checkpoint, read_header
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import HealError

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
            raise HealError(f"{path}: no readable {CONFIG} ({error}); pass a directory saved by peft") from None
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
        if not halves:
            raise HealError(f"{path}: no adapter weights; save the adapter again")
        for module, found in halves.items():
            for there, other in ("AB", "BA"):
                if other not in found:
                    raise HealError(f"{path}: {module} has {there} but not {other}; save the adapter again")
        return cls(path, config, {name: (half["A"], half["B"]) for name, half in halves.items()}, copies)

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
        raise HealError(f"{path}: trained biases (bias: {config['bias']}) cannot be merged; train with bias none")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        remedy = (
            "convert it to a plain adapter with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
            if start.startswith(_CONVERTIBLE)
            else "merge with peft"
        )
        raise HealError(f"{path}: the initialisation changed the base weights (init_lora_weights: {start}); {remedy}")


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
        raise HealError(f"{adapter}: was not trained on the weights of {checkpoint.path}; merge it into {base}")
