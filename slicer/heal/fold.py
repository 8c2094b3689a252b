"""Healing in closed form: the maps into the residual stream before a cut are solved again, so that the stream arrives
behind the cut as it did in the source.

Layer i is the last one kept before the dropped block i+1 .. i+n. On calibration tokens the source has the residual
stream x(i+n+1) behind the block; the sliced model has there what layer i puts out, h. With z the inputs of a map W of
layer i into the stream, W is replaced by W + D, where D z approximates x(i+n+1) - h by least squares (ridge; see
`least_squares`): `resolve`. `transform` is the special case D = (T - 1) W of ReplaceMe (arXiv 2505.02819), whose T acts
on the feed-forward part's output.

Tokens are weighted by 1 / |x(i+n+1)|^2, because the norms behind the cut see the stream relative to its length; the
first positions of each sequence (attention sinks) are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from slicer.errors import HealError, UsageError
from slicer.heal.held import loss, split
from slicer.heal.layerwise import Healer, Storable
from slicer.heal.newton import STEPS, Newton
from slicer.heal.outputs import LayerChange, applied
from slicer.measure.states import Course, States
from slicer.measure.stream import Walk
from slicer.plan.amounts import runs
from slicer.progress import Progress

_NOTHING = "no weights next to the cut can take the fold, or none gains by it; use --heal none"
SOLVERS = ("resolve", "transform")
BEFORE = 1  # layers before the first changed one that take second-order steps too


@dataclass(frozen=True)
class Fold:
    """`changes`: layer of the source -> its new weights. `losses`: nats a token on the sequences held out: "source",
    "sliced" and "healed"."""

    changes: dict[int, LayerChange]
    losses: dict[str, float]


def fold(
    walk: Walk,
    batches: Sequence[torch.Tensor],
    dropped: Sequence[int],
    *,
    storable: Storable,
    solver: str = "resolve",
    written: torch.dtype | None = None,
    course: Course | None = None,
    progress: Progress | None = None,
) -> Fold:
    """Solve the layers around each dropped block again, in order, each on the states of the already healed model.

    `walk` goes over the source; `batches` are int64 [batch, seq] without padding. `storable(i, name, module)` says
    whether the checkpoint holds the weights of a module of layer i under its name. Of `resolve`, over a loaded model,
    only those steps are kept that lower the loss on the sequences held out. `course`, of the same model and batches,
    spares the next fold the way through the source. New weights are rounded to the dtype `written` (None: the model's),
    so that they are judged as they will be read. Raises HealError when there are too few tokens, or no layer that could
    be changed.
    """
    if solver not in SOLVERS:
        raise UsageError(f"fold {solver!r}: choose one of {', '.join(SOLVERS)}")
    progress, course = progress or Progress(), course or Course(0)
    gaps = runs(dropped)
    data = split(batches)
    judges = walk.loaded and solver == "resolve"
    healer = Healer(walk, data, dropped, storable, solver, judges, written)
    progress.stage("Healing the cut", walk.depth if healer.judges else gaps[-1][1], "layers")
    source = walk.start(data.batches)
    first = max(0, gaps[0][0] - 1 - BEFORE)
    while source.layer < first:
        course.advance(walk, source.layer, source)
        progress.advance()
    origin = source.copy() if healer.judges else None
    if origin is not None:
        healer.losses.append(healer.loss(first, origin))
    student: States | None = None
    for start, end in gaps:
        before = start - 1  # the layer to change; -1 where the model's first layers are dropped
        for i in range(source.layer, max(before, 0)):
            course.advance(walk, i, source)
            if student is not None:
                walk.advance(i, student)
            progress.advance()
        student = source.copy() if student is None else student
        for i in range(source.layer, end):
            course.advance(walk, i, source)
            progress.advance()
        if start > 0:
            healer.heal(before, student, source)
        student.layer = end
    changes = {i: change for i, change in healer.changes.items() if change.report}
    if origin is None:
        if not changes:
            raise HealError(_NOTHING)
        return Fold(changes, losses(walk, batches, dropped, changes))
    for i in range(source.layer, walk.depth):
        course.advance(walk, i, source)
        progress.advance()
    progress.stage("Healing the cut: second-order steps", STEPS, "steps")
    kept = [i for i in range(first, walk.depth) if i not in dropped]
    with contextlib.ExitStack() as stack:
        for i, change in changes.items():
            stack.enter_context(applied(walk.layers[i], change))
        newton = stack.enter_context(Newton(walk, kept, origin, source, data.held, storable, written))
        for number in range(STEPS):
            if not newton.step(number):
                break
            progress.advance()
        changes = newton.changes(changes)
        healed = healer.loss(first, origin)
    if not changes and healer.nearest is not None:  # who asked for a fold gets the least bad, and its figures
        healed, change = healer.nearest
        changes = {change.layer: change}
    if not changes:
        raise HealError(_NOTHING)
    figures = {"source": loss(walk, source, data.held), "sliced": healer.losses[0], "healed": healed}
    return Fold(changes, figures)


def losses(
    walk: Walk, batches: Sequence[torch.Tensor], dropped: Sequence[int], changes: Mapping[int, LayerChange]
) -> dict[str, float]:
    """Nats a token on the sequences held out of the fits: "source", "sliced" (layers dropped, nothing healed) and
    "healed"; all three in one pass over the layers."""
    data = split(batches)
    source = walk.start([data.batches[b] for b in data.held])
    sliced, healed = source.copy(), source.copy()
    for i in range(walk.depth):
        with walk.layer(i) as layer:
            walk.advance(i, source)
            if i in dropped:
                sliced.layer = healed.layer = i + 1
                continue
            walk.advance(i, sliced)
            with applied(layer, changes[i]) if i in changes else contextlib.nullcontext():
                walk.advance(i, healed)
    named = {"source": source, "sliced": sliced, "healed": healed}
    return {name: loss(walk, states, range(len(states))) for name, states in named.items()}
