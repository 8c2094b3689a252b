"""Where a layer writes into the residual stream, and how a change there reaches the layer's output.

Three cases, told apart by running the layer, not by its name:

    direct   the map's output is added to the stream, times a factor (one, a constant, or a gate of each token)
    normed   a norm stands between the map and the stream (Gemma 2 and 3, OLMo 2, GLM-4, EXAONE 4)
    experts  a mixture of experts: a map of their sum goes into every expert's last matrix
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.architectures import ATTENTION_OUTPUTS, EXPERT_MODULES, FEED_FORWARD_OUTPUTS

_PROPORTIONAL = (
    0.05  # how far from a multiple of itself a change may arrive and still count as passed on directly
)


@dataclass(frozen=True)
class LayerChange:
    """New weights of one layer.

    Attributes:
        layer: its index in the source.
        parameters: name within the layer -> the new tensor, in the shape and dtype of the old one.
        transforms: module within the layer -> T [d, d] float32, which its output is multiplied by: for experts.
        report: what was solved, with errors before and after, for the record.
    """

    layer: int
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    transforms: dict[str, torch.Tensor] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)


@contextlib.contextmanager
def applied(layer: nn.Module, change: LayerChange) -> Iterator[None]:
    """Inside the block `layer` has the new weights of `change`; afterwards its own again."""
    old: dict[str, torch.Tensor] = {}
    handles = []
    parameters = dict(layer.named_parameters())
    try:
        for name, value in change.parameters.items():
            old[name] = parameters[name].data
            parameters[name].data = value.to(parameters[name].device)
        for name, matrix in change.transforms.items():
            handles.append(layer.get_submodule(name).register_forward_hook(_multiplying(matrix)))
        yield
    finally:
        for name, value in old.items():
            parameters[name].data = value
        for handle in handles:
            handle.remove()


def _multiplying(matrix: torch.Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        new = (states.float() @ matrix.to(states.device).T).to(states.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


@dataclass
class Output:
    """One map into the stream.

    Attributes:
        name: the module within the layer.
        kind: "direct", "normed" or "experts".
        factor: what a direct change is multiplied by on its way, where that is the same for every token; None where
            each token has its own.
        norm: the module of the norm that follows.
    """

    name: str
    module: nn.Module
    kind: str = "direct"
    factor: float | None = 1.0
    norm: str | None = None

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [f, d], as GPT-2's Conv1D has it."""
        return type(self.module).__name__ == "Conv1D"

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


class Seen:
    """What one run of a layer showed of an output: z [.., f] in, u [.., d] out, o [.., d] out of the norm."""

    def __init__(self) -> None:
        self.features: torch.Tensor | None = None
        self.output: torch.Tensor | None = None
        self.normed: torch.Tensor | None = None


@contextlib.contextmanager
def watching(layer: nn.Module, output: Output) -> Iterator[Seen]:
    """Keep what passes through `output` in each run of the layer inside the block."""
    seen = Seen()

    def into(module: nn.Module, args: Any) -> None:
        seen.features = args[0]

    def out_of(module: nn.Module, args: Any, result: Any) -> None:
        seen.output = result[0] if isinstance(result, tuple) else result

    def out_of_norm(module: nn.Module, args: Any, result: Any) -> None:
        seen.normed = result

    handles = [output.module.register_forward_hook(out_of)]
    if output.kind != "experts":
        handles.append(output.module.register_forward_pre_hook(into))
    if output.norm is not None:
        handles.append(layer.get_submodule(output.norm).register_forward_hook(out_of_norm))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find(
    layer: nn.Module,
    run: Callable[[], torch.Tensor],
    *,
    attention: bool,
    storable: Callable[[str, nn.Module], bool],
) -> list[Output]:
    """The outputs of the layer's feed-forward part (or of its attention) that can be changed, classified.

    `run()` runs the layer on some tokens and returns its output [batch, seq, d]; `storable(name, module)` says
    whether the checkpoint has a tensor of that name.
    """
    found = []
    modules = dict(layer.named_modules())
    for name in ATTENTION_OUTPUTS if attention else FEED_FORWARD_OUTPUTS:
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue
        if storable(name, module):
            found.append(_classified(layer, Output(name, module), run))
    if not attention:
        for name in EXPERT_MODULES:
            module = modules.get(name)
            if module is not None and hasattr(module, "experts") and storable(name, module):
                # A map of the sum goes into shared experts too, so they are not changed on their own.
                found = [_classified(layer, Output(name, module, kind="experts"), run)]
    return [output for output in found if output is not None]


