"""Least squares on what a layer computes: normal equations gathered block by block, and a ridge solve.

With features z [tokens, f] that a weight W maps into the residual stream, and the change r [tokens, d] that the stream
should have had, the new weight is W + D, where D [d, f] minimizes

    sum_t w_t |r_t - D z_t|^2  +  lambda |D|^2

A ridge on D is a ridge of the new weight toward the old one. lambda is chosen by the error on sequences that took no
part in the fit. Products are made in float32 for some thousand tokens at a time and summed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# lambda, in units of the mean of the diagonal of sum_t w_t z_t z_t^T
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-8, 3))
_BLOCKS = 8  # G is symmetric: of so many block columns only the upper parts are multiplied out


class NormalEquations:
    """G = sum w z z^T [f, f], C = sum w r z^T [d, f] and sum w |r|^2, for fitted and for held-out tokens apart."""

    def __init__(self, features: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.gram = [torch.zeros(features, features, dtype=torch.float64, device=device) for _ in range(2)]
        self.cross = [torch.zeros(outputs, features, dtype=torch.float64, device=device) for _ in range(2)]
        self.power = [0.0, 0.0]
        self.weight = [0.0, 0.0]

    def add(
        self,
        features: torch.Tensor,
        change: torch.Tensor,
        weight: torch.Tensor | None = None,
        *,
        held_out: bool = False,
    ) -> None:
        """Add tokens: `features` [tokens, f], `change` [tokens, d], `weight` [tokens] (one each where None)."""
        at = int(held_out)
        z, r = features.float(), change.float()
        if weight is None:
            self.weight[at] += len(z)
        else:
            self.weight[at] += float(weight.double().sum())
            root = weight.float().sqrt()[:, None]
            z, r = z * root, r * root
        step = max(256, -(-z.shape[1] // _BLOCKS))
        for start in range(0, z.shape[1], step):
            block = z[:, start : start + step].T @ z[:, start:]
            self.gram[at][start : start + step, start:] += block
        self.cross[at] += r.T @ z
        self.power[at] += float(r.double().square().sum())

    def error(self, delta: torch.Tensor, gram: torch.Tensor, *, held_out: bool = True) -> float:
        """sum w |r - D z|^2 / sum w of the tokens held out (or fitted); `gram` is their whole G."""
        at = int(held_out)
        fitted = float((delta @ gram).mul_(delta).sum()) - 2 * float((delta * self.cross[at]).sum())
        return max(self.power[at] + fitted, 0.0) / max(self.weight[at], 1e-30)

    def whole(self, at: int) -> torch.Tensor:
        """G with both its triangles."""
        upper = self.gram[at].triu()
        return upper + upper.triu(1).T


@dataclass(frozen=True)
class Solution:
    """`delta`: D, float64 [d, f]. `strength`: lambda over the mean diagonal. `before`, `after`: the mean squared error
    a token on the tokens held out, without D and with it."""

    delta: torch.Tensor
    strength: float
    before: float
    after: float

    @property
    def left(self) -> float:
        """The share of the error that is left on tokens held out."""
        return self.after / self.before if self.before else 1.0


def solve(equations: NormalEquations) -> Solution:
    """The ridge solution whose strength does best on the tokens held out, fitted again on all tokens.

    D is zero where no strength beats doing nothing. The tokens held out stay out: they tell what D is worth.
    """
    fit, held = equations.whole(0), equations.whole(1)
    zero = torch.zeros_like(equations.cross[0])
    before = equations.error(zero, held)
    errors: dict[int, float] = {}

    def error(at: int) -> float:
        if at not in errors:
            delta = ridge(fit, equations.cross[0], STRENGTHS[at])
            errors[at] = float("inf") if delta is None else equations.error(delta, held)
        return errors[at]

    # The error falls and then rises with the strength: walk downhill from the middle.
    best = len(STRENGTHS) // 2
    while True:
        near = min((at for at in (best - 1, best, best + 1) if 0 <= at < len(STRENGTHS)), key=error)
        if near == best:
            break
        best = near
    if not errors[best] < before:
        return Solution(zero, float("inf"), before, before)
    delta = ridge(fit, equations.cross[0], STRENGTHS[best])
    assert delta is not None
    return Solution(delta, STRENGTHS[best], before, errors[best])


def ridge(gram: torch.Tensor, cross: torch.Tensor, strength: float) -> torch.Tensor | None:
    """D = C (G + lambda I)^-1 by Cholesky, or None where G + lambda I is not positive to working precision.

    lambda is `strength` times the mean of G's diagonal.
    """
    damped = gram.clone()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(strength * mean)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(mean > 0):
        return None
    return torch.cholesky_solve(cross.T, factor).T
