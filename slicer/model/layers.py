"""A checkpoint as a transformers model: load it, find its layers, tap its residual stream, bypass layers.

Uses only hooks, so every class of the table works unchanged: a layer takes its hidden states as the first argument or
by keyword, and returns them alone or first in a tuple.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from slicer.errors import ArchitectureError
from slicer.model.load import Model


def decoder_layers(model: Model) -> nn.ModuleList:
    """The decoder layers, in order. Raises ArchitectureError if there is no list of the right length."""
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    text = [(n, m) for n, m in lists if not any(part in n for part in ("vision", "audio", "visual", "mtp"))]
    if not text:
        raise ArchitectureError(f"{type(model).__name__}: no list of {depth} decoder layers found")
    return min(text, key=lambda item: item[0].count("."))[1]


def _states_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    states = args[0] if args else kwargs["hidden_states"]
    assert isinstance(states, torch.Tensor)
    return states


@contextlib.contextmanager
def watch(model: Model, listener: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call `listener(l, x)` with x(l), [batch, seq, d], for l = 0..L in every forward pass.

    x(l) enters layer l; x(L) leaves the last layer and enters the final norm.
    """
    layers = decoder_layers(model)
    handles = []

    def entering(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs: listener(index, _states_in(args, kwargs))

    def leaving(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        listener(len(layers), output[0] if isinstance(output, tuple) else output)

    try:
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(entering(index), with_kwargs=True))
        handles.append(layers[-1].register_forward_hook(leaving, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Tap:
    """The residual stream of the latest forward pass: `states[l]` is x(l), [batch, seq, d], l = 0..L."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []


@contextlib.contextmanager
def residual_stream(model: Model) -> Iterator[Tap]:
    """Tap the residual stream of each forward pass inside the block."""
    tap = Tap()

    def listener(index: int, states: torch.Tensor) -> None:
        if index == 0:
            tap.states = []
        tap.states.append(states.detach())

    with watch(model, listener):
        yield tap


@contextlib.contextmanager
def bypass(model: Model, dropped: Iterable[int]) -> Iterator[None]:
    """Inside the block, the layers `dropped` return their input unchanged. They still run: for checks only."""
    layers = decoder_layers(model)

    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = _states_in(args, kwargs)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handles = [layers[i].register_forward_hook(skip, with_kwargs=True) for i in dropped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, a linear layer with a matrix [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@torch.inference_mode()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of every position, [batch, seq, vocabulary], on the CPU."""
    device = model.get_input_embeddings().weight.device
    logits: torch.Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits.cpu()
