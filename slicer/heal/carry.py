"""Where what stands for removed parts is written: into tensors that are there, or into new ones the config turns on."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from slicer.checkpoint import architectures, blockwise
from slicer.checkpoint import tensors as stored
from slicer.checkpoint.architectures import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS
from slicer.checkpoint.reader import DTYPE_BITS, Checkpoint, TensorSpan
from slicer.errors import ArchitectureError
from slicer.heal.emulation import Emulated, Emulation, record_of
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord

_BIASES = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "ffn": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


@dataclass(frozen=True)
class Standing:
    """What stands for removed parts, ready to be written.

    Attributes:
        found: as it was solved, for checks against the source.
        config: config.json of the result.
        replaced: raw key of the source -> what is written instead.
        added: key of the result -> a tensor the source has not.
        record: for plan.json and the card.
    """

    found: Emulated
    config: dict[str, Any]
    replaced: Mapping[str, TensorSpan] = field(default_factory=dict)
    added: Mapping[str, TensorSpan] = field(default_factory=dict)
    record: HealingRecord | None = None


def form_for(checkpoint: Checkpoint, plan: Plan, method: str) -> Plan:
    """`plan` in the form that can carry the method. Raises ArchitectureError where none can."""
    if method == "fold" or plan.form == "blockwise":
        return plan
    name = str(architectures.text_config(checkpoint.config).get("model_type"))
    if method == "bias":
        if all(_output_key(checkpoint, part, 0, "bias") for part in ("attention", "ffn")):
            return plan
        if name == "llama" and plan.form == "native":
            return plan
    if plan.form == "zeroed" or name not in blockwise.FAMILIES:
        what = "a bias" if method == "bias" else "a linear map"
        kind = f"{name} checkpoint in the zeroed form" if plan.form == "zeroed" else f"{name} checkpoint"
        raise ArchitectureError(
            f"--emulate {method}: a {kind} has no place for "
            f"{what} behind every part; use --heal fold, or no --emulate"
        )
    return replace(plan, form="blockwise")


def carry(
    checkpoint: Checkpoint, plan: Plan, config: Mapping[str, Any], found: Emulated, cast: str | None = None
) -> Standing:
    """Place `found`, in the cut of `plan` whose config.json is `config`, in the dtype `cast` (None: as stored)."""
    placing = _Placing(checkpoint, plan, dict(config), cast)
    for emulation in found.by_anchor.values():
        placing.put(emulation)
    placing.switch_on()
    return Standing(found, placing.config, placing.replaced, placing.added)


def as_healing(record: Mapping[str, Any], standing: Standing) -> HealingRecord:
    """The record of a fold below the layer, in the words of those of whole layers."""
    loss = record["loss"]
    return HealingRecord.of(
        {
            "method": "fold",
            "solver": "resolve",
            "calibration": record["calibration"],
            "held_out_sequences": record["held_out_sequences"],
            "loss": {"source": loss["source"], "sliced": loss["cut"], "healed": loss["emulated"]},
            "solved": [
                {"layer": e["layer"], "module": f"output of the {e['part']}", **figures}
                for e in record["behind"]
                for figures in _figures(e)
            ],
            "tensors": sorted(standing.replaced),
        }
    )


def _figures(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was done to a matrix: solved again, stepped, or both."""
    solved = [{"way": "direct", "error_left": entry["error_left"]}] if entry["error_left"] < 1 else []
    return solved + ([{"way": "newton", "change": entry["change"]}] if "change" in entry else [])


def storable(checkpoint: Checkpoint, part: str, layer: int) -> bool:
    """Whether the checkpoint has the output matrix of "attention" or "ffn" of a layer under a name that is known."""
    return _output_key(checkpoint, part, layer, "weight") is not None


def fold(
    checkpoint: Checkpoint,
    plan: Plan,
    config: Mapping[str, Any],
    found: Emulated,
    provenance: Mapping[str, Any],
    cast: str | None = None,
) -> Standing:
    """A fold below the layer, `found` on data of this `provenance`, with its record."""
    standing = carry(checkpoint, plan, copy.deepcopy(dict(config)), found, cast)
    return replace(standing, record=as_healing(record_of(found, provenance), standing))


