"""Second-order steps on the loss itself.

Least squares brings the residual stream close to the source's. These steps lower the loss L itself (see `objective`):
KL(p || q) from the source's predictions and, where asked for, the loss on the text. A step of K-FAC (Martens and
Grosse, arXiv 1503.05671) adds to a matrix W [d, f] with inputs z and loss gradients g of its outputs a multiple of

    D = -(G + b I)^-1 (dL/dW) (A + a I)^-1,    A = E[z z^T],  G = E[g g^T]

where G takes the g of tokens drawn from q, so that G (x) A is the Fisher information. With some ten thousand tokens
the noise of dL/dW in the flat directions outweighs what a full Newton step gains there: p parameters cost p / 2N nats
on N tokens. Hence the large a and b. All matrices step together. The length of the step is searched on the held-out
sequences, and is rejected if KL(p || q) on them is then more than `SLACK` above its value after least squares: the text
must not lead the model away from the source. There is no learning rate.

A step takes one sweep forward, which keeps what enters each layer, and one backward, which runs each layer again to
differentiate it, and solves for the directions of its matrices: a model that is streamed from disk is read twice, and
the sums of one layer are in memory. A and G are those of the first step; their Cholesky factors are kept. Lengths are
compared in further sweeps, a few in each. A step that was stopped resumes at the layer, or at the lengths, that it was
at: of the forward sweep it repeats the layers before that one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.architectures.table import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS
from slicer.errors import OutputError
from slicer.heal.compensate.objective import Objective
from slicer.heal.compensate.regression import add_gram
from slicer.heal.patch import Holds
from slicer.model.layers import attached, is_conv1d
from slicer.model.output_maps import Output
from slicer.model.pruned import Edits, LayerEdit, PrunedRun, Streams
from slicer.runtime.workdir import Stages

STEPS = 3
DAMPING = (0.1, 1.0)  # a and b, in units of the mean of the diagonal of A and G
PARTS = 3  # each step takes another such part of the sequences, interleaved
DRAWN = 4  # one batch in so many gives G
SLACK = 0.01  # of KL(p || q), which a few sequences do not give more exactly
_FIRST = 0.02  # length that is tried first: the largest change of a matrix, relative
Slopes = dict[int, list[torch.Tensor]]  # along the stream, by batch: of L, and of the tokens drawn
_TOGETHER = 256  # columns, then rows of a gradient that are solved at a time
_ROUNDS = 5  # of doubling or halving the length


class Newton:
    """Takes steps on the output matrices of all sublayers of `run`.

    Args:
        run: its target is needed. Its held-out batches choose the length of each step.
        edits: the changes that the steps start from.
        holds: whether the checkpoint holds the weights of a module of a layer.
        written: what new weights are rounded to; None: their own dtype.
        stages: where what a step has finished is kept.
        adapts: the share of the text itself in L.
    """

    def __init__(
        self,
        run: PrunedRun,
        edits: Edits,
        holds: Holds,
        written: torch.dtype | None = None,
        stages: Stages = Stages(None, b""),  # noqa: B008 (nothing is kept)
        adapts: float = 0.0,
    ) -> None:
        self._run, self._start, self._written, self._stages = run, edits, written, stages
        self._objective = Objective(run.walk, run.target, run.held, adapts)
        self.matrices = {
            i: [
                Matrix(i, name, is_conv1d(module))
                for name, module in run.walk.layers[i].named_modules()
                if _stays(run, i, name) and _steps(run.walk.layers[i], name, module) and holds(i, name, module)
            ]
            for i in run.layers
        }
        self._size = _FIRST
        ((self._loss, far),) = self.judge([0.0], "before the steps")
        self._limit = (1 + SLACK) * far

    def step(self, number: int) -> bool:
        """Take step `number` if it lowers the loss on the sequences held out."""
        for i, found, slopes in self.sums(number % PARTS, curvature=number == 0, after=self._resumed(number)):
            if not all(bool(sums.gradient.isfinite().all()) for sums in found.values()):
                return False
            with self._at_hand(i, "factors", 2) if number else contextlib.nullcontext():
                for matrix, sums in found.items():
                    matrix.solve(sums)
            if number == 0:
                self._keep(i, "factors")
            self._keep(i, "direction", [matrix.ratio for matrix in found])
            flat = {f"{b}.{k}": slope for b, both in slopes.items() for k, slope in enumerate(both)}
            self._stages.save("slopes", flat, [number, i])
        largest = max((matrix.ratio for matrices in self.matrices.values() for matrix in matrices), default=0.0)
        length, self._loss = self._search(number, largest) if largest > 0 else (0.0, self._loss)
        for i, matrices in self.matrices.items():
            with self._at_hand(i, "direction", 1):
                for matrix in matrices:
                    matrix.step(length, self._run.walk.keep)
        return length > 0

    def _keep(self, i: int, what: str, facts: Any = None) -> None:
        """Keep a tensor, or several, of each matrix of layer i on the host: as a stage, or else as states are."""
        own = [(matrix, getattr(matrix, what)) for matrix in self.matrices[i]]
        self._stages.save(f"{what}-{i}", {f"{m.name}.{k}": t for m, each in own for k, t in enumerate(each)}, facts)
        for matrix, each in own:
            setattr(matrix, what, [] if self._stages.kept else [self._run.walk.keep(t) for t in each])

    @contextlib.contextmanager
    def _at_hand(self, i: int, what: str, count: int) -> Iterator[None]:
        """Inside the block, the matrices of layer i have what `_keep` kept as a stage. Raises OutputError."""
        if self._stages.kept and self._take(i, what, count) is None:
            raise OutputError(f"{what} of layer {i}: gone from the work directory; give the same command again")
        try:
            yield
        finally:
            for matrix in self.matrices[i] if self._stages.kept else ():
                setattr(matrix, what, [])

    def _take(self, i: int, what: str, count: int) -> Any:
        """Take what `_keep` kept as a stage of layer i, `count` tensors of each matrix; gives its facts, None if there
        is no such stage."""
        if (kept := self._stages.load(f"{what}-{i}")) is None:
            return None
        tensors, facts = kept
        for matrix in self.matrices[i]:
            setattr(matrix, what, [tensors[f"{matrix.name}.{k}"] for k in range(count)])
        return facts or ()

    def _resumed(self, number: int) -> tuple[int, Slopes] | None:
        """(the last layer that step `number` has finished, the slopes that enter it), of a run that was stopped."""
        kept = self._stages.load("slopes")
        if kept is None or kept[1][0] != number:
            return None
        flat, (_, last) = kept
        for i in (i for i in self._run.layers if i >= last):
            if (ratios := self._take(i, "direction", 1)) is None or (number == 0 and not self._has_factors(i)):
                return None
            for matrix, ratio in zip(self.matrices[i], ratios, strict=True):
                matrix.ratio, matrix.direction = ratio, []
        slopes: Slopes = {}
        for name in sorted(flat):
            slopes.setdefault(int(name.partition(".")[0]), []).append(flat[name].to(self._run.walk.device))
        return last, slopes

    def _has_factors(self, i: int) -> bool:
        found = self._take(i, "factors", 2) is not None
        for matrix in self.matrices[i]:
            matrix.factors = []
        return found

    @property
    def state(self) -> tuple[dict[str, torch.Tensor], list[float]]:
        """What `resume` needs to continue after the steps so far."""
        every = (matrix for matrices in self.matrices.values() for matrix in matrices)
        return {f"{m.layer}.{m.name}": m.delta for m in every if m.delta is not None}, [self._loss, self._size]

    def resume(self, deltas: Mapping[str, torch.Tensor], numbers: Sequence[float], *, ends: bool) -> None:
        """Continue after the steps of another run, by its `state`; A and G are needed unless it `ends` there."""
        if not ends and not all(map(self._has_factors, self._run.layers)):
            for i, found, _ in self.sums(0, curvature=True):
                for matrix, sums in found.items():
                    matrix.factor(sums)
                self._keep(i, "factors")
        self._loss, self._size = numbers
        for matrices in self.matrices.values():
            for matrix in matrices:
                delta = deltas.get(f"{matrix.layer}.{matrix.name}")
                matrix.delta = None if delta is None else self._run.walk.keep(delta)

    def judge(self, lengths: Sequence[float], when: str | None = None) -> list[tuple[float, float]]:
        """L and KL(p || q) on the sequences held out, after each of these steps in the present directions.

        A run that was stopped gives what it found under the same `when`.
        """
        done = None if when is None else self._stages.load(f"judged {when}")
        if done is None:
            edits = [partial(self.edit, length=length) for length in lengths]
            found = self._objective.judge(self._run.ends(self._run.held, edits))
            if when is not None:
                self._stages.save(f"judged {when}", {}, found)
        else:
            found = [(loss, far) for loss, far in done[1]]
        return found

    def edit(self, i: int, layer: nn.Module, *, length: float = 0.0) -> LayerEdit:
        """The change of layer i, whose weights are in place, with a further step of this length."""
        start, new = self._start.get(i) or LayerEdit(), {}
        with self._at_hand(i, "direction", 1) if length else contextlib.nullcontext():
            for matrix in self.matrices[i]:
                own = layer.get_parameter(matrix.key).data
                first = start.parameters.get(matrix.key, own).to(own)
                new[matrix.key] = matrix.moved(first, length, self._written or own.dtype)
        return replace(start, parameters={**start.parameters, **new})

    def stepped(self) -> Iterator[tuple[Matrix, torch.Tensor, float]]:
        """(matrix, its new weight, its change relative to that) of the matrices that have changed."""
        for i, matrices in self.matrices.items():
            changed = [(matrix, matrix.delta) for matrix in matrices if matrix.delta is not None]
            if changed:
                with self._run.walk.layer(i) as layer:
                    new = self.edit(i, layer).parameters
                for matrix, delta in changed:
                    weight = new[matrix.key]
                    yield matrix, weight, float(delta.norm()) / float(weight.float().norm())

    def sums(
        self, part: int, *, curvature: bool, after: tuple[int, Slopes] | None = None
    ) -> Iterator[tuple[int, dict[Matrix, Sums], Slopes]]:
        """What each matrix gathers from a part of the fitted sequences; A and G only with `curvature`.

        From the last layer to the first: (the layer, the sums of its matrices, the slopes along what enters it).
        `after`: a layer and those slopes, to go on behind it.
        """
        run, entering = self._run, dict[int, Streams]()
        fitted = [b for b in range(len(run.origin)) if b not in run.held]
        fitted = fitted[part::PARTS] or fitted
        layers = run.layers if after is None else [i for i in run.layers if i < after[0]]

        def keep(i: int, streams: Streams) -> None:
            entering[i] = {b: run.walk.keep(x, on_device=True) for b, x in streams.items()}

        (last,) = run.ends(fitted, [self.edit], keep, layers)
        slopes = self._slopes(last, curvature) if after is None else after[1]
        backward = layers[::-1]
        with run.walk.along(backward):
            for i in backward:
                with run.walk.layer(i) as layer, run.pruned(i, layer, self.edit(i, layer)):
                    found = {m: Sums(layer.get_submodule(m.name), m, curvature) for m in self.matrices[i]}
                    with attached(sums.module.register_forward_hook(sums.watch) for sums in found.values()):
                        for b, x in entering.pop(i).items():
                            slopes[b] = self._back(i, b, x.to(run.walk.device_of(layer)), slopes[b], found.values())
                    yield i, found, slopes

    def _slopes(self, last: Streams, curvature: bool) -> Slopes:
        """The slopes along the stream `last` behind the last layer, which is freed."""
        generator, slopes = torch.Generator().manual_seed(0), Slopes()
        for at, b in enumerate(list(last)):
            draws = curvature and at % DRAWN == 0
            both = self._objective.slopes(b, last.pop(b), generator if draws else None)
            slopes[b] = list(both[: 1 + draws])
        return slopes

    def _back(
        self, i: int, b: int, x: torch.Tensor, slopes: Sequence[torch.Tensor], watching: Collection[Sums]
    ) -> list[torch.Tensor]:
        """`slopes` along the output of layer i for its input x, taken back to x and, on the way, into `watching`."""
        x = x.requires_grad_()
        output = self._run.walk.call(i, b, x.clone(), gradient=True)  # a layer may write into its input
        seen = [(sums, sums.u) for sums in watching if sums.u is not None and sums.u.requires_grad]
        back = []
        for k, slope in enumerate(slopes):
            first, *others = torch.autograd.grad(
                output,
                [x, *(u for _, u in seen)],
                slope.to(output.device),
                retain_graph=k + 1 < len(slopes),
                allow_unused=True,
            )
            back.append(first)
            for (sums, _), found in zip(seen, others, strict=True):
                if found is not None:
                    sums.draw(found) if k else sums.take(found)
        return back

    def _search(self, number: int, largest: float) -> tuple[float, float]:
        """(length, L) with the least L on the sequences held out; `largest`: the relative change at length 1."""
        tried = {0.0: self._loss}

        def best_with(lengths: Sequence[float]) -> float:
            judged = self.judge(lengths, f"in step {number}, {len(tried)}")
            for length, (loss, far) in zip(lengths, judged, strict=True):
                tried[length] = loss if far <= self._limit else float("inf")
            return min(tried, key=tried.__getitem__)

        first = self._size / largest
        best = best_with([first / 2, first, 2 * first])
        for _ in range(_ROUNDS):
            least = min(length for length in tried if length)
            if least < best < max(tried):
                break
            from_, by = (best, 2.0) if best == max(tried) else (least, 0.5)
            best = best_with([from_ * by, from_ * by * by])
        if best:  # the least loss lies between this length and its double, which has more
            whole, half = best, 1.5 * best
            best_with([half])
            best = best_with([(1.75 if tried[half] < tried[whole] else 1.25) * whole])
        self._size = best * largest or _FIRST
        return best, tried[best]


def _stays(run: PrunedRun, i: int, name: str) -> bool:
    """Whether a module of layer i is the output matrix of a sublayer that the plan keeps."""
    attention, ffn = (i not in gone for gone in run.gone)
    return (attention and name in ATTENTION_OUTPUTS) or (ffn and name in FEED_FORWARD_OUTPUTS)


def _steps(layer: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether the module is a plain matrix (nn.Linear, GPT-2's Conv1D), and no shared expert: these are multiplied by
    the map of all experts' sum."""
    plain = isinstance(module, nn.Linear) or is_conv1d(module)
    return plain and not hasattr(layer.get_submodule(name.rpartition(".")[0].partition(".")[0]), "experts")


