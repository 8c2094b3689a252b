"""Second-order steps on the loss itself, over a model in memory.

Least squares brings the residual stream close to the source's. These steps lower the loss L itself (see `objective`):
KL(p || q) from the source's predictions, and the loss on the text. A step of K-FAC (Martens and Grosse, arXiv
1503.05671) adds to a matrix W [d, f] with inputs z and loss gradients g of its outputs a multiple of

    D = -(G + b I)^-1 (dL/dW) (A + a I)^-1,    A = E[z z^T],  G = E[g g^T]

where G takes the g of tokens drawn from q, so that G (x) A is the Fisher information. With some ten thousand tokens
the noise of dL/dW in the flat directions outweighs what a full Newton step gains there: p parameters cost p / 2N nats
on N tokens. Hence the large a and b. All matrices step together. The length of the step is searched on the held-out
sequences, and is rejected if KL(p || q) on them is then more than `SLACK` above its value after least squares: the text
must not lead the model away from the source. There is no learning rate: a step takes one forward and backward pass, and
two Cholesky solves for each matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.architectures.table import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS
from slicer.heal.compensate.objective import Objective
from slicer.heal.compensate.regression import add_gram
from slicer.heal.patch import Holds
from slicer.model.layers import attached, is_conv1d
from slicer.model.output_maps import Output
from slicer.model.pruned import PrunedRun
from slicer.runtime.memory import COPY_SHARE, free

STEPS = 3
DAMPING = (0.1, 1.0)  # a and b, in units of the mean of the diagonal of A and G
PARTS = 3  # each step takes another such part of the sequences, interleaved
DRAWN = 4  # one batch in so many gives G
SLACK = 0.01  # of KL(p || q), which a few sequences do not give more exactly
_FIRST = 0.02  # length that is tried first: the largest change of a matrix, relative
_HALVINGS = 5


class Newton:
    """Takes steps on the output matrices of all sublayers of `run`. Inside its `with` block the model has the new
    weights; afterwards its own.

    Args:
        run: prepared; its target is needed. Its held-out batches choose the length of each step.
        holds: whether the checkpoint holds the weights of a module of a layer.
        written: what new weights are rounded to; None: their own dtype.
    """

    def __init__(self, run: PrunedRun, holds: Holds, written: torch.dtype | None = None) -> None:
        self._run, self._objective = run, Objective(run.walk, run.target, run.held)
        found = (
            (i, name, module)
            for i in run.layers
            for name, module in run.walk.layers[i].named_modules()
            if _stays(run, i, name) and _steps(run.walk.layers[i], name, module) and holds(i, name, module)
        )
        self.matrices = list(_affordable(found, written))
        self._size = _FIRST
        self._loss, far = self.judge()
        self._limit = (1 + SLACK) * far

    def __enter__(self) -> Newton:
        return self

    def __exit__(self, *error: object) -> None:
        for matrix in self.matrices:
            matrix.restore()

    def step(self, number: int) -> bool:
        """Take step `number` (the first gathers A and G) if it lowers the loss on the sequences held out."""
        if not self.matrices:
            return False
        self.gather(number % PARTS, curvature=number == 0)
        if not all(bool(matrix.gradient.isfinite().all()) for matrix in self.matrices):
            return False
        directions = [matrix.direction() for matrix in self.matrices]
        length, self._loss = self._search(directions)
        for matrix, direction in zip(self.matrices, directions, strict=True):
            if length > 0:
                matrix.delta.add_(direction, alpha=length)
            matrix.put(matrix.delta)
        return length > 0

    def stepped(self) -> list[Matrix]:
        """The matrices that have changed."""
        return [matrix for matrix in self.matrices if bool(matrix.delta.any())]

    def judge(self) -> tuple[float, float]:
        """L and KL(p || q) on the sequences held out."""
        with torch.no_grad():
            return self._objective.judge((b, self._run.run(b)) for b in self._run.held)

    def gather(self, part: int, *, curvature: bool) -> None:
        """dL/dW of every matrix on a part of the sequences fitted; with `curvature` also A and G."""
        for matrix in self.matrices:
            matrix.gradient.zero_()
        generator = torch.Generator().manual_seed(0)
        fitted = [b for b in range(len(self._run.origin)) if b not in self._run.held]
        fitted = fitted[part::PARTS] or fitted
        with self._watching():
            for at, b in enumerate(fitted):
                draws = curvature and at % DRAWN == 0
                last = self._run.run(b, gradient=True)
                asked, drawn = self._objective.slopes(b, last.detach(), generator if draws else None)
                seen = [matrix for matrix in self.matrices if matrix.u is not None and matrix.u.requires_grad]
                outputs = [matrix.u for matrix in seen if matrix.u is not None]
                slopes = torch.autograd.grad(last, outputs, asked, retain_graph=draws, allow_unused=True)
                for matrix, slope in zip(seen, slopes, strict=True):
                    matrix.take(slope, curvature)
                if draws:
                    slopes = torch.autograd.grad(last, outputs, drawn, allow_unused=True)
                    for matrix, slope in zip(seen, slopes, strict=True):
                        matrix.draw(slope)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside the block each matrix keeps what went in and came out."""

        def watch(matrix: Matrix) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, result: torch.Tensor) -> None:
                matrix.z, matrix.u = args[0].detach(), result

            return hook

        try:
            with attached(matrix.module.register_forward_hook(watch(matrix)) for matrix in self.matrices):
                yield
        finally:
            for matrix in self.matrices:
                matrix.z = matrix.u = None

    def _search(self, directions: Sequence[torch.Tensor]) -> tuple[float, float]:
        """(length, L): doubled or halved from a first guess as long as the loss on the sequences held out falls."""
        largest = max(
            float(direction.norm() / matrix.weight.float().norm().clamp_min(1e-12))
            for matrix, direction in zip(self.matrices, directions, strict=True)
        )
        tried = {0.0: self._loss}

        def loss(length: float) -> float:
            if length not in tried:
                for matrix, direction in zip(self.matrices, directions, strict=True):
                    matrix.put(matrix.delta + length * direction)
                found, far = self.judge()
                tried[length] = found if far <= self._limit else float("inf")
            return tried[length]

        length = self._size / max(largest, 1e-30)
        if loss(length) < self._loss:
            while loss(2 * length) < loss(length):
                length *= 2
        for _ in range(_HALVINGS):
            if loss(length) < self._loss and loss(length) <= loss(length / 2):
                break
            length /= 2
        # Between a length that lowers the loss and its double, which does not.
        loss((1.75 if loss(1.5 * length) < loss(length) else 1.25) * length)
        best = min(tried, key=lambda tried_length: tried[tried_length])
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


