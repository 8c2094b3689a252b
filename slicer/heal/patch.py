"""The repair of a cut, as solved in memory (`Solved`) and as written to disk (`Patch`).

`place` turns one into the other: new weights replace tensors of the source; a constant or a low-rank map behind a
sublayer is stored in an existing bias, or in new tensors that fields of config.json turn on.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from slicer.checkpoint import blockwise, tensors
from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.architectures.table import ATTENTION_OUTPUTS, EXPERT_OUTPUTS, FEED_FORWARD_OUTPUTS
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import ArchitectureError, UsageError
from slicer.model.pruned import Edits, Replacement
from slicer.plan.plan import Plan
from slicer.plan.records import MAPS, HealingRecord, Losses, SolvedMatrix, TextRecord

_BIASES = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "ffn": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
Holds = Callable[[int, str, nn.Module], bool]


@dataclass(frozen=True)
class Solved:
    """The result of weight compensation, in memory.

    Attributes:
        edits: layer of the source -> its changes, in the dtypes of the model.
        losses: nats a token on the held-out sequences.
        method: "fold", "bias" or "linear". solver: of a fold. rank: of linear maps.
        report: what was solved, by layer. held_out: numbers of the held-out sequences.
        steps, best_step: of training; 0: as solved. precision: torch dtype of the arithmetic.
    """

    edits: Edits
    losses: Losses
    method: str
    solver: str | None = None
    rank: int | None = None
    report: tuple[SolvedMatrix, ...] = ()
    held_out: tuple[int, ...] = ()
    steps: int = 0
    best_step: int = 0
    precision: str | None = None


@dataclass(frozen=True)
class Patch:
    """The repair of a cut, ready to be written.

    Attributes:
        edits: the same change, to apply to the loaded source.
        replaced: raw key of the source -> the tensor that is written instead.
        added: key of the result -> a tensor that the source does not have.
        config: fields of config.json that turn the added tensors on; of "block_configs", layer of the result -> fields.
        record: for plan.json and the card.
    """

    edits: Edits = field(default_factory=dict)
    replaced: Mapping[str, TensorSpan] = field(default_factory=dict)
    added: Mapping[str, TensorSpan] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    record: HealingRecord | None = None

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the repaired cut, from that of the bare cut."""
        new = copy.deepcopy(dict(config)) | {k: v for k, v in self.config.items() if k != "block_configs"}
        for at, fields in self.config.get("block_configs", {}).items():
            new["block_configs"][at].update(fields)
        return new


NONE = Patch()


def check_method(method: str, rank: int | None, width: int) -> None:
    """Raise UsageError unless `rank` suits the method and the model's width."""
    if method not in MAPS:
        raise UsageError(f"method {method!r}: choose one of {', '.join(MAPS)}")
    if method == "linear" and (rank is None or not 1 <= rank <= width):
        raise UsageError(f"--rank {rank}: must lie between 1 and the model's width, {width}")


def form_for(checkpoint: Checkpoint, plan: Plan, method: str | None, rank: int | None = None) -> Plan:
    """`plan` in a form that can store the repair by `method` (None: no repair).

    Raises UsageError for a rank that does not suit the model, ArchitectureError if no form can store the repair.
    """
    if method not in MAPS:
        return plan
    config = architectures.text_config(checkpoint.config)
    if isinstance(width := config.get("hidden_size"), int):
        check_method(method, rank, width)
    name = str(config.get("model_type"))
    biased = all(_bias_key(checkpoint, sublayer, 0) for sublayer in ("attention", "ffn"))
    if plan.form == "blockwise" or (method == "bias" and (biased or (name, plan.form) == ("llama", "native"))):
        return plan
    if plan.form == "zeroed" or name not in blockwise.FAMILIES:
        what = "a bias" if method == "bias" else "a linear map"
        kind = f"{name} checkpoint in the zeroed form" if plan.form == "zeroed" else f"{name} checkpoint"
        raise ArchitectureError(
            f"--heal {method}: a {kind} has no place for {what} behind every sublayer; use --heal fold or none"
        )
    return replace(plan, form="blockwise")


def holds(checkpoint: Checkpoint) -> Holds:
    """Whether a module's weights are in the checkpoint under its own name and shape, or as experts."""

    def held(i: int, name: str, module: nn.Module) -> bool:
        if hasattr(module, "experts"):
            return bool(_expert_keys(checkpoint, i, name))
        return all(
            (span := checkpoint.tensors.get(f"{checkpoint.layer_prefix}{i}.{name}.{kind}")) is not None
            and span.shape == tuple(tensor.shape)
            for kind, tensor in module.named_parameters(recurse=False)
        )

    return held


def written_dtype(checkpoint: Checkpoint, cast: str | None) -> torch.dtype:
    """The dtype that most tensors of the layers are written in; `cast`: safetensors dtype, None: as stored."""
    names = Counter(
        span.cast(cast)[0] for key, span in checkpoint.tensors.items() if key.startswith(checkpoint.layer_prefix)
    )
    return tensors.torch_dtype(names.most_common(1)[0][0])


def place(
    checkpoint: Checkpoint, plan: Plan, solved: Solved, text: TextRecord | None, cast: str | None = None
) -> Patch:
    """`solved`, which was fitted on `text`, as a patch of the cut of `plan` from the source `checkpoint`.

    `cast`: safetensors dtype of the output; None: as stored. All tensors are on the CPU, in the dtype of the output.
    """
    placing = _Placing(checkpoint, plan, cast)
    for i, edit in sorted(solved.edits.items()):
        for name, tensor in edit.parameters.items():
            placing.replace(f"{checkpoint.layer_prefix}{i}.{name}", tensor)
        for name, matrix in edit.transforms.items():
            placing.multiply(i, name, matrix)
        for sublayer, replacement in edit.behind.items():
            placing.put_behind(sublayer, i, replacement)
    placing.turn_on_biases()
    losses = {name: value if value is None else round(value, 6) for name, value in vars(solved.losses).items()}
    record = HealingRecord(
        solved.method,
        None if text is None else replace(text, held_out=solved.held_out),
        Losses(**losses),
        tuple(sorted(placing.replaced)),
        solved.solver,
        solved.rank,
        solved.steps,
        solved.best_step,
        solved.precision,
        solved.report,
    )
    return Patch(solved.edits, placing.replaced, placing.added, placing.config, record)