class Matrix:
    """A matrix W [d, f] of a kept layer, and what the steps keep of it on the host.

    Attributes:
        layer, name: the layer of the source, and the module within it. key: its parameter.
        delta: float32 [d, f], what was added to W so far; None: nothing.
        factors: of G and of A, as `_factor`. direction: D, up to a factor that all matrices share. Empty: not known.
        ratio: |D| / |W|.
    """

    def __init__(self, layer: int, name: str, transposed: bool) -> None:
        self.layer, self.name, self.key, self._transposed = layer, name, f"{name}.weight", transposed
        self.delta: torch.Tensor | None = None
        self.factors: list[torch.Tensor] = []
        self.direction: list[torch.Tensor] = []
        self.ratio = 0.0

    def moved(self, first: torch.Tensor, length: float, written: torch.dtype) -> torch.Tensor:
        """W, which was `first`, with a further step of this length, rounded as it will be written; in the layout and
        dtype of `first`."""
        change = torch.zeros((), device=first.device) if self.delta is None else self.delta.to(first.device)
        if length and self.direction:
            change = torch.add(change, self.direction[0].to(first.device), alpha=length)
        elif self.delta is None:
            return first
        return (first.float() + (change.T if self._transposed else change)).to(written).to(first.dtype)

    def factor(self, sums: Sums) -> None:
        """Factor G and A in place, if `sums` has them."""
        if sums.inputs is not None and sums.outputs is not None:
            self.factors = [_factor(sums.outputs, DAMPING[1]), _factor(sums.inputs, DAMPING[0])]

    def solve(self, sums: Sums) -> None:
        """Find D, in place of the gradient, with A and G of `sums` or of an earlier step."""
        self.factor(sums)
        slope = sums.gradient
        left, right = (factor.to(slope.device) for factor in self.factors)
        solved = torch.linalg.solve_triangular  # unlike cholesky_solve, it needs no copy of the factor
        for columns in torch.split(slope, _TOGETHER, 1):
            half = solved(left.mT, columns, upper=False)
            columns.copy_(solved(left, half, upper=True))
        for rows in torch.split(slope, _TOGETHER):
            half = solved(right, rows, upper=True, left=False)
            rows.copy_(solved(right.mT, half, upper=False, left=False).neg_())
        self.direction, self.ratio = [slope], float(slope.norm()) / max(sums.size, 1e-12)

    def step(self, length: float, keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add so much of D to W."""
        if length and self.direction:
            step = self.direction[0]
            self.delta = keep(step * length) if self.delta is None else self.delta.add_(step, alpha=length)
        self.direction = []


class Sums:
    """What one pass gathers of a matrix: float32, on its device.

    Attributes:
        gradient: dL/dW [d, f].
        inputs, outputs: A [f, f], its upper triangle, and G [d, d]; None: not gathered.
        size: |W|.
        z, u: input [.., f] and output [.., d] of the last run.
    """

    def __init__(self, module: nn.Module, matrix: Matrix, curvature: bool) -> None:
        self.module = module
        weight = Output(matrix.name, module).weight
        d, f = weight.shape
        new = partial(torch.zeros, dtype=torch.float32, device=weight.device)
        self.gradient, self.size = new(d, f), float(weight.float().norm())
        self.inputs = new(f, f) if curvature else None
        self.outputs = new(d, d) if curvature else None
        self.z: torch.Tensor | None = None
        self.u: torch.Tensor | None = None

    def watch(self, module: nn.Module, args: Any, result: torch.Tensor) -> None:
        """A forward hook: keeps what went in and came out."""
        self.z, self.u = args[0].detach(), result

    def take(self, slope: torch.Tensor) -> None:
        """Add the tokens of the last run: `slope` is dL/du, [.., d]."""
        assert self.z is not None
        z, g = self.z.flatten(0, -2).float(), slope.flatten(0, -2).float()
        self.gradient += g.T @ z
        if self.inputs is not None:
            add_gram(self.inputs, z)

    def draw(self, slope: torch.Tensor) -> None:
        """Add to G the gradients [.., d] of the log likelihood of drawn tokens."""
        if self.outputs is not None:
            g = slope.flatten(0, -2).float()
            self.outputs += g.T @ g


def _factor(matrix: torch.Tensor, strength: float) -> torch.Tensor:
    """U with U^T U = M + s m I, of M's upper triangle, in its place; m is the mean of M's diagonal."""
    mean = matrix.diagonal().mean()
    matrix.diagonal().add_(strength * mean if bool(mean > 0) else 1.0)
    torch.linalg.cholesky(matrix.mT, out=matrix.mT)  # its own layout, so no copy is made
    return matrix
