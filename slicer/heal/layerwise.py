"""Least squares on one layer after another: where a change is judged, it is kept only if it lowers the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from slicer.heal.held import Split, cross_entropy
from slicer.heal.least_squares import Solution, solve
from slicer.heal.outputs import LayerChange, Output, applied, find, parameters_after
from slicer.heal.rows import gather, norm_gain
from slicer.measure.states import States
from slicer.measure.stream import Walk

_NORM_STEPS = 3  # Gauss-Newton steps where a norm follows the map

Storable = Callable[[int, str, nn.Module], bool]


class Healer:
    """Heals one layer after another.

    Attributes:
        judges: whether each step is kept only if it lowers the loss on the sequences held out.
        changes: layer -> its new weights, rounded to the dtype `written` (None: their own).
        losses: of the bare cut, and after every step that was kept.
        nearest: loss and change of the best step that was not kept.
    """

    def __init__(
        self,
        walk: Walk,
        data: Split,
        dropped: Sequence[int],
        storable: Storable,
        solver: str,
        judges: bool,
        written: torch.dtype | None = None,
    ) -> None:
        self._walk, self._data, self._dropped = walk, data, set(dropped)
        self._storable, self._solver, self.judges = storable, solver, judges
        self._written = written
        self.changes: dict[int, LayerChange] = {}
        self.losses: list[float] = []
        self.nearest: tuple[float, LayerChange] | None = None

    def heal(self, i: int, student: States, target: States) -> None:
        """Solve layer i so that it puts out `target` when given `student`, which is then advanced through it.

        The feed-forward part alone; for `resolve` also with the attention's output first, where that is better.
        """
        best = LayerChange(i)
        with self._walk.layer(i) as layer:
            for parts in ((False,), (True, False)) if self._solver == "resolve" else ((False,),):
                change = self._solved(layer, i, student, target, parts)
                if not change.report:
                    continue
                if self.judges:
                    with applied(layer, change):
                        loss = self.loss(i, student)
                    if not loss < self.losses[-1]:
                        if self.nearest is None or loss < self.nearest[0]:
                            self.nearest = loss, change
                        continue
                    self.losses.append(loss)
                best = change
                if not self.judges:
                    break
            self.changes[i] = best
            with applied(layer, best):
                self._walk.advance(i, student)

    def loss(self, i: int, student: States) -> float:
        """On the sequences held out, of the model from layer i on as it is now."""
        sums = []
        for b in self._data.held:
            states = student[b]
            for j in range(i, self._walk.depth):
                if j not in self._dropped:
                    states = self._walk.call(j, b, states)
            sums.append(cross_entropy(self._walk, self._data.batches[b], states))
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    def _solved(
        self, layer: nn.Module, i: int, student: States, target: States, parts: Sequence[bool]
    ) -> LayerChange:
        """The new weights of one layer, part after part: its attention (True), its feed-forward part (False)."""
        change = LayerChange(i)
        for attention in parts:
            outputs = find(
                layer,
                partial(self._walk.call, i, 0, student[0]),
                attention=attention,
                storable=partial(self._storable, i),
            )
            for output in outputs:
                self._solve(layer, i, output, student, target, change)
        for name, tensor in change.parameters.items():
            change.parameters[name] = tensor.to(self._written or tensor.dtype).to(tensor.dtype)
        return change

    def _solve(
        self, layer: nn.Module, i: int, output: Output, student: States, target: States, change: LayerChange
    ) -> None:
        """Enter the solution of one output into `change`."""
        held = self._data.held
        for _ in range(_NORM_STEPS if output.kind == "normed" else 1):
            with applied(layer, change):
                solution = solve(gather(self._walk, layer, i, output, student, target, held, self._solver))
                if solution is None:
                    break
                _put(output, solution, self._solver, change)
            change.report.append(
                {
                    "layer": i,
                    "module": output.name,
                    "way": output.kind,
                    "strength": solution.strength,
                    "error_left": round(solution.left, 6),
                }
            )
        if output.norm is not None and self._storable(i, output.norm, layer.get_submodule(output.norm)):
            with applied(layer, change):
                more, left = norm_gain(self._walk, i, layer, output, student, target, held)
                if left < 1:
                    gain = layer.get_submodule(output.norm).weight
                    assert isinstance(gain, torch.Tensor)
                    change.parameters[f"{output.norm}.weight"] = (gain.double() + more).to(gain.dtype)
                    change.report.append(
                        {"layer": i, "module": output.norm, "way": "gain", "error_left": round(left, 6)}
                    )


def _put(output: Output, solution: Solution, solver: str, change: LayerChange) -> None:
    """Enter the solution into `change`; called where what `change` says already is applied."""
    if output.kind == "experts":
        unit = torch.eye(len(solution.delta), dtype=torch.float64, device=solution.delta.device)
        change.transforms[output.name] = (unit + solution.delta).float()
    elif solver == "transform":
        delta = solution.delta @ output.weight.double()
        bias = output.bias
        if bias is not None:
            delta = torch.cat([delta, (solution.delta @ bias.double())[:, None]], dim=1)
        change.parameters.update(parameters_after(output, delta))
    else:
        change.parameters.update(parameters_after(output, solution.delta))
