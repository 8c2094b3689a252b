"""The decoder layers of a transformers model: find them, tap the residual stream, bypass or replace layers.

Uses only hooks, so every class of the table works unchanged: a layer takes its hidden states as the first argument or
by keyword, and returns them alone or first in a tuple.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

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


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states [batch, seq, d] among the arguments of a layer."""
    states = args[0] if args else kwargs["hidden_states"]
    assert isinstance(states, torch.Tensor)
    return states


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states that a module returned, alone or first in a tuple."""
    states = output[0] if isinstance(output, tuple) else output
    assert isinstance(states, torch.Tensor)
    return states


def with_hidden(output: Any, states: torch.Tensor) -> Any:
    """What a module returned, with `states` as its hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def on_hidden(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that replaces the hidden states h which a module returns by `change(h)`."""
    return lambda module, args, output: with_hidden(output, change(hidden_of(output)))


@contextlib.contextmanager
def replaced_forwards(
    layers: Iterable[nn.Module], instead: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside the block, a call of layer i runs `instead(i, its own forward)` in place of its forward."""
    layers = list(layers)
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for i, layer in enumerate(layers):
            layer.forward = instead(i, layer.forward)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            if old is None:
                del layer.forward
            else:
                layer.forward = old


@contextlib.contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keeps the hooks of `handles`, as registering gives them, inside the block; then removes them."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def watch(model: Model, listener: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call `listener(l, x)` with x(l), [batch, seq, d], for l = 0..L in every forward pass.

    x(l) enters layer l; x(L) leaves the last layer and enters the final norm.
    """
    layers = decoder_layers(model)

    def entering(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs: listener(index, hidden_in(args, kwargs))

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        listener(len(layers), hidden_of(output))

    handles = [layer.register_forward_pre_hook(entering(i), with_kwargs=True) for i, layer in enumerate(layers)]
    with attached([*handles, layers[-1].register_forward_hook(leaving)]):
        yield


@contextlib.contextmanager
def bypass(model: Model, dropped: Iterable[int]) -> Iterator[None]:
    """Inside the block, the layers `dropped` return their input unchanged. They still run: for checks only."""
    layers = decoder_layers(model)

    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return with_hidden(output, hidden_in(args, kwargs))

    with attached(layers[i].register_forward_hook(skip, with_kwargs=True) for i in dropped):
        yield


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The first tensor among the arguments of a module."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


def first_given(
    layer: nn.Module, run: Callable[[], Any], wanted: Callable[[nn.Module, torch.Tensor], bool]
) -> str | None:
    """Name of the first module within `layer` that gets an input x for which `wanted(module, x)`; `run()` runs it."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = first_tensor(args, kwargs)
        if given is not None and wanted(module, given):
            found.append(name)

    with attached(
        module.register_forward_pre_hook(partial(look, name), with_kwargs=True)
        for name, module in layer.named_modules()
        if name
    ):
        run()
    return found[0] if found else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, a linear layer with a matrix [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def norm_eps(model: Model) -> float:
    """The epsilon of the model's RMS norms."""
    return float(getattr(model.config.get_text_config(), "rms_norm_eps", 1e-6) or 1e-6)


@torch.inference_mode()
def logits_of(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of every position, [batch, seq, vocabulary], on the CPU."""
    device = model.get_input_embeddings().weight.device
    logits: torch.Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits.cpu()
