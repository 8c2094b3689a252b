"""What stands for removed parts: a constant, a low-rank linear map, or the last part before them solved again.

Between two parts that stay, some are gone: a gap. With h the stream where the gap begins, in the model as cut and
emulated so far, and x the source's stream where it ends, over calibration tokens t of weight w_t = 1 / |x_t|^2:

    bias    c = weighted mean of x_t - h_t
    linear  B z_t + c, z_t = g h_t / |h_t| (the norm of the first part removed), of rank r: the ridge solution projected
            on the r directions in which its own fit varies most (reduced-rank regression, Izenman 1975)
    fold    the output matrix of the part before the gap, solved again by ridge regression toward x_t - h_t
            (docs/guide/heal.md)

Ridge strengths are chosen on sequences held out, and an emulation is kept only if it lowers the squared error there.
Gaps are filled in order. A constant is folded into the output bias of the part before the gap, which is exact: no part
that stays reads the stream in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.parts import attention_outputs, ffn_outputs, silenced
from slicer.errors import ArchitectureError, HealError, UsageError
from slicer.heal.emulation import Emulated, Emulation, norm_eps, oriented_weight, output_matrix
from slicer.heal.held import Split, held_out_sequences, loss, split
from slicer.heal.least_squares import NormalEquations, Solution, solve
from slicer.heal.rows import SINKS
from slicer.measure.halves import Midway
from slicer.measure.stream import Walk
from slicer.plan.plan import Plan
from slicer.progress import Progress

METHODS = ("bias", "linear", "fold")


def check_rank(method: str, rank: int | None, width: int) -> None:
    """Raise UsageError unless `rank` suits the method and the model's width."""
    if method not in METHODS:
        raise UsageError(f"emulate {method!r}: choose one of {', '.join(METHODS)}")
    if method != "linear":
        return
    if rank is None or not 1 <= rank <= width:
        raise UsageError(f"--rank {rank}: must lie between 1 and the model's width, {width}")


def emulate(
    walk: Walk,
    batches: Sequence[torch.Tensor],
    plan: Plan,
    method: str,
    rank: int | None = None,
    *,
    progress: Progress | None = None,
) -> Emulated:
    """Fill the gaps that `plan` leaves in the source over which `walk` goes.

    `batches`: int64 [batch, seq], no padding. Raises HealError for too little text or where nothing stands before a
    gap, ArchitectureError where a layer's parts are not known or run side by side.
    """
    width = walk.model.config.get_text_config().hidden_size
    check_rank(method, rank, width)
    progress = progress or Progress()
    data = split(batches)
    found = _Filling(walk, data, plan, method, rank).run(progress)
    return replace(found, held_out=tuple(sorted(held_out_sequences(batches))))


