"""Least squares on what a layer computes: normal equations gathered block by block, and a ridge solve.

With features z [tokens, f] that a weight W maps into the residual stream, and the change r [tokens, d] that the stream
should have had, the new weight is W + D, where D [d, f] minimizes

    sum_t w_t |r_t - D z_t|^2  +  lambda |D|^2

A ridge on D is a ridge of the new weight toward the old one. lambda is chosen by the error on sequences that took no
part in the fit. Products are made in float32 for one sequence at a time and summed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# lambda, in units of the mean of the diagonal of sum_t w_t z_t z_t^T
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-8, 3))
_BLOCKS = 8  # G is symmetric: of so many block columns only the upper parts are multiplied out


class NormalEquations:
    """G = sum w z z^T [f, f] and C = sum w r z^T [d, f] of the tokens to fit; and the tokens held out, as they are.

    G takes 8 f^2 bytes, and solving twice as much again: 0.6 GB for f = 4,864, 2.9 GB for 11,008.
    """

    def __init__(self, features: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self._gram = torch.zeros(features, features, dtype=torch.float64, device=device)  # its upper triangle
        self.cross = torch.zeros(outputs, features, dtype=torch.float64, device=device)
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._held_weight = 0.0

    def add(
        self,
        features: torch.Tensor,
        change: torch.Tensor,
        weight: torch.Tensor | None = None,
        *,
        held_out: bool = False,
    ) -> None:
        """Add tokens: `features` [tokens, f], `change` [tokens, d], `weight` [tokens] (one each where None)."""
        weight = torch.ones(len(features), device=features.device) if weight is None else weight.float()
        root = weight.sqrt()[:, None]
        z, r = features.float() * root, change.float() * root
        if held_out:
            self._held.append((z, r))
            self._held_weight += float(weight.double().sum())
            return
        step = max(256, -(-z.shape[1] // _BLOCKS))
        for start in range(0, z.shape[1], step):
            self._gram[start : start + step, start:] += z[:, start : start + step].T @ z[:, start:]
        self.cross += r.T @ z

    @property
    def gram(self) -> torch.Tensor:
        """G, both triangles."""
        return self._gram.triu() + self._gram.triu(1).T

    def error(self, delta: torch.Tensor | None) -> float:
        """sum w |r - D z|^2 / sum w over the tokens held out; D = 0 where `delta` is None."""
        total = 0.0
        for z, r in self._held:
            left = r if delta is None else r - z @ delta.T.float()
            total += float(left.double().square().sum())
        return total / max(self._held_weight, 1e-30)


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


def solve(equations: NormalEquations) -> Solution | None:
    """The ridge solution whose strength does best on the tokens held out; None where none beats doing nothing.

    The tokens held out stay out: they tell what D is worth.
    """
    gram = equations.gram
    best: tuple[float, float, torch.Tensor] | None = None
    errors: dict[int, float] = {}

    def error(at: int) -> float:
        nonlocal best
        if at not in errors:
            delta = ridge(gram, equations.cross, STRENGTHS[at])
            errors[at] = float("inf") if delta is None else equations.error(delta)
            if delta is not None and (best is None or errors[at] < best[0]):
                best = (errors[at], STRENGTHS[at], delta)
        return errors[at]

    # The error falls and then rises with the strength: walk downhill from the middle.
    at = len(STRENGTHS) // 2
    while True:
        near = min((k for k in (at - 1, at, at + 1) if 0 <= k < len(STRENGTHS)), key=error)
        if near == at:
            break
        at = near
    before = equations.error(None)
    if best is None or not best[0] < before:
        return None
    return Solution(best[2], best[1], before, best[0])


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