def _classified(layer: nn.Module, output: Output, run: Callable[[], torch.Tensor]) -> Output | None:
    """`output` with its kind: push its output a little, and see what arrives at the end of the layer."""
    output.norm = _norm_after(layer, output, run)
    if output.norm is not None:
        if output.kind == "experts":
            return None
        output.kind = "normed"
        return output
    factors, apart = arriving(output, run)
    if apart > _PROPORTIONAL:  # it also passes through what follows in the layer: the direct way counts
        output.factor = float(factors.mean())
    elif float(factors.std()) < _PROPORTIONAL * abs(float(factors.mean())):
        output.factor = _rounded(float(factors.mean()))
    else:
        output.factor = None
    if output.factor is not None and abs(output.factor) < 1e-3:
        return None  # it does not reach the stream at all
    return output


def _rounded(factor: float) -> float:
    return 1.0 if abs(factor - 1) < 0.02 else factor


def _norm_after(layer: nn.Module, output: Output, run: Callable[[], torch.Tensor]) -> str | None:
    """The norm within the layer that is given just what `output` puts out."""
    last: list[torch.Tensor] = []
    followers: list[str] = []

    def out_of(module: nn.Module, args: Any, result: Any) -> None:
        last.append(result[0] if isinstance(result, tuple) else result)

    def into(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if (
                last
                and args
                and isinstance(args[0], torch.Tensor)
                and args[0].data_ptr() == last[-1].data_ptr()
            ):
                followers.append(name)

        return hook

    handles = [output.module.register_forward_hook(out_of)]
    for name, module in layer.named_modules():
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
            handles.append(module.register_forward_pre_hook(into(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return followers[0] if followers else None


def arriving(output: Output, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Push `output` by a random p and compare what arrives, q, with p: the factor (p.q / p.p) of each token [batch,
    seq], and how far q is from that multiple of p (the root of the mean square, relative)."""
    pushed: list[torch.Tensor] = []
    base = run().float()
    generator = torch.Generator().manual_seed(0)

    def push(module: nn.Module, args: Any, result: Any) -> Any:
        states = result[0] if isinstance(result, tuple) else result
        if not pushed:
            noise = torch.randn(states.shape, generator=generator).to(states.device)
            pushed.append(noise.view(base.shape) * base.square().mean(-1, keepdim=True).sqrt())
        new = states + pushed[0].view(states.shape).to(states.dtype)
        return (new, *result[1:]) if isinstance(result, tuple) else new

    handle = output.module.register_forward_hook(push)
    try:
        arrived = run().float() - base
    finally:
        handle.remove()
    p = pushed[0]
    factors = (p * arrived).sum(-1) / p.square().sum(-1)
    apart = (arrived - factors[..., None] * p).square().sum() / arrived.square().sum().clamp_min(1e-30)
    return factors, float(apart.sqrt())


def parameters_after(output: Output, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """Names and new tensors of `output` once D [d, f] is added to W; a column beyond f is added to the bias."""
    weight, bias = output.weight, output.bias
    features = weight.shape[1]
    new = (weight.double() + delta[:, :features].to(weight.device)).to(weight.dtype)
    changed = {f"{output.name}.weight": (new.T if output.transposed else new).contiguous()}
    if bias is not None and delta.shape[1] > features:
        changed[f"{output.name}.bias"] = (bias.double() + delta[:, -1].to(bias.device)).to(bias.dtype)
    return changed
