"""What stands for removed parts, as data, and put into a loaded model; `slicer.heal.emulate` solves it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.model import decoder_layers
from slicer.checkpoint.parts import attention_outputs, bypass_parts, ffn_outputs
from slicer.errors import HealError
from slicer.plan.plan import Plan


@dataclass(frozen=True)
class Emulation:
    """What is added to the stream behind one part that stays.

    Attributes:
        part, layer: "attention" or "ffn" of this layer of the source; the gap is behind it.
        bias: c [d]; for "fold" the change of the output's bias, or None where it has none.
        gain, down, up: g [d], and B = up [d, r] down [r, d]; None for a constant.
        weight: the new output matrix [d, f], for "fold".
        error_left: share of the squared error left on sequences held out; 1 where nothing was solved.
        change: of the weight by second-order steps on the loss, relative; None where none were taken.
    """

    part: str
    layer: int
    bias: torch.Tensor | None
    gain: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    error_left: float = 1.0
    change: float | None = None

    def update(self, states: torch.Tensor, eps: float) -> torch.Tensor:
        """What is added to `states` [.., d], in their dtype."""
        assert self.bias is not None
        if self.down is None or self.up is None or self.gain is None:
            return self.bias.to(states).expand_as(states)
        normed = nn.functional.rms_norm(states.float(), states.shape[-1:], None, eps).to(states.dtype)
        normed = self.gain.to(states) * normed
        update: torch.Tensor = normed @ self.down.to(states).T @ self.up.to(states).T + self.bias.to(states)
        return update


@dataclass(frozen=True)
class Emulated:
    """All gaps filled: `by_anchor`: (part, layer) -> what follows it. `losses`: nats a token on the sequences held out:
    "source", "cut" and "emulated", and "trained" where steps were taken. `held_out`: which those are. `steps`: of
    training, and `best`, the one that was kept (0: as solved)."""

    method: str
    rank: int | None
    by_anchor: dict[tuple[str, int], Emulation] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    held_out: tuple[int, ...] = ()
    steps: int = 0
    best: int = 0

    @property
    def loss(self) -> float:
        """Nats a token on the sequences held out, as it ends."""
        return self.losses.get("trained", self.losses["emulated"])

    @property
    def helps(self) -> bool:
        """Whether the loss on sequences held out is lower than that of the bare cut."""
        return self.loss < self.losses["cut"]


def output_matrix(outputs: Sequence[nn.Module]) -> nn.Module:
    """The linear map behind the outputs of a part. Raises HealError for a mixture of experts and the like."""
    found = []
    for output in outputs:
        linear = [
            m
            for m in output.modules()
            if isinstance(getattr(m, "weight", None), torch.Tensor) and m.weight.ndim == 2
        ]
        if hasattr(output, "experts") or not linear:
            raise HealError(
                "--heal fold of removed parts needs one output matrix, and a mixture of experts has many"
            )
        named = [
            m
            for name, m in output.named_modules()
            if name in ("down_proj", "c_proj", "fc2", "w2", "dense_4h_to_h")
        ]
        found.append(named[0] if named else linear[-1])
    return found[0]


def oriented_weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if type(module).__name__ == "Conv1D" else weight


@contextlib.contextmanager
def attached(layer: nn.Module, i: int, found: Emulated | None, eps: float) -> Iterator[None]:
    """Inside the block layer i of the source has what `found` puts behind its parts."""
    with contextlib.ExitStack() as stack:
        for (_, at), emulation in (found.by_anchor if found else {}).items():
            if at == i:
                for undo in _attached(layer, emulation, eps):
                    stack.callback(undo)
        yield


def norm_eps(model: Any) -> float:
    """The epsilon of the model's RMS norms."""
    return float(getattr(model.config.get_text_config(), "rms_norm_eps", 1e-6) or 1e-6)


@contextlib.contextmanager
def emulated(model: Any, plan: Plan, found: Emulated | None) -> Iterator[None]:
    """Inside the block the loaded source `model` is the cut of `plan` with what stands for the removed parts."""
    layers = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bypass_parts(model, *plan.gone))
        for i in {layer for _, layer in (found.by_anchor if found else {})}:
            stack.enter_context(attached(layers[i], i, found, norm_eps(model)))
        yield


def _attached(layer: nn.Module, emulation: Emulation, eps: float) -> list[Callable[[], None]]:
    """Hooks (and weights) that put `emulation` behind its part of `layer`; returns what undoes them."""
    outputs = attention_outputs(layer) if emulation.part == "attention" else ffn_outputs(layer)
    if emulation.weight is not None:
        module = output_matrix(outputs)
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        old, new = weight.data, emulation.weight.T if type(module).__name__ == "Conv1D" else emulation.weight
        weight.data = new.to(old)
        undo: list[Callable[[], None]] = [partial(setattr, weight, "data", old)]
        if emulation.bias is not None and isinstance(bias, torch.Tensor):
            undo.append(partial(setattr, bias, "data", bias.data))
            bias.data = (bias.data.float() + emulation.bias.to(bias.device)).to(bias.dtype)
        return undo
    entering: list[torch.Tensor] = []

    def into(module: nn.Module, args: Any, kwargs: Any) -> None:
        entering[:] = [args[0] if args else kwargs["hidden_states"]]

    def behind_attention(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        new = states + emulation.update(entering[0] + states, eps)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def behind_layer(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        new = states + emulation.update(states, eps)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def constant(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        assert emulation.bias is not None
        new = states + emulation.bias.to(states)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if emulation.down is None:
        return [outputs[0].register_forward_hook(constant).remove]
    if emulation.part == "ffn":
        return [layer.register_forward_hook(behind_layer).remove]
    return [
        layer.register_forward_pre_hook(into, with_kwargs=True).remove,
        outputs[0].register_forward_hook(behind_attention).remove,
    ]


def record_of(found: Emulated, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """For plan.json and the card."""
    return {
        "method": found.method,
        "rank": found.rank,
        **({"steps": found.steps, "best_step": found.best} if found.steps else {}),
        "calibration": dict(provenance),
        "held_out_sequences": list(found.held_out),
        "loss": {name: round(value, 6) for name, value in found.losses.items()},
        "behind": [
            {"part": e.part, "layer": e.layer, "error_left": round(e.error_left, 6)}
            | ({} if e.change is None else {"change": e.change})
            for _, e in sorted(found.by_anchor.items(), key=lambda item: (item[0][1], item[0][0] == "ffn"))
        ],
    }
