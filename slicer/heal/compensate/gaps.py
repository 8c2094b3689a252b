"""The gaps that a plan leaves between sublayers, and one pass of source and cut together, layer by layer.

Sublayers are numbered 2l (attention of layer l of the source) and 2l + 1 (its feed-forward sublayer). A dropped block
of n whole layers is a gap of 2n sublayers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from slicer.errors import ArchitectureError
from slicer.heal.compensate.regression import Split
from slicer.model.layers import norm_eps
from slicer.model.pruned import pruned_layer
from slicer.model.states import States
from slicer.model.sublayers import MidLayerTap
from slicer.model.walk import SourceActivations, Walk, walk_loss
from slicer.plan.amounts import runs
from slicer.plan.plan import Plan
from slicer.plan.records import Losses
from slicer.progress import Progress


@dataclass(frozen=True)
class Gap:
    """The sublayers [start, end) are removed; the sublayer before and the one behind stay."""

    start: int
    end: int

    @property
    def layer(self) -> int:
        """The layer of the last sublayer before the gap; -1 if the gap is at the start of the model."""
        return (self.start - 1) // 2

    @property
    def sublayer(self) -> str:
        """Which sublayer of that layer: "attention" or "ffn"."""
        return "attention" if self.start % 2 else "ffn"

    @property
    def behind(self) -> int:
        """The layer of the first sublayer behind the gap; the depth of the model if the gap is at its end."""
        return self.end // 2

    @property
    def within(self) -> bool:
        """Whether the gap ends within the layer `behind`, before its feed-forward."""
        return self.end % 2 == 1


def gaps_of(plan: Plan) -> list[Gap]:
    """The gaps of a plan, in order."""
    no_attention, no_ffn = plan.gone
    gone = [*(2 * i for i in no_attention), *(2 * i + 1 for i in no_ffn)]
    return [Gap(start, end) for start, end in runs(gone)]


class GapPass:
    """One pass over the source, the cut as repaired so far and, on the held-out batches, the bare cut.

    Iterating gives each gap with the source's residual stream at its end, [batch, seq, d] by batch. `cut` is then at
    the input of layer `gap.layer`, and the caller must advance it through that layer (unless that is -1).

    Attributes:
        source, cut: residual streams; `cut` is a copy made at the first gap.
    """

    def __init__(
        self, walk: Walk, data: Split, plan: Plan, activations: SourceActivations | None, progress: Progress
    ) -> None:
        self._walk, self._held, self._gone = walk, data.held, plan.gone
        self._activations, self._progress = activations or SourceActivations(0), progress
        self._midway = MidLayerTap(walk)
        self.gaps = gaps_of(plan)
        self.source: States = walk.start(data.batches)
        self.cut = self.source
        self._bare: dict[int, torch.Tensor] = {}

    def __iter__(self) -> Iterator[tuple[Gap, States]]:
        for gap in self.gaps:
            self.advance(max(gap.layer, 0))
            if self.cut is self.source:
                self.cut = self.source.copy()
                self._bare = {b: self.source[b].to("cpu", copy=True) for b in self._held}
            while self.source.layer < gap.behind:
                self.advance_source()
            target = self._within(gap.behind) if gap.within else self.source
            if gap.layer >= 0:
                self._advance_bare(gap.layer)
            yield gap, target
            self.cut.layer = gap.behind

    def advance(self, layer: int, only: range | None = None) -> None:
        """Advance the source, and the cuts if they exist already, to this layer; `only`: these batches."""
        for i in range(self.cut.layer, layer):
            with self._walk.layer(i):
                if self.source.layer == i:
                    self.advance_source(only)
                if self.cut is not self.source:
                    self._advance_bare(i)
                    self.advance_cut(i, only)

    def advance_source(self, only: range | None = None) -> None:
        """Advance the source by one layer."""
        if only is None:
            self._activations.advance(self._walk, self.source.layer, self.source)
        else:
            self._walk.advance(self.source.layer, self.source, only=only)
        self._progress.advance()

    def advance_cut(self, i: int, only: range | None = None) -> None:
        """Advance the cut through layer i with its present weights, without the removed sublayers."""
        with self._pruned(i):
            self._walk.advance(i, self.cut, only=only)

    def finish(self) -> Losses:
        """Run all three to the end of the model and return their losses on the held-out batches."""
        self.advance(self._walk.depth, self._held)
        loss = partial(walk_loss, self._walk, self.source.tokens, batches=self._held)
        return Losses(loss(self.source.__getitem__), loss(self._bare.__getitem__), loss(self.cut.__getitem__))

    @contextlib.contextmanager
    def _pruned(self, i: int) -> Iterator[None]:
        with self._walk.layer(i) as layer, pruned_layer(layer, i, self._gone, None, norm_eps(self._walk.model)):
            yield

    def _advance_bare(self, i: int) -> None:
        with self._pruned(i):
            for b in self._held:
                self._bare[b] = self._walk.call(i, b, self._bare[b]).cpu()

    def _within(self, i: int) -> States:
        """The residual stream of the source between the sublayers of layer i, from the input of that layer."""
        target = self.source.copy()
        with self._walk.layer(i) as layer:
            if self._midway.place(i, layer, partial(self._walk.call, i, 0, self.source[0])) is None:
                raise ArchitectureError(
                    f"layer {i} of {type(self._walk.model).__name__} runs attention and feed-forward in "
                    "parallel, so the removal of its attention alone cannot be compensated; use --heal none"
                )
            for b in range(len(target)):
                target[b] = self._midway.states(i, b, self.source[b])[0]
        return target
