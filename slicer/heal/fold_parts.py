"""The fold of a cut below the layer: the matrix before every gap solved again, then second-order steps on the loss.

As with whole layers (`slicer.heal.fold`), but parts are silent and layers joined. A gap's solution is kept where it
lowers the loss on the sequences held out, gap by gap; the steps go over the output matrices of all parts that stay,
from one layer before the first gap's on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from slicer.checkpoint.parts import attention_outputs, ffn_outputs
from slicer.errors import HealError
from slicer.heal.cut import Cut, those
from slicer.heal.emulate import emulate
from slicer.heal.emulation import Emulated, Emulation, output_matrix
from slicer.heal.fold import BEFORE
from slicer.heal.held import split
from slicer.heal.newton import STEPS, Newton
from slicer.heal.precision import in_float32
from slicer.measure.stream import Walk
from slicer.plan.plan import Plan
from slicer.progress import Progress


def fold_parts(
    walk: Walk,
    batches: Sequence[torch.Tensor],
    plan: Plan,
    *,
    storable: Callable[[str, int], bool] = lambda part, layer: True,
    progress: Progress | None = None,
) -> Emulated:
    """Fold the cut of `plan`, over the source of which `walk` goes, on `batches` (int64 [batch, seq], no padding).

    `storable(part, layer)`: whether the checkpoint has the output matrix of "attention" or "ffn" of a layer. Read from
    disk, a model gets the solutions alone, judged by their squared error. Raises HealError for too little text,
    ArchitectureError where a layer's parts are not known or run side by side.
    """
    progress = progress or Progress()
    if not walk.loaded:
        return emulate(walk, batches, plan, "fold", progress=progress)
    written = walk.model.dtype
    with in_float32(walk.model):
        return _folded(walk, batches, plan, storable, written, progress)


def _folded(
    walk: Walk,
    batches: Sequence[torch.Tensor],
    plan: Plan,
    storable: Callable[[str, int], bool],
    written: torch.dtype,
    progress: Progress,
) -> Emulated:
    """As `fold_parts`; new weights are rounded to `written`, so that they are judged as they will be read."""
    found = emulate(walk, batches, plan, "fold", progress=progress)
    rounded = {
        anchor: replace(e, weight=None if e.weight is None else e.weight.to(written).to(e.weight.dtype))
        for anchor, e in found.by_anchor.items()
    }
    found = replace(found, by_anchor=rounded)
    data = split(batches)
    cut = Cut(walk, data, plan, max(0, _before_first_gap(plan) - BEFORE))
    kept = those(found, set())
    least = cut.loss(kept)
    for anchor in found.by_anchor:
        more = those(found, {*kept.by_anchor, anchor})
        now = cut.loss(more)
        if now < least:
            kept, least = more, now
    steppable = _Steppable(walk, plan, storable)
    progress.stage("Healing the cut: second-order steps", STEPS, "steps")
    with contextlib.ExitStack() as stack:
        cut.attach(stack, kept)
        newton = stack.enter_context(
            Newton(walk, cut.layers, cut.origin, cut.target, data.held, steppable, written)
        )
        for number in range(STEPS):
            if not newton.step(number):
                break
            progress.advance()
        changes = newton.changes({})
        healed = cut.loss()
    by_anchor = dict(kept.by_anchor)
    for change in changes.values():
        for entry in change.report:
            part = steppable.parts[change.layer, entry["module"]]
            weight = change.parameters[f"{entry['module']}.weight"]
            module = walk.layers[change.layer].get_submodule(entry["module"])
            weight = weight.T if type(module).__name__ == "Conv1D" else weight
            solved = by_anchor.get((part, change.layer), Emulation(part, change.layer, None))
            by_anchor[part, change.layer] = replace(solved, weight=weight, change=entry["change"])
    return replace(found, by_anchor=by_anchor, losses={**found.losses, "emulated": healed})


def _before_first_gap(plan: Plan) -> int:
    """The layer of the part that stands before the first gap; -1 where none does."""
    no_attention, no_ffn = plan.gone
    return min([*(i - 1 for i in no_attention), *no_ffn])


class _Steppable:
    """Which modules take steps: the output matrices of parts that stay. `parts`: (layer, module) -> whose it is."""

    def __init__(self, walk: Walk, plan: Plan, storable: Callable[[str, int], bool]) -> None:
        self._walk, self._storable = walk, storable
        self._gone = dict(zip(("attention", "ffn"), plan.gone, strict=True))
        self.parts: dict[tuple[int, str], str] = {}

    def __call__(self, i: int, name: str, module: nn.Module) -> bool:
        layer = self._walk.layers[i]
        for part, outputs in (("attention", attention_outputs(layer)), ("ffn", ffn_outputs(layer))):
            if i in self._gone[part] or not self._storable(part, i):
                continue
            try:
                if output_matrix(outputs) is module:
                    self.parts[i, name] = part
                    return True
            except HealError:  # a mixture of experts: its last matrices are many
                continue
        return False
