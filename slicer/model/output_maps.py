"""The linear maps that write to the residual stream, and how a change of their output reaches the layer's output.

Three kinds, found by running the layer, not by its name:

    direct   the map's output is added to the stream, times a factor (one, a constant, or a gate for each token)
    normed   a norm follows the map (Gemma 2 and 3, OLMo 2, GLM-4, EXAONE 4)
    experts  a mixture of experts: a linear map of their sum is multiplied into the last matrix of every expert
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.architectures.table import ATTENTION_OUTPUTS, EXPERT_MODULES, FEED_FORWARD_OUTPUTS
from slicer.model.layers import attached, first_given, hidden_of, is_conv1d, on_hidden

_PROPORTIONAL = 0.05  # largest relative distance of an arriving change from a multiple of itself, to be "direct"


@dataclass
class Output:
    """One map into the residual stream.

    Attributes:
        name: the module within the layer.
        kind: "direct", "normed" or "experts".
        factor: what multiplies a direct change on its way; None if each token has its own factor.
        norm: the module of the norm that follows.
    """

    name: str
    module: nn.Module
    kind: str = "direct"
    factor: float | None = 1.0
    norm: str | None = None

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [f, d], as in GPT-2's Conv1D."""
        return is_conv1d(self.module)

    @property
    def weight(self) -> torch.Tensor:
        """W [d, f]."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None


@dataclass
class Observed:
    """The tensors of one run of a layer: z [.., f] into the map, u [.., d] out of it, o [.., d] out of the norm."""

    features: torch.Tensor | None = None
    output: torch.Tensor | None = None
    normed: torch.Tensor | None = None


@contextlib.contextmanager
def watching(layer: nn.Module, output: Output) -> Iterator[Observed]:
    """Keep the tensors of `output` in each run of the layer inside the block."""
    seen = Observed()

    def through(module: nn.Module, args: Any, result: Any) -> None:
        seen.features, seen.output = args[0] if args else None, hidden_of(result)

    def out_of_norm(module: nn.Module, args: Any, result: Any) -> None:
        seen.normed = result

    handles = [output.module.register_forward_hook(through)]
    if output.norm is not None:
        handles.append(layer.get_submodule(output.norm).register_forward_hook(out_of_norm))
    with attached(handles):
        yield seen


def find(
    layer: nn.Module, run: Callable[[], torch.Tensor], sublayer: str, holds: Callable[[str, nn.Module], bool]
) -> list[Output]:
    """The outputs of a sublayer ("attention" or "ffn") of `layer` that can be changed, with their kinds.

    `run()` runs the layer on some tokens and returns its output [batch, seq, d]; `holds(name, module)`: whether the
    checkpoint holds the tensors of a module under its name.
    """
    found = []
    modules = dict(layer.named_modules())
    for name in ATTENTION_OUTPUTS if sublayer == "attention" else FEED_FORWARD_OUTPUTS:
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue
        if holds(name, module):
            found.append(_classified(layer, Output(name, module), run))
    if sublayer == "ffn":
        for name in EXPERT_MODULES:
            module = modules.get(name)
            if module is not None and hasattr(module, "experts") and holds(name, module):
                # The map of the sum is multiplied into shared experts too, so they are not solved separately.
                found = [_classified(layer, Output(name, module, kind="experts"), run)]
    return [output for output in found if output is not None]


def _classified(layer: nn.Module, output: Output, run: Callable[[], torch.Tensor]) -> Output | None:
    """`output` with its kind: change its output a little, and compare the layer's output. None: it has no effect."""
    output.norm = _norm_after(layer, output, run)
    if output.norm is not None:
        if output.kind == "experts":
            return None
        output.kind = "normed"
        return output
    factors, apart = arriving(output, run)
    if apart > _PROPORTIONAL:  # the change also passes through the rest of the layer: count only the direct path
        output.factor = float(factors.mean())
    elif float(factors.std()) < _PROPORTIONAL * abs(mean := float(factors.mean())):
        output.factor = 1.0 if abs(mean - 1) < 0.02 else mean
    else:
        output.factor = None
    if output.factor is not None and abs(output.factor) < 1e-3:
        return None
    return output


def _norm_after(layer: nn.Module, output: Output, run: Callable[[], torch.Tensor]) -> str | None:
    """The norm within the layer whose input is the tensor that `output` returns."""
    last: list[torch.Tensor] = []

    def out_of(module: nn.Module, args: Any, result: Any) -> None:
        last.append(hidden_of(result))

    def follows(module: nn.Module, given: torch.Tensor) -> bool:
        is_norm = "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
        return is_norm and bool(last) and given.data_ptr() == last[-1].data_ptr()

    with output.module.register_forward_hook(out_of):
        return first_given(layer, run, follows)


def arriving(output: Output, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Add a random p to `output` and compare the change q of the layer's output with p: the factor (p.q / p.p) of each
    token [batch, seq], and the relative root mean square distance of q from that multiple of p."""
    pushed: list[torch.Tensor] = []
    base = run().float()
    generator = torch.Generator().manual_seed(0)

    def push(states: torch.Tensor) -> torch.Tensor:
        if not pushed:
            noise = torch.randn(states.shape, generator=generator).to(states.device)
            pushed.append(noise.view(base.shape) * base.square().mean(-1, keepdim=True).sqrt())
        return states + pushed[0].view(states.shape).to(states.dtype)

    with output.module.register_forward_hook(on_hidden(push)):
        arrived = run().float() - base
    p = pushed[0]
    factors = (p * arrived).sum(-1) / p.square().sum(-1)
    apart = (arrived - factors[..., None] * p).square().sum() / arrived.square().sum().clamp_min(1e-30)
    return factors, float(apart.sqrt())


def parameters_after(output: Output, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> new tensor of `output` when D [d, f] is added to W; a column beyond f is added to the bias."""
    weight, bias = output.weight, output.bias
    features = weight.shape[1]
    new = (delta[:, :features].to(weight.device) + weight).to(weight.dtype)  # summed in float64
    changed = {f"{output.name}.weight": (new.T if output.transposed else new).contiguous()}
    if bias is not None and delta.shape[1] > features:
        changed[f"{output.name}.bias"] = (bias.double() + delta[:, -1].to(bias.device)).to(bias.dtype)
    return changed
