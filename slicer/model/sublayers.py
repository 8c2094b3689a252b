"""Attention and feed-forward sublayers of a loaded layer: what each adds to the residual stream, and how to omit it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.architectures import table as architectures
from slicer.errors import ArchitectureError
from slicer.model.layers import attached, bypass, decoder_layers, first_given, first_tensor, on_hidden
from slicer.model.load import Model
from slicer.model.walk import Walk

Run = Callable[[], torch.Tensor]


def attention_outputs(layer: nn.Module) -> list[nn.Module]:
    """The modules whose output the attention of `layer` (or what it has instead) adds to the residual stream."""
    return [m for name, m in layer.named_modules() if name in architectures.ATTENTION_OUTPUTS]


def ffn_outputs(layer: nn.Module) -> list[nn.Module]:
    """The same for its feed-forward sublayer."""
    return [module for name, module in layer.named_children() if name in architectures.FEED_FORWARDS]


@contextlib.contextmanager
def silenced(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block the `modules` return zeros."""
    with attached(module.register_forward_hook(on_hidden(torch.zeros_like)) for module in modules):
        yield


@contextlib.contextmanager
def bypass_sublayers(model: Model, attention: Iterable[int], ffn: Iterable[int]) -> Iterator[None]:
    """Inside the block the attention of some layers, and the feed-forward sublayer of some, add nothing to the stream.

    A layer in both returns its input. Raises ArchitectureError for a layer without a known sublayer of the kind.
    """
    attention, ffn, layers = set(attention), set(ffn), decoder_layers(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bypass(model, attention & ffn))
        for i in sorted(attention ^ ffn):
            stack.enter_context(without_sublayers(layers[i], i in attention, i in ffn, i))
        yield


@contextlib.contextmanager
def without_sublayers(layer: nn.Module, attention: bool, ffn: bool, number: int | None = None) -> Iterator[None]:
    """Inside the block the attention, or the feed-forward sublayer, of `layer` adds nothing to the stream.

    Raises ArchitectureError if it has no known sublayer of the kind; `number` is for the message.
    """
    with contextlib.ExitStack() as stack:
        for gone, outputs, what in (
            (attention, attention_outputs, "attention"),
            (ffn, ffn_outputs, "feed-forward sublayer"),
        ):
            if gone:
                modules = outputs(layer)
                if not modules:
                    place = "a layer" if number is None else f"layer {number}"
                    raise ArchitectureError(f"{place} ({type(layer).__name__}) has no known {what}")
                stack.enter_context(silenced(modules))
        yield


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """The feed-forward submodule of `layer`; None if it has none."""
    children = dict(layer.named_children())
    names = (*architectures.FEED_FORWARDS, "mixer")  # Nemotron-H: in place of either sublayer
    return next((children[name] for name in names if name in children), None)


class MidLayerTap:
    """Taps the residual stream inside a layer, after its attention.

    The tap is the module whose input is that stream (in most models the norm before the feed-forward sublayer). It is
    found by running the layer with that sublayer silenced. If no module has that input (parallel attention and
    feed-forward), every run is made twice.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._places: dict[tuple[Any, ...], str | None] = {}

    def states(self, i: int, batch: int, entering: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream after the attention of layer i, stream after layer i), [batch, seq, d]; `entering` is x(i)."""
        with self._walk.layer(i) as layer:
            run = partial(self._walk.call, i, batch, entering)
            place = self.place(i, layer, run)
            if place is None:
                with silenced(ffn_outputs(layer)):
                    between = run()
                return between, run()
            seen: list[torch.Tensor | None] = []
            with layer.get_submodule(place).register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(first_tensor(args, kwargs)), with_kwargs=True
            ):
                after = run()
            assert seen[0] is not None
            return seen[0].view(after.shape), after

    def place(self, i: int, layer: nn.Module, run: Run) -> str | None:
        """Name of the module in layer i whose input is the stream after the attention; None if there is none.

        Raises ArchitectureError for a layer without attention or feed-forward sublayer.
        """
        key = (type(layer), *(name for name, _ in layer.named_children()))
        if key not in self._places:
            outputs = ffn_outputs(layer)
            if not outputs or not attention_outputs(layer):
                raise ArchitectureError(
                    f"layer {i} of {type(self._walk.model).__name__} does not have both attention and feed-forward "
                    "sublayers; drop whole layers (--drop, --offset whole)"
                )
            with silenced(outputs):
                between = run()

            def same(module: nn.Module, given: torch.Tensor) -> bool:
                alike = given.numel() == between.numel() and given.dtype == between.dtype
                return alike and torch.equal(given.reshape(between.shape), between)

            self._places[key] = first_given(layer, run, same)
        return self._places[key]
