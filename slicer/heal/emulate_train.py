"""Training of what stands for removed parts, and of nothing else.

The constants and low-rank maps of `slicer.heal.emulate` take steps of Adam on what the second-order steps of a fold
lower too (`slicer.heal.newton`), in nats a token,

    L = (1 - MIX) KL(source || cut) + MIX cross entropy of the text

a batch of calibration sequences a step, in an order drawn by the seed. A parameter moves at most about `RATE` of its
own root mean square a step, less toward the end. L on the sequences held out decides which step is kept, the start
included.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from slicer.checkpoint.parts import without_parts
from slicer.errors import HealError
from slicer.heal.emulation import Emulated, Emulation, attached, norm_eps
from slicer.heal.held import Split, loss, split
from slicer.heal.newton import MIX
from slicer.measure.states import States
from slicer.measure.stream import Walk
from slicer.plan import Plan
from slicer.progress import Progress

RATE = 0.02
WARM_UP = 0.1  # share of the steps in which the rate rises
JUDGED = 16  # times that L is taken on the sequences held out
_BETAS = (0.9, 0.99)
_CHUNK = 128  # positions whose logits are held at a time
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
    return _Training(walk, split(batches), plan, found).run(steps, seed, progress or Progress())


class _Training:
    def __init__(self, walk: Walk, data: Split, plan: Plan, found: Emulated) -> None:
        self._walk, self._plan, self._found, self._held = walk, plan, found, data.held
        self._first = min(layer for _, layer in found.by_anchor)
        self._target = walk.start(data.batches)
        no_attention, no_ffn = plan.gone
        changed = min([self._first, *no_attention, *no_ffn])
        for i in range(changed):
            walk.advance(i, self._target)
        self._origin = self._target.copy()  # what enters the first layer that the cut changes
        for i in range(changed, walk.depth):
            walk.advance(i, self._target)
        self._layers = [i for i in range(changed, walk.depth) if i not in no_attention or i not in no_ffn]
        self._leaves = {anchor: _trainable(e) for anchor, e in found.by_anchor.items()}
        self._sizes = [float(p.detach().square().mean().sqrt()) for p in self._parameters()]

    def _parameters(self) -> list[torch.Tensor]:
        named = [getattr(e, name) for e in self._leaves.values() for name in _TRAINED]
        return [tensor for tensor in named if tensor is not None]

    def run(self, steps: int, seed: int, progress: Progress) -> Emulated:
        progress.stage("Training what stands for the removed parts", steps, "steps")
        groups = [
            {"params": [p], "size": size} for p, size in zip(self._parameters(), self._sizes, strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=_BETAS)
        generator = torch.Generator().manual_seed(seed)
        fitted = [b for b in range(len(self._origin)) if b not in self._held]
        queue: list[int] = []
        every = max(1, steps // JUDGED)
        with contextlib.ExitStack() as stack:
            self._attach(stack)
            least, best, kept = self._judge(), 0, self._now()
            for step in range(1, steps + 1):
                if not queue:
                    queue = [fitted[k] for k in torch.randperm(len(fitted), generator=generator).tolist()]
                for group in optimizer.param_groups:
                    group["lr"] = RATE * group["size"] * _schedule(step, steps)
                optimizer.zero_grad()
                self._backward(queue.pop())
                optimizer.step()
                if step % every == 0 or step == steps:
                    now = self._judge()
                    if now < least:
                        least, best, kept = now, step, self._now()
                progress.advance()
        found = replace(self._found, by_anchor=kept, steps=steps, best=best)
        return replace(found, losses={**found.losses, "trained": self._loss_of(found)})

    def _attach(self, stack: contextlib.ExitStack, found: Emulated | None = None) -> None:
        """Until `stack` ends the layers are those of the cut, with what stands for the removed parts."""
        no_attention, no_ffn = self._plan.gone
        found = found or replace(self._found, by_anchor=self._leaves)
        for i in self._layers:
            layer = self._walk.layers[i]
            stack.enter_context(without_parts(layer, i in no_attention, i in no_ffn, i))
            stack.enter_context(attached(layer, i, found, norm_eps(self._walk.model)))

    def _now(self) -> dict[tuple[str, int], Emulation]:
        return {anchor: _copied(e) for anchor, e in self._leaves.items()}

    def _run(self, b: int, *, gradient: bool = False) -> torch.Tensor:
        states = self._origin[b].to(self._walk.device).clone()
        for i in self._layers:
            states = self._walk.call(i, b, states, gradient=gradient)
        return states

    def _sum(self, b: int, at: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """L of the positions `at` of a batch, summed; `logits` [batch, positions, vocabulary]."""
        tokens = self._target.tokens[b]
        q = logits.float().log_softmax(-1)
        p = self._walk.head(tokens[:, at], self._target[b][:, at]).float().log_softmax(-1)
        far = nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        inside = at + 1 < tokens.shape[1]
        following = tokens[:, at[inside] + 1][..., None].to(q.device)
        text = -q[:, : int(inside.sum())].gather(-1, following).sum()
        return (1 - MIX) * far + MIX * text

    def _backward(self, b: int) -> None:
        """The gradients of the mean of L over a batch, into the parameters."""
        last = self._run(b, gradient=True)
        slope, tokens = torch.zeros_like(last), self._target.tokens[b]
        for at in torch.split(torch.arange(last.shape[1]), _CHUNK):
            x = last[:, at].detach().requires_grad_()
            value = self._sum(b, at, self._walk.head(tokens[:, at], x, gradient=True))
            slope[:, at] = torch.autograd.grad(value, x)[0]
        gradients = torch.autograd.grad(
            last, self._parameters(), slope / tokens.numel(), allow_unused=True, materialize_grads=True
        )
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def _judge(self) -> float:
        """L on the sequences held out, nats a token."""
        total, count = 0.0, 0
        for b in self._held:
            last, tokens = self._run(b), self._target.tokens[b]
            for at in torch.split(torch.arange(last.shape[1]), _CHUNK):
                total += float(self._sum(b, at, self._walk.head(tokens[:, at], last[:, at])))
            count += tokens.numel()
        return total / count

    @torch.no_grad()
    def _loss_of(self, found: Emulated) -> float:
        last: States = self._target.copy()
        with contextlib.ExitStack() as stack:
            self._attach(stack, found)
            for b in self._held:
                last[b] = self._run(b)
        return loss(self._walk, last, self._held)


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
