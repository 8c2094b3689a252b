"""The fold: solve the maps into the residual stream before each gap again, so that the stream behind the gap is the
source's.

A gap is a run of sublayers that are removed (`slicer.heal.compensate.gaps`); the sublayer before it stays. On
calibration tokens the source has the residual stream x behind the gap, and the cut has there the stream h behind that
sublayer. With z the inputs of a map W of the sublayer into the stream, W is replaced by W + D, where D z approximates
x - h by least squares (`slicer.heal.compensate.regression`): `resolve`. `transform` is the special case D = (T - 1) W
of ReplaceMe (arXiv 2505.02819), whose T acts on the sublayer's output.

Each solution of `resolve` is kept only if it lowers L (see `objective`) on the held-out sequences; then all maps from
one layer before the first gap on take second-order steps (`slicer.heal.compensate.newton`). A model that is streamed
from disk gets the same, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter

import torch
from torch import nn

from slicer.checkpoint.architectures.table import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS
from slicer.errors import HealError, UsageError
from slicer.heal.compensate.gaps import Gap, GapPass
from slicer.heal.compensate.newton import STEPS, Newton
from slicer.heal.compensate.objective import ADAPTS, LIKELY, LOGITS, SAMPLE, Objective
from slicer.heal.compensate.regression import LayerFit, Solution, Split, gather, norm_gain, solve, split
from slicer.heal.patch import Holds, Solved
from slicer.model.output_maps import Output, find, parameters_after
from slicer.model.precision import HALVES
from slicer.model.pruned import Edits, LayerEdit, PrunedRun, edited, given, pruned_layer
from slicer.model.states import Batches, States
from slicer.model.walk import SourceActivations, Walk, walk_loss
from slicer.plan.plan import Plan
from slicer.plan.records import SOLVERS, Losses, SolvedMatrix
from slicer.progress import SILENT, Progress
from slicer.runtime.workdir import Stages

BEFORE = 1  # layers before the one of the first gap that take second-order steps too
_NORM_STEPS = 3  # Gauss-Newton steps where a norm follows the map


def fold(
    walk: Walk,
    batches: Batches,
    plan: Plan,
    *,
    holds: Holds,
    solver: str = SOLVERS[0],
    written: torch.dtype | None = None,
    adapt: bool = False,
    activations: SourceActivations | None = None,
    progress: Progress = SILENT,
) -> Solved:
    """Solve the maps before each gap that `plan` leaves again, in order, each on the states of the repaired model.

    `walk` is over the source; `batches` are int64 [batch, seq] without padding. `holds(i, name, module)`: whether the
    checkpoint holds the weights of a module of layer i under its name. `adapt`: whether the model is to be adapted to
    the kind of text too. `activations`, of the same model and batches, spares the next fold the pass through the
    source. New weights are rounded to the dtype `written` (None: the model's), so that they are judged as they will be
    read. A 16-bit model computes in float32.

    Raises HealError for too little text or where no weight can be changed, ArchitectureError where the attention of a
    layer is removed that runs beside its feed-forward sublayer.

    In the directory of `walk`, if it has one, finished stages are kept: a fold that was stopped resumes after them.
    """
    if solver not in SOLVERS:
        raise UsageError(f"fold {solver!r}: choose one of {', '.join(SOLVERS)}")
    data = split(batches)
    stored: torch.dtype = walk.model.dtype
    precision = str(torch.float32 if stored in HALVES else stored).removeprefix("torch.")
    with walk.reserved(_reserved(walk, data)), walk.in_float32():
        stages = Stages(walk.directory, _identity(walk, data, plan, solver, written, adapt))
        folding = _Folding(walk, data, plan, holds, solver, written, ADAPTS if adapt else 0.0, stages, progress)
        edits, report, losses = folding.run(activations)
    edits = {i: _in_own_dtype(walk.layers[i], edit) for i, edit in sorted(edits.items())}
    return Solved(edits, losses, "fold", solver, report=report, held_out=data.sequences, precision=precision)


def _identity(walk: Walk, data: Split, plan: Plan, solver: str, written: torch.dtype | None, adapt: bool) -> bytes:
    """Equal for folds of one source that may go on with each other's stages."""
    cut = (plan.kept, plan.no_attention, plan.no_ffn, plan.joined)
    shapes = [tuple(batch.shape) for batch in data.batches]
    values = (cut, solver, written, adapt, walk.model.dtype, walk.device.type, shapes)
    return repr(values).encode() + torch.cat(data.batches).numpy().tobytes()


def working_bytes(layer: int, d: int, f: int, vocabulary: int, *, casts: bool, tokens: int) -> int:
    """Bytes that a fold takes beside the stored model and the states.

    Args:
        layer: parameters of the largest layer.
        d, f: the hidden size, and the inputs of the widest matrix that is solved.
        vocabulary: rows of the head.
        casts: whether the model is one of 16 bits, which computes in float32: one layer, and a part of the head.
        tokens: those of a batch.

    These are the sums of a solve, 8 (f^2 + d f) bytes, with both ways to solve a layer, or those of a step,
    4 (f^2 + d f) and six matrices [d, d], with what differentiating a layer keeps of a batch.
    """
    copies = 4 * (layer + d * min(vocabulary, LIKELY + SAMPLE)) if casts else 0
    solving = 8 * (f**2 + d * f) + 8 * (d * f + d**2)
    stepping = 4 * (f**2 + d * f + 6 * d**2) + 4 * tokens * (10 * f + 20 * d)
    return copies + max(solving, stepping, 4 * 4 * min(LOGITS, tokens * vocabulary))


def _reserved(walk: Walk, data: Split) -> int:
    """`working_bytes` for the model of `walk`."""
    config, outputs = walk.model.config.get_text_config(), (*ATTENTION_OUTPUTS, *FEED_FORWARD_OUTPUTS)
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in walk.layers]
    maps = (shape for layer in shapes for name, shape in layer.items() if name.removesuffix(".weight") in outputs)
    return working_bytes(
        max(sum(map(math.prod, layer.values())) for layer in shapes),
        int(config.hidden_size),
        max((max(shape) for shape in maps), default=int(config.hidden_size)),
        int(config.vocab_size),
        casts=walk.model.dtype in HALVES,
        tokens=data.batches[0].numel(),
    )