def _affordable(matrices: Iterable[tuple[int, str, nn.Module]], written: torch.dtype | None) -> Iterator[Matrix]:
    """Those of the first layers on each device whose sums fit into half of its free memory."""
    room: dict[torch.device, int] = {}
    for i, name, module in matrices:
        weight = Output(name, module).weight
        d, f = weight.shape
        left = room.get(weight.device, int(COPY_SHARE * free(weight.device)))
        room[weight.device] = left - 4 * (2 * d * f + d * d + f * f)
        if room[weight.device] >= 0:
            yield Matrix(i, name, module, written)


class Matrix:
    """A matrix W of a kept layer with its Kronecker-factored curvature: its change so far, and the sums of one pass.

    Attributes:
        layer, name: the layer of the source, and the module within it.
        delta: float32 [d, f], what was added to W so far.
        gradient: dL/dW, float32 [d, f].
        inputs, outputs: A [f, f] and G [d, d], float32.
        z, u: input [.., f] and output [.., d] of the last run.
    """

    def __init__(self, layer: int, name: str, module: nn.Module, written: torch.dtype | None = None) -> None:
        self.layer, self.name, self.module = layer, name, module
        output = Output(name, module)
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        self._parameter, self._transposed, self._own = weight, output.transposed, weight.data
        d, f = output.weight.shape
        new = partial(torch.zeros, dtype=torch.float32, device=weight.device)
        self.delta, self.gradient = new(d, f), new(d, f)
        self.inputs, self.outputs = new(f, f), new(d, d)
        self._written = written or weight.dtype
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self.z: torch.Tensor | None = None
        self.u: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """As it is now, in the layout and dtype of the checkpoint."""
        return self._parameter.data

    def put(self, delta: torch.Tensor) -> None:
        """Set W to its first value plus `delta`, in its own dtype, rounded as it will be written."""
        change = delta.T if self._transposed else delta
        self._parameter.data = (self._own.float() + change).to(self._written).to(self._own.dtype)

    def restore(self) -> None:
        """Put back the tensor that W was at first."""
        self._parameter.data = self._own

    def take(self, slope: torch.Tensor | None, curvature: bool) -> None:
        """Add the tokens of one batch: dL/du [.., d] of the last run."""
        if slope is None or self.z is None:
            return
        z, g = self.z.flatten(0, -2).float(), slope.flatten(0, -2).float()
        self.gradient += g.T @ z
        if curvature:
            add_gram(self.inputs, z)

    def draw(self, slope: torch.Tensor | None) -> None:
        """Add to G the gradients [.., d] of the log likelihood of drawn tokens."""
        if slope is not None:
            g = slope.flatten(0, -2).float()
            self.outputs += g.T @ g

    def direction(self) -> torch.Tensor:
        """D, float32 [d, f], up to a factor that all matrices share; the first call factors A and G in place."""
        if self._factors is None:
            self._factors = _factor(self.outputs, DAMPING[1]), _factor(self.inputs, DAMPING[0])
        left, right = self._factors
        step = torch.cholesky_solve(self.gradient, left, upper=True)
        return -torch.cholesky_solve(step.T, right, upper=True).T


def _factor(matrix: torch.Tensor, strength: float) -> torch.Tensor:
    """U with U^T U = M + s m I, of M's upper triangle, in its place; m is the mean of M's diagonal."""
    mean = matrix.diagonal().mean()
    matrix.diagonal().add_(strength * mean if bool(mean > 0) else 1.0)
    factor: torch.Tensor = torch.linalg.cholesky(matrix, upper=True, out=matrix)
    return factor
