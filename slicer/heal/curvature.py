"""One matrix of a layer and its Kronecker-factored curvature (K-FAC; see `newton`)."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from slicer.heal.outputs import Output

DAMPING = (0.1, 1.0)  # a and b, in units of the mean of the diagonal of A and G


class Matrix:
    """A matrix W of a kept layer: what it becomes, and the sums of one pass.

    Attributes:
        layer, name: where it is: the module within the layer.
        delta: float32 [d, f], what was added to W so far.
        gradient: dL/dW, float32 [d, f].
        inputs, outputs: A [f, f] and G [d, d], float32.
        z, u: of the last run: what went in, [.., f], and what came out, [.., d].
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
        """W becomes what it was plus `delta`, in its own dtype, rounded as it will be written."""
        change = delta.T if self._transposed else delta
        self._parameter.data = (self._own.float() + change).to(self._written).to(self._own.dtype)

    def restore(self) -> None:
        """W is the very tensor that it was."""
        self._parameter.data = self._own

    def take(self, slope: torch.Tensor | None, curvature: bool) -> None:
        """Add the tokens of one batch: dL/du [.., d] of the last run."""
        if slope is None or self.z is None:
            return
        z, g = self.z.flatten(0, -2).float(), slope.flatten(0, -2).float()
        self.gradient += g.T @ z
        if curvature:
            step = max(256, -(-z.shape[1] // 8))
            for start in range(0, z.shape[1], step):  # A is symmetric: its upper triangle will do
                self.inputs[start : start + step, start:] += z[:, start : start + step].T @ z[:, start:]

    def draw(self, slope: torch.Tensor | None) -> None:
        """Add to G the slopes [.., d] of the log likelihood of drawn tokens."""
        if slope is not None:
            g = slope.flatten(0, -2).float()
            self.outputs += g.T @ g

    def direction(self) -> torch.Tensor:
        """D, float32 [d, f], up to a factor that all matrices share; the first call settles A and G."""
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