class _Placing:
    def __init__(self, checkpoint: Checkpoint, plan: Plan, config: dict[str, Any], cast: str | None) -> None:
        self._checkpoint, self._plan, self.config, self._cast = checkpoint, plan, config, cast
        self.replaced: dict[str, TensorSpan] = {}
        self.added: dict[str, TensorSpan] = {}
        self._switched: dict[str, dict[int, torch.Tensor]] = {
            "attention": {},
            "ffn": {},
        }  # by layer of the result
        self._position = {
            "attention": {i: at for at, (i, _) in enumerate(plan.sublayers)},
            "ffn": {j: at for at, (_, j) in enumerate(plan.sublayers)},
        }

    def put(self, e: Emulation) -> None:
        at = self._position[e.part][e.layer]
        weight_key = _output_key(self._checkpoint, e.part, e.layer, "weight")
        bias_key = _output_key(self._checkpoint, e.part, e.layer, "bias")
        if e.weight is not None:
            assert weight_key is not None
            shape = self._checkpoint.tensors[weight_key].shape
            self._replace(weight_key, e.weight if tuple(e.weight.shape) == shape else e.weight.T)
        elif e.down is not None:
            self._low_rank(at, e)
            return
        if e.bias is None:
            return
        if bias_key is not None:
            self._replace(bias_key, stored.read(self._checkpoint.tensors[bias_key]).float() + e.bias)
        else:
            self._switched[e.part][at] = e.bias

    def switch_on(self) -> None:
        """Biases that the architecture has a switch for: the new ones, and zeros everywhere else."""
        for part, flag in (("attention", "attention_bias"), ("ffn", "mlp_bias")):
            biases = self._switched[part]
            if not biases:
                continue
            self.config[flag] = True
            gone = self._plan.no_attention if part == "attention" else self._plan.no_ffn
            names = _BIASES[part]
            if part == "attention" and self._plan.form == "blockwise":
                names = names[-1:]  # qkv_bias says the others apart
            for layer, at in self._position[part].items():
                if layer in gone:
                    continue
                for name in names:
                    key = f"{self._checkpoint.layer_prefix}{layer}.{name}.weight"
                    size = self._checkpoint.tensors[key].shape[0]
                    bias = biases.get(at) if name == names[-1] else None
                    self._add(f"{at}.{name}.bias", torch.zeros(size) if bias is None else bias)

    def _low_rank(self, at: int, e: Emulation) -> None:
        assert e.down is not None and e.up is not None and e.bias is not None and e.gain is not None
        slot = "mid" if e.part == "attention" else "end"
        block = self.config["block_configs"][at]
        block.setdefault("emulated_ranks", {})[slot] = len(e.down)
        self.config["architectures"] = [blockwise.OWN_CLASS]
        for name, tensor in (
            ("norm.weight", e.gain),
            ("down.weight", e.down),
            ("up.weight", e.up),
            ("up.bias", e.bias),
        ):
            self._add(f"{at}.emulated_{slot}.{name}", tensor)

    def _dtype(self) -> str:
        weights = [
            s for k, s in self._checkpoint.tensors.items() if k.startswith(self._checkpoint.layer_prefix)
        ]
        return weights[0].cast(self._cast)[0]

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        dtype, key = self._dtype(), f"{self._checkpoint.layer_prefix}{name}"
        nbytes = tensor.numel() * DTYPE_BITS[dtype] // 8
        self.added[key] = TensorSpan(
            self._checkpoint.path, dtype, tuple(tensor.shape), 0, nbytes, key, _making(tensor)
        )

    def _replace(self, key: str, tensor: torch.Tensor) -> None:
        span = self._checkpoint.tensors[key]
        self.replaced[key] = span.made(key, _making(tensor.contiguous()), span.cast(self._cast)[0])


def _making(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _output_key(checkpoint: Checkpoint, part: str, layer: int, kind: str) -> str | None:
    """Raw key of the weight or bias of a part's output matrix, where it is known by name."""
    names = ATTENTION_OUTPUTS if part == "attention" else FEED_FORWARD_OUTPUTS
    pattern = re.compile(re.escape(f"{checkpoint.layer_prefix}{layer}.") + r"(.+)\." + kind + "$")
    for key in checkpoint.tensors:
        match = pattern.match(key)
        if match and match[1] in names:
            return key
    return None
