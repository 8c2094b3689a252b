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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from slicer.errors import HealError, UsageError
from slicer.heal.least_squares import Solution, solve
from slicer.heal.newton import STEPS, Newton
from slicer.heal.outputs import LayerChange, Output, applied, find, parameters_after
from slicer.heal.rows import SINKS, gather, norm_gain
from slicer.measure.states import States
from slicer.measure.stream import Walk
from slicer.progress import Progress

SOLVERS = ("resolve", "transform")
HELD_OUT = 16  # one sequence in so many (at least one) chooses the strengths and gives the figures
_NORM_STEPS = 3  # Gauss-Newton steps where a norm follows the map
MIN_SEQUENCES = 4
TOGETHER = 1024  # tokens in a batch, at most: gradients need all that the layers behind the cut compute on it
BEFORE = 1  # layers before the first changed one that take second-order steps too
AFTER = 4  # layers behind a cut that are solved again toward the source's stream

Storable = Callable[[int, str, nn.Module], bool]


@dataclass(frozen=True)
class Fold:
    """`changes`: layer of the source -> its new weights. `losses`: nats a token on the sequences held out: "source",
    "sliced" and "healed"."""

    changes: dict[int, LayerChange]
    losses: dict[str, float]


def blocks(dropped: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) of each run of neighbouring dropped layers."""
    runs: list[tuple[int, int]] = []
    for i in sorted(dropped):
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def fold(
    walk: Walk,
    batches: Sequence[torch.Tensor],
    dropped: Sequence[int],
    *,
    storable: Storable,
    solver: str = "resolve",
    progress: Progress | None = None,
) -> Fold:
    """Solve the layers around each dropped block again, in order, each on the states of the already healed model.

    `walk` goes over the source; `batches` are int64 [batch, seq] without padding. `storable(i, name, module)` says
    whether the checkpoint holds the weights of a module of layer i under its name. Of `resolve`, over a loaded model,
    only those steps are kept that lower the loss on the sequences held out. Raises HealError when there are too few
    tokens, or no layer that could be changed.
    """
    if solver not in SOLVERS:
        raise UsageError(f"fold {solver!r}: choose one of {', '.join(SOLVERS)}")
    progress = progress or Progress()
    runs = blocks(dropped)
    data = split(batches)
    healer = _Healer(walk, data, dropped, storable, solver, walk.loaded and solver == "resolve")
    progress.stage("Healing the cut", walk.depth if healer.judges else runs[-1][1], "layers")
    source = walk.start(data.batches)
    first = max(0, runs[0][0] - 1 - BEFORE)
    while source.layer < first:
        walk.advance(source.layer, source)
        progress.advance()
    origin = source.copy() if healer.judges else None
    student: States | None = None
    for at, (start, end) in enumerate(runs):
        before = start - 1  # the layer to change; -1 where the model's first layers are dropped
        for i in range(source.layer, max(before, 0)):
            walk.advance(i, source)
            if student is not None:
                walk.advance(i, student)
            progress.advance()
        student = source.copy() if student is None else student
        for i in range(source.layer, end):
            walk.advance(i, source)
            progress.advance()
        if start > 0:
            healer.heal(before, student, source, attention=True)
        student.layer = end
        if healer.judges:
            until = runs[at + 1][0] - 1 if at + 1 < len(runs) else walk.depth
            for i in range(end, min(until, end + AFTER)):
                walk.advance(i, source)
                healer.heal(i, student, source, attention=False)
                progress.advance()
    changes = {i: change for i, change in healer.changes.items() if change.report}
    if not changes and healer.nearest is not None:  # who asked for a fold gets the least bad, and its figures
        loss, change = healer.nearest
        healer.losses.append(loss)
        changes = {change.layer: change}
    if not changes:
        raise HealError("no weights next to the cut can take the fold, or none gains by it; use --heal none")
    if not healer.judges:
        return Fold(changes, losses(walk, batches, dropped, changes))
    for i in range(source.layer, walk.depth):
        walk.advance(i, source)
        progress.advance()
    figures = {
        "source": _loss(walk, source, data.held),
        "sliced": healer.losses[0],
        "healed": healer.losses[-1],
    }
    if origin is not None:
        changes, loss = _second_order(walk, data, dropped, changes, origin, source, storable)
        figures["healed"] = loss
    return Fold(changes, figures)


def _second_order(
    walk: Walk,
    data: Split,
    dropped: Sequence[int],
    changes: dict[int, LayerChange],
    origin: States,
    target: States,
    storable: Storable,
) -> tuple[dict[int, LayerChange], float]:
    """`changes` after steps on the loss itself, and the loss on the sequences held out."""
    kept = [i for i in range(origin.layer, walk.depth) if i not in dropped]
    with contextlib.ExitStack() as stack:
        for i, change in changes.items():
            stack.enter_context(applied(walk.layers[i], change))
        newton = stack.enter_context(Newton(walk, kept, origin, target, data.held, storable))
        for number in range(STEPS):
            if not newton.step(number):
                break
        for i in kept:
            walk.advance(i, origin, only=data.held)
        return newton.changes(changes), _loss(walk, origin, data.held)


@dataclass(frozen=True)
class Split:
    """Calibration batches with the sequences held out in batches of their own: `held` are the numbers of those."""

    batches: list[torch.Tensor]
    held: range


def split(batches: Sequence[torch.Tensor]) -> Split:
    """Set one sequence in `HELD_OUT` apart, to choose the strengths and give the figures.

    Raises HealError when there are too few sequences to set any apart.
    """
    held = held_out_sequences(batches)
    size = max(1, min(len(batches[0]), TOGETHER // batches[0].shape[1]))
    sequences = torch.cat(list(batches))
    apart = torch.zeros(len(sequences), dtype=torch.bool)
    apart[sorted(held)] = True
    fitted = list(torch.split(sequences[~apart], size))
    both = fitted + list(torch.split(sequences[apart], size))
    return Split(both, range(len(fitted), len(both)))


def held_out_sequences(batches: Sequence[torch.Tensor]) -> set[int]:
    """Numbers, over all batches, of the sequences held out. Raises HealError when there are too few."""
    count, length = sum(len(batch) for batch in batches), batches[0].shape[1] if batches else 0
    if count < MIN_SEQUENCES or length <= 2 * SINKS:
        raise HealError(
            f"{count} calibration sequences of {length} tokens are too few to heal on; give at least "
            f"{MIN_SEQUENCES} of {2 * SINKS + 1} (--samples, --seq-len)"
        )
    return set(range(HELD_OUT // 2, count, HELD_OUT)) or {count // 2}


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
    return {name: _loss(walk, states, range(len(states))) for name, states in named.items()}


def _loss(walk: Walk, states: States, batches: Iterable[int]) -> float:
    """Mean next-token cross entropy, nats; one sequence at a time, for the logits are large."""
    sums = [_cross_entropy(walk, states.tokens[b], states[b]) for b in batches]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _cross_entropy(walk: Walk, tokens: torch.Tensor, last: torch.Tensor) -> tuple[float, int]:
    total = 0.0
    for row in range(len(tokens)):
        one = tokens[row : row + 1]
        logits = walk.head(one, last[row : row + 1])[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, one[0, 1:].to(logits.device), reduction="sum"))
    return total, len(tokens) * (tokens.shape[1] - 1)


# --- one layer --------------------------------------------------------------------------------------------------------


class _Healer:
    """Heals one layer after another.

    Attributes:
        judges: whether each step is kept only if it lowers the loss on the sequences held out.
        changes: layer -> its new weights.
        losses: of the bare cut, and after every step that was kept.
        nearest: loss and change of the best step that was not kept.
    """

    def __init__(
        self, walk: Walk, data: Split, dropped: Sequence[int], storable: Storable, solver: str, judges: bool
    ) -> None:
        self._walk, self._data, self._dropped = walk, data, set(dropped)
        self._storable, self._solver, self.judges = storable, solver, judges
        self.changes: dict[int, LayerChange] = {}
        self.losses: list[float] = []
        self.nearest: tuple[float, LayerChange] | None = None

    def heal(self, i: int, student: States, target: States, *, attention: bool) -> None:
        """Solve layer i so that it puts out `target` when given `student`, which is then advanced through it.

        The feed-forward part alone and, with `attention`, the attention's output first.
        """
        best = LayerChange(i)
        with self._walk.layer(i) as layer:
            if self.judges and not self.losses:
                self.losses.append(self._loss(i, student))
            for parts in (
                ((False,), (True, False)) if attention and self._solver == "resolve" else ((False,),)
            ):
                change = self._solved(layer, i, student, target, parts)
                if not change.report:
                    continue
                if self.judges:
                    with applied(layer, change):
                        loss = self._loss(i, student)
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

    def _loss(self, i: int, student: States) -> float:
        """On the sequences held out, of the model from layer i on as it is now."""
        sums = []
        for b in self._data.held:
            states = student[b]
            for j in range(i, self._walk.depth):
                if j not in self._dropped:
                    states = self._walk.call(j, b, states)
            sums.append(_cross_entropy(self._walk, self._data.batches[b], states))
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
