"""Training of what stands for removed parts, and of nothing else.

The constants and low-rank maps of `slicer.heal.emulate` take steps of Adam on the loss L that the second-order steps of
a fold lower too (`slicer.heal.objective`): a batch of calibration sequences a step, in an order drawn by the seed. A
parameter moves at most about `RATE` of its own root mean square a step, less toward the end. L on the sequences held
out decides which step is kept, the start included.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from slicer.errors import HealError
from slicer.heal.cut import Cut
from slicer.heal.emulation import Emulated, Emulation
from slicer.heal.held import Split, split
from slicer.heal.objective import Objective
from slicer.heal.precision import in_float32
from slicer.measure.stream import Walk
from slicer.plan.plan import Plan
from slicer.progress import Progress

RATE = 0.02
WARM_UP = 0.1  # share of the steps in which the rate rises
JUDGED = 16  # times that L is taken on the sequences held out
_BETAS = (0.9, 0.99)
_TRAINED = ("bias", "down", "up")


def train(
    walk: Walk,
    batches: Sequence[torch.Tensor],
    plan: Plan,
    found: Emulated,
    steps: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Emulated:
    """`found` after so many steps, with its loss as "trained"; the same bytes for the same seed.

    `walk` goes over the source, `batches` and `plan` are those `found` was solved for. Raises HealError where the model
    is read from disk: every step would read it again.
    """
    if not walk.loaded:
        raise HealError("--emulate-steps: training needs the model in memory; use --emulate without it")
    if not found.by_anchor:
        return replace(found, losses={**found.losses, "trained": found.losses["emulated"]}, steps=steps)
    with in_float32(walk.model):
        return _Training(walk, split(batches), plan, found).run(steps, seed, progress or Progress())


class _Training:
    def __init__(self, walk: Walk, data: Split, plan: Plan, found: Emulated) -> None:
        self._found, self._held = found, data.held
        self._cut = Cut(walk, data, plan, min(layer for _, layer in found.by_anchor))
        self._objective = Objective(walk, self._cut.target, data.held)
        self._leaves = {anchor: _trainable(e) for anchor, e in found.by_anchor.items()}
        named = [getattr(e, name) for e in self._leaves.values() for name in _TRAINED]
        self._parameters = [tensor for tensor in named if tensor is not None]

    def run(self, steps: int, seed: int, progress: Progress) -> Emulated:
        progress.stage("Training what stands for the removed parts", steps, "steps")
        groups = [{"params": [p], "size": float(p.detach().square().mean().sqrt())} for p in self._parameters]
        optimizer = torch.optim.Adam(groups, betas=_BETAS)
        generator = torch.Generator().manual_seed(seed)
        fitted = [b for b in range(len(self._cut.origin)) if b not in self._held]
        queue: list[int] = []
        every = max(1, steps // JUDGED)
        with contextlib.ExitStack() as stack:
            self._cut.attach(stack, replace(self._found, by_anchor=self._leaves))
            least, best, kept = self._judge(), 0, self._now()
            for step in range(1, steps + 1):
                if not queue:
                    queue = [fitted[k] for k in torch.randperm(len(fitted), generator=generator).tolist()]
                for group in optimizer.param_groups:
                    group["lr"] = RATE * group["size"] * _schedule(step, steps)
                self._backward(queue.pop())
                optimizer.step()
                if step % every == 0 or step == steps:
                    now = self._judge()
                    if now < least:
                        least, best, kept = now, step, self._now()
                progress.advance()
        found = replace(self._found, by_anchor=kept, steps=steps, best=best)
        return replace(found, losses={**found.losses, "trained": self._cut.loss(found)})

    def _now(self) -> dict[tuple[str, int], Emulation]:
        return {anchor: _copied(e) for anchor, e in self._leaves.items()}

    def _backward(self, b: int) -> None:
        """The gradients of the mean of L over a batch, into the parameters."""
        last = self._cut.run(b, gradient=True)
        slope, _ = self._objective.slopes(b, last.detach(), None)
        gradients = torch.autograd.grad(
            last, self._parameters, slope / slope[..., 0].numel(), allow_unused=True, materialize_grads=True
        )
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _judge(self) -> float:
        """L on the sequences held out, nats a token."""
        with torch.no_grad():
            return self._objective.judge((b, self._cut.run(b)) for b in self._held)[0]


def _schedule(step: int, steps: int) -> float:
    """The rate at a step (from 1), as a share of the full one: a short rise, then half a cosine down to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return step / warm
    return (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1))) / 2


def _trainable(emulation: Emulation) -> Emulation:
    """The same, its parameters float32 leaves that take gradients."""
    return replace(
        emulation,
        **{
            name: tensor.detach().float().clone().requires_grad_()
            for name in _TRAINED
            if (tensor := getattr(emulation, name)) is not None
        },
    )


def _copied(emulation: Emulation) -> Emulation:
    return replace(
        emulation,
        **{
            name: tensor.detach().clone()
            for name in _TRAINED
            if (tensor := getattr(emulation, name)) is not None
        },
    )