class _Filling:
    """One pass through the source, beside it through the cut as emulated and, for the text held out, the bare cut."""

    def __init__(self, walk: Walk, data: Split, plan: Plan, method: str, rank: int | None) -> None:
        self._walk, self._plan, self._method, self._rank = walk, plan, method, rank
        self._held = data.held
        self._source = walk.start(data.batches)
        self._cut = self._source.copy()  # as emulated so far
        self._bare = self._source.copy()  # only the batches held out are run
        self._midway = Midway(walk)
        self._eps = norm_eps(walk.model)
        self._anchor: tuple[str, int] | None = None
        self._gap: tuple[str, int] | None = None  # the first part removed since the anchor
        self._features: dict[int, torch.Tensor] = {}  # what went into the anchor's output matrix, by batch
        self._gain: torch.Tensor | None = None
        # For "fold", the anchor's output matrix as it was (out of core its layer is gone by then), and its bias.
        self._weight, self._has_bias = torch.zeros(0, 0), False
        self._found = Emulated(method, rank if method == "linear" else None)

    def run(self, progress: Progress) -> Emulated:
        no_attention, no_ffn = self._plan.gone
        progress.stage("Emulating what is gone", self._walk.depth, "layers")
        for i in range(self._walk.depth):
            with self._walk.layer(i) as layer:
                if self._midway.place(i, layer, partial(self._walk.call, i, 0, self._source[0])) is None:
                    raise ArchitectureError(
                        f"layer {i} of {type(self._walk.model).__name__} runs attention and feed-forward part side by "
                        "side, so nothing can stand for one of them; use no --emulate"
                    )
                between: list[torch.Tensor] = []
                after: list[torch.Tensor] = []
                for b in range(len(self._source)):
                    middle, end = self._midway.states(i, b, self._source[b])
                    between.append(middle.cpu())
                    after.append(end.cpu())
                if self._gap is None and i not in no_attention and i not in no_ffn:
                    self._pass_layer(layer, i)
                else:
                    self._pass(layer, i, "attention", i in no_attention, list(self._source))
                    self._pass(layer, i, "ffn", i in no_ffn, between)
                for b, end in enumerate(after):
                    self._source[b] = end
            progress.advance()
        self._fill(list(self._source))
        self._found.losses.update(
            {
                name: loss(self._walk, states, self._held)
                for name, states in (("source", self._source), ("cut", self._bare), ("emulated", self._cut))
            }
        )
        return self._found

    def _pass_layer(self, layer: nn.Module, i: int) -> None:
        """A whole layer, behind no gap: in one run."""
        self._run(layer, i, "ffn", [])

    def _run(self, layer: nn.Module, i: int, part: str, silent: Sequence[nn.Module]) -> None:
        """Layer i without the outputs `silent`, over both cuts; `part` then stands before what follows."""
        outputs = attention_outputs(layer) if part == "attention" else ffn_outputs(layer)
        self._features = {}
        matrix = output_matrix(outputs) if self._method == "fold" and self._gap_behind(part, i) else None
        if matrix is not None:
            self._weight = oriented_weight(matrix).detach().float().cpu().clone()
            self._has_bias = getattr(matrix, "bias", None) is not None

        def watch(b: int) -> contextlib.AbstractContextManager[Any]:
            return contextlib.nullcontext() if matrix is None else _seeing(matrix, self._features, b)

        with silenced(silent):
            for b in self._held:
                self._bare[b] = self._walk.call(i, b, self._bare[b])
            for b in range(len(self._cut)):
                with watch(b):
                    self._cut[b] = self._walk.call(i, b, self._cut[b])
        self._anchor = (part, i)

    def _gap_behind(self, part: str, i: int) -> bool:
        no_attention, no_ffn = self._plan.gone
        return i in no_ffn if part == "attention" else i + 1 in no_attention

    def _pass(self, layer: nn.Module, i: int, part: str, gone: bool, here: list[torch.Tensor]) -> None:
        """One part of layer i; `here` is the source's stream before it."""
        if gone:
            if self._gap is None:
                self._gap = (part, i)
                self._gain = _gain(layer, part)
            return
        self._fill(here)
        self._run(layer, i, part, ffn_outputs(layer) if part == "attention" else attention_outputs(layer))

    def _fill(self, target: list[torch.Tensor]) -> None:
        """Emulate the gap that ends here, where the source has `target`."""
        if self._gap is None:
            return
        gap, self._gap = self._gap, None
        if self._anchor is None and self._method == "fold" and self._walk.loaded:
            return  # steps on the loss behind the gap may heal it
        if self._anchor is None:
            raise HealError(
                f"nothing stands before the {gap[0]} of layer {gap[1]}, so what stands for it has no place; "
                "keep the first layer, or use no --emulate"
            )
        emulation = self._bias(target) if self._method == "bias" else self._solved(target)
        if emulation is None or not emulation.error_left < 1:
            return
        self._found.by_anchor[self._anchor] = emulation
        for b in range(len(self._cut)):
            if emulation.weight is None:
                self._cut[b] = self._cut[b] + emulation.update(self._cut[b], self._eps)
            else:
                change = self._features[b] @ (emulation.weight - self._weight).T
                if emulation.bias is not None:
                    change = change + emulation.bias
                self._cut[b] = self._cut[b] + change.to(self._cut[b].dtype)

    def _rows(
        self, target: list[torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(batch, h [tokens, d], x - h, weight) without the first positions."""
        for b, wanted in enumerate(target):
            h, x = self._cut[b][:, SINKS:].float().flatten(0, 1), wanted[:, SINKS:].float().flatten(0, 1)
            yield b, h, x - h, 1 / x.square().mean(-1).clamp_min(1e-12)

    def _bias(self, target: list[torch.Tensor]) -> Emulation:
        total, weights = torch.zeros(self._cut[0].shape[-1], dtype=torch.float64), 0.0
        for b, _, change, weight in self._rows(target):
            if b not in self._held:
                total += (weight[:, None] * change).sum(0, dtype=torch.float64)
                weights += float(weight.sum())
        bias = (total / weights).float()
        before = after = 0.0
        for b, _, change, weight in self._rows(target):
            if b in self._held:
                before += float((weight[:, None] * change.square()).sum())
                after += float((weight[:, None] * (change - bias).square()).sum())
        assert self._anchor is not None
        return Emulation(*self._anchor, bias, error_left=after / max(before, 1e-30))

    def _solved(self, target: list[torch.Tensor]) -> Emulation | None:
        equations: NormalEquations | None = None
        for b, h, change, weight in self._rows(target):
            if self._method == "fold":
                z = self._features[b][:, SINKS:].flatten(0, 1)
                constant = self._has_bias
            else:
                assert self._gain is not None
                z = self._gain * nn.functional.rms_norm(h, h.shape[-1:], None, self._eps)
                constant = True
            if constant:
                z = torch.cat([z, torch.ones_like(z[:, :1])], 1)
            if equations is None:
                equations = NormalEquations(z.shape[1], change.shape[1])
            equations.add(z, change, weight, held_out=b in self._held)
        assert equations is not None and self._anchor is not None
        solution = solve(equations)
        if solution is None:
            return None
        if self._method == "fold":
            delta, features = solution.delta, self._weight.shape[1]
            bias = delta[:, features].float() if delta.shape[1] > features else None
            weight = self._weight + delta[:, :features].float()
            return Emulation(*self._anchor, bias, weight=weight, error_left=solution.left)
        assert self._rank is not None
        down, up, c = reduced_rank(solution, equations, self._rank)
        delta = torch.cat([up @ down, c[:, None]], 1)
        left = equations.error(delta) / max(equations.error(None), 1e-30)
        return Emulation(*self._anchor, c.float(), self._gain, down.float(), up.float(), error_left=left)


def reduced_rank(
    solution: Solution, equations: NormalEquations, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(down [r, d], up [d, r], c [d]) of the best map of this rank, float64: up = U, down = U^T B, with U the leading
    eigenvectors of B G B^T, the covariance of what the full solution puts out. The constant keeps full rank."""
    full, c = solution.delta[:, :-1], solution.delta[:, -1]
    gram = equations.gram[:-1, :-1]
    _, vectors = torch.linalg.eigh(full @ gram @ full.T)
    up = vectors[:, -rank:]
    return up.T @ full, up, c


def _gain(layer: nn.Module, part: str) -> torch.Tensor | None:
    """The weight of the norm before a part, where it is an RMS norm of Llama's kind."""
    name = "input_layernorm" if part == "attention" else "post_attention_layernorm"
    norm = dict(layer.named_children()).get(name)
    weight = getattr(norm, "weight", None)
    return weight.detach().float().cpu() if isinstance(weight, torch.Tensor) else None


@contextlib.contextmanager
def _seeing(module: nn.Module, features: dict[int, torch.Tensor], batch: int) -> Iterator[None]:
    def hook(_module: nn.Module, args: Any) -> None:
        features[batch] = args[0].detach().float().cpu()

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
