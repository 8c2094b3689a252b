"""Second-order steps on the loss itself, over a model in memory.

Least squares brings the residual stream back to the source's; what counts is the loss L (see `objective`): KL(p || q)
from the source's predictions, and the text itself. A step of K-FAC (Martens and Grosse, arXiv 1503.05671) adds to a
matrix W [d, f] with inputs z and loss gradients g of its outputs a multiple of

    D = -(G + b I)^-1 (dL/dW) (A + a I)^-1,    A = E[z z^T],  G = E[g g^T]

where G takes the g of tokens drawn from q, so that G (x) A is the Fisher information. With a few ten thousand tokens
the noise of dL/dW in the flat directions outweighs what a full Newton step wins there: p parameters cost p / 2N nats on
N tokens. Hence the large a and b. All matrices step together, and the length is searched on the sequences held out.
A length at which KL(p || q) there is above what least squares left is refused: the text may not lead the model away
from the source. There is no learning rate: a step is one pass forward and back, and two Cholesky solves a matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.architectures import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS
from slicer.heal.curvature import Matrix
from slicer.heal.objective import Objective
from slicer.heal.outputs import LayerChange, Output
from slicer.measure.states import States
from slicer.measure.stream import Walk
from slicer.runtime.memory import COPY_SHARE, free

STEPS = 3
NAMES = (*ATTENTION_OUTPUTS, *FEED_FORWARD_OUTPUTS)
PARTS = 3  # each step takes another such part of the sequences, interleaved
DRAWN = 4  # one batch in so many gives G
_FIRST = 0.02  # length that is tried first: the largest change of a matrix, relative
_HALVINGS = 5


class Newton:
    """Takes steps on matrices of `layers`, which are run one after the other.

    Inside its `with` block the model has the new weights; afterwards its own.

    Args:
        layers: kept layers, ascending, to the last of the model.
        origin, target: what enters the first of `layers`; and what the source has behind its last layer.
        held: the batches that choose the length of each step; the others are fitted.
        storable: whether the checkpoint has the weights of a module of a layer.
        written: what new weights are rounded to; None: their own dtype.
    """

    def __init__(
        self,
        walk: Walk,
        layers: Sequence[int],
        origin: States,
        target: States,
        held: range,
        storable: Callable[[int, str, nn.Module], bool],
        written: torch.dtype | None = None,
    ) -> None:
        self._walk, self._layers, self._held = walk, layers, held
        self._origin, self._objective = origin, Objective(walk, target, held)
        found = (
            (i, name, module)
            for i in layers
            for name, module in walk.layers[i].named_modules()
            if name in NAMES and _steps(walk.layers[i], name, module) and storable(i, name, module)
        )
        self._matrices = list(_affordable(found, walk.device, written))
        self._size = _FIRST
        self._loss, self._limit = self.judge()

    def __enter__(self) -> Newton:
        return self

    def __exit__(self, *error: object) -> None:
        for matrix in self._matrices:
            matrix.restore()

    def step(self, number: int) -> bool:
        """Take step `number` (the first gathers A and G) if it lowers the loss on the sequences held out."""
        if not self._matrices:
            return False
        self._gather(number % PARTS, curvature=number == 0)
        if not all(bool(matrix.gradient.isfinite().all()) for matrix in self._matrices):
            return False
        directions = [matrix.direction() for matrix in self._matrices]
        length, self._loss = self._search(directions)
        for matrix, direction in zip(self._matrices, directions, strict=True):
            if length > 0:
                matrix.delta.add_(direction, alpha=length)
            matrix.put(matrix.delta)
        return length > 0

    def changes(self, before: Mapping[int, LayerChange]) -> dict[int, LayerChange]:
        """`before` with what the steps made of it."""
        after = {
            i: LayerChange(i, dict(c.parameters), dict(c.transforms), list(c.report))
            for i, c in before.items()
        }
        for matrix in self._matrices:
            if not bool(matrix.delta.any()):
                continue
            change = after.setdefault(matrix.layer, LayerChange(matrix.layer))
            change.parameters[f"{matrix.name}.weight"] = matrix.weight.clone()
            relative = float(matrix.delta.norm() / matrix.weight.float().norm())
            change.report.append(
                {"layer": matrix.layer, "module": matrix.name, "way": "newton", "change": round(relative, 6)}
            )
        return after

    def judge(self) -> tuple[float, float]:
        """L and KL(p || q) on the sequences held out."""
        with torch.no_grad():
            return self._objective.judge((b, self._run(b, self._origin[b])) for b in self._held)

    # --- one pass ---------------------------------------------------------------------------------------------------

    def _gather(self, part: int, *, curvature: bool) -> None:
        """dL/dW of every matrix on a part of the sequences fitted; with `curvature` also A and G."""
        for matrix in self._matrices:
            matrix.gradient.zero_()
        generator = torch.Generator().manual_seed(0)
        fitted = [b for b in range(len(self._origin)) if b not in self._held]
        fitted = fitted[part::PARTS] or fitted
        with self._watching():
            for at, b in enumerate(fitted):
                draws = curvature and at % DRAWN == 0
                first = self._origin[b].to(self._walk.device).clone().requires_grad_()
                last = self._run(b, first.clone(), gradient=True)  # a layer may write into what it is given
                asked, drawn = self._objective.slopes(b, last.detach(), generator if draws else None)
                seen = [
                    matrix for matrix in self._matrices if matrix.u is not None and matrix.u.requires_grad
                ]
                outputs = [matrix.u for matrix in seen if matrix.u is not None]
                slopes = torch.autograd.grad(last, outputs, asked, retain_graph=draws, allow_unused=True)
                for matrix, slope in zip(seen, slopes, strict=True):
                    matrix.take(slope, curvature)
                if draws:
                    slopes = torch.autograd.grad(last, outputs, drawn, allow_unused=True)
                    for matrix, slope in zip(seen, slopes, strict=True):
                        matrix.draw(slope)

    def _run(self, b: int, states: torch.Tensor, *, gradient: bool = False) -> torch.Tensor:
        for i in self._layers:
            states = self._walk.call(i, b, states, gradient=gradient)
        return states

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside the block each matrix keeps what went in and came out."""

        def watch(matrix: Matrix) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, result: torch.Tensor) -> None:
                matrix.z, matrix.u = args[0].detach(), result

            return hook

        handles = [matrix.module.register_forward_hook(watch(matrix)) for matrix in self._matrices]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for matrix in self._matrices:
                matrix.z = matrix.u = None

    def _search(self, directions: Sequence[torch.Tensor]) -> tuple[float, float]:
        """(length, L): doubled or halved from a first guess as long as the loss on the sequences held out falls."""
        largest = max(
            float(direction.norm() / matrix.weight.float().norm().clamp_min(1e-12))
            for matrix, direction in zip(self._matrices, directions, strict=True)
        )
        tried = {0.0: self._loss}

        def loss(length: float) -> float:
            if length not in tried:
                for matrix, direction in zip(self._matrices, directions, strict=True):
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
        best = min(tried, key=lambda tried_length: tried[tried_length])
        self._size = best * largest or _FIRST
        return best, tried[best]


def _steps(layer: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether the module is a plain matrix (nn.Linear, GPT-2's Conv1D), and no shared expert: those take the map of
    all experts' sum."""
    plain = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return plain and not hasattr(layer.get_submodule(name.rpartition(".")[0].partition(".")[0]), "experts")


def _affordable(
    matrices: Iterable[tuple[int, str, nn.Module]], device: torch.device, written: torch.dtype | None
) -> Iterator[Matrix]:
    """Those of the first layers whose sums fit into half of the free memory."""
    room = int(COPY_SHARE * free(device))
    for i, name, module in matrices:
        d, f = Output(name, module).weight.shape
        room -= 4 * (2 * d * f + d * d + f * f)
        if room < 0:
            return
        yield Matrix(i, name, module, written)
