"""Attention and feed-forward sublayers of a loaded layer: what each adds to the residual stream, and how to omit it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from slicer.checkpoint import architectures
from slicer.checkpoint.model import Model, bypass, decoder_layers
from slicer.errors import ArchitectureError

_FEED_FORWARDS = ("mlp", "feed_forward", "ffn", "mlp_block", "block_sparse_moe", "shared_mlp", "fc2")


def attention_outputs(layer: nn.Module) -> list[nn.Module]:
    """The modules whose output the attention of `layer` (or what it has instead) adds to the residual stream."""
    return [m for name, m in layer.named_modules() if name in architectures.ATTENTION_OUTPUTS]


def ffn_outputs(layer: nn.Module) -> list[nn.Module]:
    """The same for its feed-forward sublayer."""
    return [module for name, module in layer.named_children() if name in _FEED_FORWARDS]


@contextlib.contextmanager
def silenced(modules: Iterable[nn.Module], update: torch.Tensor | None = None) -> Iterator[None]:
    """Inside the block the `modules` return zeros, or `update` [d] for every token."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        new = torch.zeros_like(states)
        if update is not None:
            new += update.to(new)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def bypass_sublayers(model: Model, attention: Iterable[int], ffn: Iterable[int]) -> Iterator[None]:
    """Inside the block the attention of some layers, and the feed-forward sublayer of some, add nothing to the stream.

    A layer in both returns its input. Raises ArchitectureError where a layer has no such sublayer that is known.
    """
    attention, ffn, layers = set(attention), set(ffn), decoder_layers(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bypass(model, attention & ffn))
        for i in sorted(attention ^ ffn):
            stack.enter_context(without_sublayers(layers[i], i in attention, i in ffn, i))
        yield


@contextlib.contextmanager
def without_sublayers(
    layer: nn.Module, attention: bool, ffn: bool, number: int | None = None
) -> Iterator[None]:
    """Inside the block the attention, or the feed-forward sublayer, of `layer` adds nothing to the stream.

    Raises ArchitectureError where it has no such sublayer that is known; `number` is for the message.
    """
    with contextlib.ExitStack() as stack:
        for gone, outputs, what in (
            (attention, attention_outputs, "attention"),
            (ffn, ffn_outputs, "feed-forward part"),
        ):
            if gone:
                modules = outputs(layer)
                if not modules:
                    place = "a layer" if number is None else f"layer {number}"
                    raise ArchitectureError(f"{place} ({type(layer).__name__}) has no {what} that is known")
                stack.enter_context(silenced(modules))
        yield
