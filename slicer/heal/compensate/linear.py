"""Replacements of removed sublayers: a constant or a low-rank linear map, solved in closed form, then trained.

A gap is a run of removed sublayers between two that stay. h is the residual stream at its start, in the cut as repaired
so far, and x the source's stream at its end. Over calibration tokens t of weight w_t = 1 / |x_t|^2:

    bias    c = weighted mean of x_t - h_t
    linear  B z_t + c, z_t = g h_t / |h_t| (the norm of the first sublayer removed), of rank r: the ridge solution
            projected on the r directions in which its own fit varies most (reduced-rank regression, Izenman 1975)

Ridge strengths are chosen on the held-out sequences, and a replacement is kept only if it lowers the squared error
there. Gaps are filled in order. A constant is written into the output bias of the sublayer before the gap, which is
exact: no sublayer that stays reads the stream in between.

`train` then takes steps of Adam on these parameters alone, on the loss L of `slicer.heal.compensate.objective`: a batch
of calibration sequences per step, in an order drawn by the seed. A parameter moves at most about `RATE` of its own root
mean square in a step, less toward the end. The result is the step, or the start, with the lowest L on the held-out
sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from slicer.errors import HealError
from slicer.heal.compensate.gaps import Gap, GapPass
from slicer.heal.compensate.objective import Objective
from slicer.heal.compensate.regression import SINKS, NormalEquations, Split, reduced_rank, solve, split, token_weights
from slicer.heal.patch import Solved, check_method
from slicer.model.layers import norm_eps
from slicer.model.pruned import Edits, LayerEdit, PrunedRun, Replacement
from slicer.model.states import Batches, States
from slicer.model.walk import Walk
from slicer.plan.plan import Plan
from slicer.plan.records import SolvedMatrix
from slicer.progress import SILENT, Progress

RATE = 0.02
WARM_UP = 0.1  # share of the steps during which the rate rises
JUDGED = 16  # number of times that L is computed on the held-out sequences
_BETAS = (0.9, 0.99)
_TRAINED = ("bias", "down", "up")


def linear(
    walk: Walk, batches: Batches, plan: Plan, method: str, rank: int | None = None, *, progress: Progress = SILENT
) -> Solved:
    """Replace the sublayers that `plan` removes from the source of `walk` by `method`: "bias", or "linear" of `rank`.

    `batches`: int64 [batch, seq], no padding. Raises HealError for too little text or if no sublayer stays before a
    gap, ArchitectureError if the attention of a layer with parallel attention and feed-forward is removed alone.
    """
    check_method(method, rank, walk.model.config.get_text_config().hidden_size)
    rank = rank if method == "linear" else None
    data = split(batches)
    progress.stage("Replacing the removed sublayers", walk.depth, "layers")
    both, eps = GapPass(walk, data, plan, None, progress), norm_eps(walk.model)
    edits: dict[int, LayerEdit] = {}
    report = []
    for gap, target in both:
        if gap.layer < 0:
            raise HealError(
                f"no sublayer stays before the {'ffn' if gap.start % 2 else 'attention'} of layer {gap.start // 2}, so "
                "a replacement cannot be added behind one; keep the first layer, or heal with --heal fold"
            )
        both.advance_cut(gap.layer)
        rows = partial(_rows, both.cut, target)
        found = _constant(rows, data) if rank is None else _low_rank(rows, data, _gain(walk, gap), rank, eps)
        if found is None or not found[1] < 1:
            continue
        replacement, left = found
        edits[gap.layer] = LayerEdit(behind={gap.sublayer: replacement})
        report.append(SolvedMatrix(gap.layer, gap.sublayer, method, error_left=round(left, 6)))
        for b in range(len(both.cut)):
            both.cut[b] = both.cut[b] + replacement.update(both.cut[b], eps)
    return Solved(edits, both.finish(), method, rank=rank, report=tuple(report), held_out=data.sequences)


Row = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]


def _rows(cut: States, target: States) -> Iterator[Row]:
    """(batch, h [tokens, d], x - h, weight) without the first positions."""
    for b in range(len(cut)):
        h, x = (states[b][:, SINKS:].float().flatten(0, 1) for states in (cut, target))
        yield b, h, x - h, token_weights(x)


def _constant(rows: partial[Iterator[Row]], data: Split) -> tuple[Replacement, float]:
    """(the constant, the share of the squared error left on the held-out sequences)."""
    total: Any = 0.0
    weights = 0.0
    for b, _, change, weight in rows():
        if b not in data.held:
            total += (weight[:, None] * change).sum(0, dtype=torch.float64)
            weights += float(weight.sum())
    bias = (total / weights).float()
    before = after = 0.0
    for b, _, change, weight in rows():
        if b in data.held:
            before += float((weight[:, None] * change.square()).sum())
            after += float((weight[:, None] * (change - bias).square()).sum())
    return Replacement(bias), after / max(before, 1e-30)


def _low_rank(
    rows: partial[Iterator[Row]], data: Split, gain: torch.Tensor, rank: int, eps: float
) -> tuple[Replacement, float] | None:
    """(the map, the share of the squared error left on the held-out sequences); None if nothing lowers that."""
    equations: NormalEquations | None = None
    for b, h, change, weight in rows():
        z = gain * nn.functional.rms_norm(h, h.shape[-1:], None, eps)
        z = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        equations = equations or NormalEquations(z.shape[1], change.shape[1])
        equations.add(z, change, weight, held_out=b in data.held)
    assert equations is not None
    solution = solve(equations)
    if solution is None:
        return None
    down, up, c = reduced_rank(solution, equations, rank)
    left = equations.error(torch.cat([up @ down, c[:, None]], 1).__getitem__) / max(equations.error(None), 1e-30)
    return Replacement(c.float(), gain, down.float(), up.float()), left


def _gain(walk: Walk, gap: Gap) -> torch.Tensor:
    """The weight of the norm before the first sublayer removed."""
    name = "post_attention_layernorm" if gap.start % 2 else "input_layernorm"
    with walk.layer(gap.start // 2) as layer:
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach().float().cpu()


def train(
    walk: Walk, batches: Batches, plan: Plan, solved: Solved, steps: int, *, seed: int = 0, progress: Progress = SILENT
) -> Solved:
    """`solved` after this number of training steps; the same bytes for the same seed.

    `batches` and `plan`: those of the fit of `solved`. Raises HealError for a model that is streamed from disk,
    because every step would read it again.
    """
    if not walk.loaded:
        raise HealError("--heal-steps: training needs the model in memory; leave it out")
    losses = replace(solved.losses, solved=solved.losses.after)
    if not solved.edits:
        return replace(solved, losses=losses, steps=steps)
    with walk.in_float32():
        training = ReplacementTraining(walk, split(batches), plan, solved.edits)
        best, edits = training.run(steps, seed, progress)
        losses = replace(losses, after=training.pruned.losses([edits])[0])
    return replace(solved, edits=edits, losses=losses, steps=steps, best_step=best)


class ReplacementTraining:
    """Trains the replacements of `edits`. Attributes: `pruned`: the cut; `leaves`: the edits in training."""

    def __init__(self, walk: Walk, data: Split, plan: Plan, edits: Edits) -> None:
        self.pruned = PrunedRun.of_source(walk, plan, data.batches, data.held, min(edits))
        self._objective = Objective(walk, self.pruned.target, data.held)
        self.leaves = {
            i: _mapped(edit, lambda t: t.detach().float().clone().requires_grad_()) for i, edit in edits.items()
        }
        self._parameters = [
            tensor
            for edit in self.leaves.values()
            for replacement in edit.behind.values()
            for name in _TRAINED
            if (tensor := getattr(replacement, name)) is not None
        ]

    def run(self, steps: int, seed: int, progress: Progress) -> tuple[int, Edits]:
        """(the best step, the edits there)."""
        progress.stage("Training the replacements", steps, "steps")
        groups = [{"params": [p], "size": float(p.detach().square().mean().sqrt())} for p in self._parameters]
        optimizer = torch.optim.Adam(groups, betas=_BETAS)
        generator = torch.Generator().manual_seed(seed)
        fitted = [b for b in range(len(self.pruned.origin)) if b not in self.pruned.held]
        queue: list[int] = []
        every = max(1, steps // JUDGED)
        with self.pruned.prepared(self.leaves):
            least, best, kept = self.judge(), 0, self._now()
            for step in range(1, steps + 1):
                if not queue:
                    queue = [fitted[k] for k in torch.randperm(len(fitted), generator=generator).tolist()]
                for group in optimizer.param_groups:
                    group["lr"] = RATE * group["size"] * rate(step, steps)
                self.backward(queue.pop())
                optimizer.step()
                if step % every == 0 or step == steps:
                    now = self.judge()
                    if now < least:
                        least, best, kept = now, step, self._now()
                progress.advance()
        return best, kept

    def _now(self) -> Edits:
        return {i: _mapped(edit, lambda tensor: tensor.detach().clone()) for i, edit in self.leaves.items()}

    def backward(self, b: int) -> torch.Tensor:
        """The gradients of the mean of L over a batch, into the parameters; returns those behind the last layer."""
        last = self.pruned.run(b, gradient=True)
        slope, _ = self._objective.slopes(b, last.detach(), None)
        gradients = torch.autograd.grad(
            last, self._parameters, slope / slope[..., 0].numel(), allow_unused=True, materialize_grads=True
        )
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return slope

    def judge(self) -> float:
        """L on the held-out sequences, nats a token, of the layers as they are now."""
        with torch.no_grad():
            return self._objective.judge([{b: self.pruned.run(b) for b in self.pruned.held}])[0][0]


def rate(step: int, steps: int) -> float:
    """The rate at a step (from 1), as a share of the full one: a short rise, then half a cosine down to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return step / warm
    return (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1))) / 2


def _mapped(edit: LayerEdit, change: Callable[[torch.Tensor], torch.Tensor]) -> LayerEdit:
    """`edit` with the trained tensors of its replacements changed."""

    def mapped(replacement: Replacement) -> Replacement:
        tensors = {name: getattr(replacement, name) for name in _TRAINED}
        return replace(replacement, **{n: change(t) for n, t in tensors.items() if t is not None})

    return replace(edit, behind={name: mapped(found) for name, found in edit.behind.items()})