class _Placing:
    def __init__(self, checkpoint: Checkpoint, plan: Plan, cast: str | None) -> None:
        self._checkpoint, self._plan, self._cast = checkpoint, plan, cast
        self.replaced: dict[str, TensorSpan] = {}
        self.added: dict[str, TensorSpan] = {}
        self.config: dict[str, Any] = {}
        self._biases: dict[str, dict[int, torch.Tensor]] = {"attention": {}, "ffn": {}}  # by layer of the result
        self._position = {
            "attention": {i: at for at, (i, _) in enumerate(plan.sublayers)},
            "ffn": {j: at for at, (_, j) in enumerate(plan.sublayers)},
        }

    def replace(self, key: str, tensor: torch.Tensor) -> None:
        """Write `tensor` in place of this tensor of the source."""
        dtype = self._checkpoint.tensors[key].cast(self._cast)[0]
        self.replaced[key] = self._span(key, tensor, dtype)

    def multiply(self, i: int, name: str, matrix: torch.Tensor) -> None:
        """Multiply `matrix` [d, d] into every expert of a module of layer i."""
        for key, axis in _expert_keys(self._checkpoint, i, name).items():
            old = tensors.read(self._checkpoint.tensors[key]).double()
            new = torch.tensordot(old, matrix.double().cpu(), dims=([axis], [1])).movedim(-1, axis)
            self.replace(key, new)

    def put_behind(self, sublayer: str, layer: int, replacement: Replacement) -> None:
        """Add `replacement` behind a sublayer of the source."""
        at = self._position[sublayer][layer]
        if replacement.down is not None:
            slot = "mid" if sublayer == "attention" else "end"
            block = self.config.setdefault("block_configs", {}).setdefault(at, {"emulated_ranks": {}})
            block["emulated_ranks"][slot] = len(replacement.down)
            self.config["architectures"] = [blockwise.OWN_CLASS]
            new = {"norm.weight": replacement.gain, "down.weight": replacement.down, "up.weight": replacement.up}
            for name, tensor in {**new, "up.bias": replacement.bias}.items():
                assert tensor is not None
                self._add(f"{at}.emulated_{slot}.{name}", tensor)
        elif (key := _bias_key(self._checkpoint, sublayer, layer)) is not None:
            old = tensors.read(self._checkpoint.tensors[key]).float()
            self.replace(key, old + replacement.bias.cpu())
        else:
            self._biases[sublayer][at] = replacement.bias

    def turn_on_biases(self) -> None:
        """Add new biases if a field of config.json turns biases on for all layers: zeros in the other layers."""
        for sublayer, flag in (("attention", "attention_bias"), ("ffn", "mlp_bias")):
            biases = self._biases[sublayer]
            if not biases:
                continue
            self.config[flag] = True
            gone = self._plan.no_attention if sublayer == "attention" else self._plan.no_ffn
            names = _BIASES[sublayer]
            if sublayer == "attention" and self._plan.form == "blockwise":
                names = names[-1:]  # the field qkv_bias is for the others
            for layer, at in self._position[sublayer].items():
                if layer in gone:
                    continue
                for name in names:
                    key = f"{self._checkpoint.layer_prefix}{layer}.{name}.weight"
                    size = self._checkpoint.tensors[key].shape[0]
                    bias = biases.get(at) if name == names[-1] else None
                    self._add(f"{at}.{name}.bias", torch.zeros(size) if bias is None else bias)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        prefix = self._checkpoint.layer_prefix
        first = next(span for key, span in self._checkpoint.tensors.items() if key.startswith(prefix))
        self.added[prefix + name] = self._span(prefix + name, tensor, first.cast(self._cast)[0])

    def _span(self, key: str, tensor: torch.Tensor, dtype: str) -> TensorSpan:
        """`tensor` on the CPU, so that the device's memory is free, in the dtype of the output."""
        ready = tensor.detach().to("cpu", tensors.torch_dtype(dtype)).contiguous()
        return TensorSpan(self._checkpoint.path, dtype, tuple(ready.shape), 0, ready.nbytes, key, lambda: ready)


def _expert_keys(checkpoint: Checkpoint, i: int, name: str) -> dict[str, int]:
    """Raw key -> axis of the hidden size, of the tensors into which a map of the experts' sum is multiplied."""
    prefix = f"{checkpoint.layer_prefix}{i}."
    keys = [key for key in checkpoint.tensors if key.startswith(f"{prefix}{name}.")]
    outputs = [(re.compile(rf"\.{pattern}$"), axis) for pattern, axis in EXPERT_OUTPUTS]
    return {key: axis for key in keys for ending, axis in outputs if ending.search(key)}


def _bias_key(checkpoint: Checkpoint, sublayer: str, layer: int) -> str | None:
    """Raw key of the bias of a sublayer's output matrix, where the checkpoint has one."""
    names = ATTENTION_OUTPUTS if sublayer == "attention" else FEED_FORWARD_OUTPUTS
    keys = (f"{checkpoint.layer_prefix}{layer}.{name}.bias" for name in names)
    return next((key for key in keys if key in checkpoint.tensors), None)