@dataclass
class _Change:
    """New tensors of one layer while they are solved, as in `LayerEdit`, and what was solved."""

    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    transforms: dict[str, torch.Tensor] = field(default_factory=dict)
    report: list[SolvedMatrix] = field(default_factory=list)

    @property
    def edit(self) -> LayerEdit:
        return LayerEdit(self.parameters, self.transforms)


@dataclass
class _Folding:
    """One fold."""

    walk: Walk
    data: Split
    plan: Plan
    holds: Holds
    solver: str
    written: torch.dtype | None
    adapts: float
    stages: Stages
    progress: Progress
    changes: dict[int, _Change] = field(default_factory=dict)
    least: float = 0.0  # L on the held-out sequences, with what was kept so far
    nearest: tuple[float, int, _Change] | None = None  # of the changes that were not kept
    objective: Objective | None = None  # over the held-out sequences alone

    def run(self, activations: SourceActivations | None) -> tuple[Edits, tuple[SolvedMatrix, ...], Losses]:
        """(the edits, what was solved, the losses on the held-out sequences)."""
        self.progress.stage("Healing the cut", self.walk.depth, "layers")
        both = GapPass(self.walk, self.data, self.plan, activations, self.progress)
        if self.solver == "resolve":
            run, before = self._solutions(both)
            after = self._steps(run)
            if not self.changes and self.nearest is not None:  # who asked for a fold gets the least bad one
                after, layer, change = self.nearest
                self.changes = {layer: change}
            source = walk_loss(self.walk, both.source.tokens, both.source.__getitem__, self.data.held)
            losses = Losses(source, before, after)
        else:
            for gap, target in both:
                self._heal(gap, both, target)
            losses = both.finish()
        if not self.changes:
            raise HealError("no weights next to the cut can take the fold, or none gains by it; use --heal none")
        report = tuple(entry for _, change in sorted(self.changes.items()) for entry in change.report)
        return {i: change.edit for i, change in self.changes.items()}, report, losses

    def _solutions(self, both: GapPass) -> tuple[PrunedRun, float]:
        """Solve before every gap: the pruned model from one layer before the first gap on, and its loss as it was."""
        source, first = both.source, max(0, both.gaps[0].layer - BEFORE)
        done = self.stages.load("streams")
        if done is not None and all(gap.layer < 0 or self.stages.load(_name(gap)) for gap in both.gaps):
            streams, (before, self.least) = done
            origin = source.copy()
            for gap in both.gaps:
                self._decide(gap, both.cut, source)
            for b in range(len(source)):
                origin[b], source[b] = streams[f"origin.{b}"], streams[f"target.{b}"]
            origin.layer, source.layer = first, self.walk.depth
        else:
            both.advance(first)
            origin, ends = source.copy(), source.copy()
            for i in range(first, self.walk.depth):
                self.walk.advance(i, ends, only=self.data.held)
            self.objective = Objective(self.walk, ends, self.data.held, self.adapts)
            if (kept := self.stages.load("start")) is None:
                run = PrunedRun(self.walk, self.plan, origin, self.data.held)
                before, start = *run.losses([{}]), *self._judged(run, [_Change()])
                self.stages.save("start", {}, [before, start])
            else:
                before, start = kept[1]
            self.least = start
            for gap, target in both:
                self._heal(gap, both, target)
            while source.layer < self.walk.depth:
                both.advance_source()
            streams = {
                f"{name}.{b}": x
                for name, states in (("origin", origin), ("target", source))
                for b, x in enumerate(states)
            }
            self.stages.save("streams", streams, [before, start])
        return PrunedRun(self.walk, self.plan, origin, self.data.held, source), before

    def _heal(self, gap: Gap, both: GapPass, target: States) -> None:
        """Solve the sublayer before `gap` so that it puts out `target`, then advance the cut through its layer."""
        if gap.layer >= 0:
            self._decide(gap, both.cut, target)
            change = self.changes.get(gap.layer) or _Change()
            with self.walk.layer(gap.layer) as layer, edited(layer, change.edit):
                both.advance_cut(gap.layer)

    def _decide(self, gap: Gap, cut: States, target: States) -> None:
        """Enter the solution before `gap` into the changes, of `resolve` if it lowers the loss."""
        if gap.layer < 0:
            return
        kept = self.stages.load(_name(gap))
        if kept is None:
            loss, change = self._best(gap, cut, target)
            tensors = {f"p.{name}": t for name, t in change.parameters.items()}
            tensors |= {f"t.{name}": t for name, t in change.transforms.items()}
            self.stages.save(_name(gap), tensors, [loss, [entry.to_dict() for entry in change.report]])
        else:
            tensors, (loss, report) = kept
            change = _Change(report=[SolvedMatrix.of(entry) for entry in report])
            for name, tensor in tensors.items():
                into = change.parameters if name.startswith("p.") else change.transforms
                into[name[2:]] = tensor.to(self.walk.device)
        if change.report and (self.solver != "resolve" or loss < self.least):
            self.least, self.changes[gap.layer] = loss, change
        elif change.report and (self.nearest is None or loss < self.nearest[0]):
            self.nearest = loss, gap.layer, change

    def _best(self, gap: Gap, cut: States, target: States) -> tuple[float, _Change]:
        """(the loss on the held-out sequences, the solution with the least).

        Before a gap of whole layers `resolve` also tries to solve the attention first; before smaller gaps that only
        fits noise. What is not judged has no loss.
        """
        i, ways = gap.layer, list[tuple[str, ...]]([(gap.sublayer,)])
        whole = gap.sublayer == "ffn" and not gap.within
        if whole and self.solver == "resolve" and i not in self.plan.gone[0]:
            ways.append(("attention", "ffn"))
        with self.walk.layer(i) as layer, pruned_layer(layer, i, self.plan.gone, None, 0.0):
            fit = LayerFit(self.walk, i, layer, cut, target, self.data.held)
            solved = [change for way in ways if (change := self._solved(fit, way)).report]
        if not solved or self.solver != "resolve":
            return math.nan, solved[0] if solved else _Change()
        losses = self._judged(PrunedRun(self.walk, self.plan, cut, self.data.held), solved, i)
        known = [math.inf if math.isnan(loss) else loss for loss in losses]
        return min(zip(known, solved, strict=True), key=itemgetter(0))

    def _judged(self, run: PrunedRun, changes: Sequence[_Change], i: int = 0) -> list[float]:
        """L on the held-out sequences of the pruned model with each of these changes of layer i."""
        assert self.objective is not None
        ends = run.ends(run.held, [given({i: change.edit}) for change in changes])
        return [loss for loss, _ in self.objective.judge(ends)]

    def _steps(self, run: PrunedRun) -> float:
        """Second-order steps from the changes so far; the loss on the held-out sequences after them."""
        self.progress.stage("Healing the cut: second-order steps", STEPS, "steps")
        edits = {i: change.edit for i, change in self.changes.items()}
        newton = Newton(run, edits, self.holds, self.written, self.stages, self.adapts)
        number, going = 0, True
        if (kept := self.stages.load("steps")) is not None:
            tensors, (number, going, *state) = kept
            newton.resume(tensors, state, ends=not going or number == STEPS)
        while going and number < STEPS:
            going, number = newton.step(number), number + 1
            tensors, state = newton.state
            self.stages.save("steps", tensors, [number, going, *state])
            self.progress.advance()
        for matrix, weight, relative in newton.stepped():
            change = self.changes.setdefault(matrix.layer, _Change())
            change.parameters[matrix.key] = weight
            change.report.append(SolvedMatrix(matrix.layer, matrix.name, "newton", change=round(relative, 6)))
        return run.losses([{i: change.edit for i, change in self.changes.items()}])[0]

    def _solved(self, fit: LayerFit, sublayers: Sequence[str]) -> _Change:
        """The new weights of one layer, sublayer after sublayer."""
        change = _Change()
        for sublayer in sublayers:
            for output in find(fit.layer, fit.run, sublayer, partial(self.holds, fit.i)):
                self._solve(fit, output, change)
        for name, tensor in change.parameters.items():
            change.parameters[name] = tensor.to(self.written or tensor.dtype).to(tensor.dtype)
        return change

    def _solve(self, fit: LayerFit, output: Output, change: _Change) -> None:
        """Enter the solution of one output into `change`."""
        for _ in range(_NORM_STEPS if output.kind == "normed" else 1):
            with edited(fit.layer, change.edit):
                solution = solve(gather(fit, output, self.solver))
                if solution is None:
                    break
                _put(output, solution, self.solver, change)
            change.report.append(
                SolvedMatrix(fit.i, output.name, output.kind, solution.strength, round(solution.left, 6))
            )
        if output.norm is None or not self.holds(fit.i, output.norm, fit.layer.get_submodule(output.norm)):
            return
        with edited(fit.layer, change.edit):
            more, left = norm_gain(fit, output)
            if left < 1:
                gain = fit.layer.get_submodule(output.norm).weight
                assert isinstance(gain, torch.Tensor)
                change.parameters[f"{output.norm}.weight"] = (gain.double() + more).to(gain.dtype)
                change.report.append(SolvedMatrix(fit.i, output.norm, "gain", error_left=round(left, 6)))


def _put(output: Output, solution: Solution, solver: str, change: _Change) -> None:
    """Enter the solution into `change`; called while the changes so far are applied."""
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


def _in_own_dtype(layer: nn.Module, edit: LayerEdit) -> LayerEdit:
    """Rounded, where it was solved in a higher precision than the layer's."""
    own = dict(layer.named_parameters())
    return replace(edit, parameters={name: t.to(own[name].dtype) for name, t in edit.parameters.items()})


def _name(gap: Gap) -> str:
    """Of the stage that keeps the solution before a gap."""
    return f"gap-{gap.start}"
