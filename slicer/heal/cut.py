"""The model that a plan below the layer leaves, run from where the cut begins, on the text that heals it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from slicer.checkpoint.parts import without_parts
from slicer.heal.emulation import Emulated, attached, norm_eps
from slicer.heal.held import Split, loss
from slicer.measure.stream import Walk
from slicer.plan.plan import Plan

if TYPE_CHECKING:
    from slicer.measure.states import States


class Cut:
    """The source in memory, over which `walk` goes, and what `plan` leaves of it.

    Attributes:
        layers: those with a part that stays, from the first that may change to the last.
        origin: what enters the first of them: the same in both models.
        target: what the source has behind its last layer.
    """

    def __init__(self, walk: Walk, data: Split, plan: Plan, first: int) -> None:
        self._walk, self._held, self._plan = walk, data.held, plan
        gone = plan.gone
        first = min([first, *gone[0], *gone[1]])
        self.target: States = walk.start(data.batches)
        for i in range(first):
            walk.advance(i, self.target)
        self.origin = self.target.copy()
        for i in range(first, walk.depth):
            walk.advance(i, self.target)
        self.layers = [i for i in range(first, walk.depth) if i not in gone[0] or i not in gone[1]]

    def attach(self, stack: contextlib.ExitStack, found: Emulated) -> None:
        """Until `stack` ends the layers are those of the cut, with what stands for the removed parts."""
        no_attention, no_ffn = self._plan.gone
        for i in self.layers:
            layer = self._walk.layers[i]
            stack.enter_context(without_parts(layer, i in no_attention, i in no_ffn, i))
            stack.enter_context(attached(layer, i, found, norm_eps(self._walk.model)))

    def run(self, b: int, *, gradient: bool = False) -> torch.Tensor:
        """What the layers, as they are now, make of a batch: [batch, seq, d], on the device."""
        states = self.origin[b].to(self._walk.device).clone()
        for i in self.layers:
            states = self._walk.call(i, b, states, gradient=gradient)
        return states

    @torch.no_grad()
    def loss(self, found: Emulated | None = None) -> float:
        """Nats a token on the sequences held out; with `found` put in, else of the layers as they are now."""
        last = self.target.copy()
        with contextlib.ExitStack() as stack:
            if found is not None:
                self.attach(stack, found)
            for b in self._held:
                last[b] = self.run(b)
        return loss(self._walk, last, self._held)


def those(found: Emulated, anchors: set[tuple[str, int]]) -> Emulated:
    """`found` with what stands behind these parts alone."""
    return replace(found, by_anchor={a: e for a, e in found.by_anchor.items() if a in anchors})
