"""Ridge regression on the inputs and outputs of a layer: held-out split, rows, normal equations, solution.

With features z [tokens, f] that a weight W maps into the residual stream, and the wanted change r [tokens, d] of the
stream, the new weight is W + D, where D [d, f] minimizes

    sum_t w_t |r_t - D z_t|^2  +  lambda |D|^2

A ridge on D is a ridge of the new weight toward the old one. w_t = 1 / |x_t|^2, because the norms behind the cut see
the stream x relative to its length; the first positions of each sequence (attention sinks) are left out. lambda is
chosen by the error on held-out sequences. Products are computed in float32 for one sequence at a time and
summed in float64.

Solving works in place: G is the upper triangle of a matrix, and the Cholesky factor of G + lambda I its lower one, for
one lambda after another. To compare them, D is computed a few rows at a time; the D that is best replaces C (see
`NormalEquations`). This takes

    8 (f^2 + d f) bytes

and a few rows and columns, and the held-out tokens, 4 (f + d) bytes each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from slicer.data.packing import held_out
from slicer.errors import HealError
from slicer.model.output_maps import Observed, Output, arriving, watching
from slicer.model.states import Batches, States
from slicer.model.walk import Walk

MIN_SEQUENCES = 4
TOGETHER = 512  # tokens in a batch, at most: gradients need all that the layers behind the cut compute on it
SINKS = 4  # positions at the start of a sequence that are left out
# lambda, in units of the mean of the diagonal of sum_t w_t z_t z_t^T
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-8, 3))
_BLOCKS = 8  # z^T z is symmetric: only the upper parts of this many block columns are computed
_COLUMNS = 256  # columns that are factored, solved or multiplied at a time


@dataclass(frozen=True)
class Split:
    """Calibration batches, int64 [batch, seq]; the held-out sequences are in separate batches, numbered `held`.
    `sequences`: their numbers before the split, over all batches."""

    batches: list[torch.Tensor]
    held: range
    sequences: tuple[int, ...]


def split(batches: Batches) -> Split:
    """Hold out the sequences of `slicer.data.packing.held_out`, to choose ridge strengths and lengths of steps by.

    Raises HealError for too few sequences.
    """
    count, length = sum(len(batch) for batch in batches), batches[0].shape[1] if batches else 0
    if count < MIN_SEQUENCES or length <= 2 * SINKS:
        raise HealError(
            f"{count} calibration sequences of {length} tokens are too few to heal on; give at least "
            f"{MIN_SEQUENCES} of {2 * SINKS + 1} (--samples, --seq-len)"
        )
    held = held_out(count)
    size = max(1, min(len(batches[0]), TOGETHER // length))
    sequences = torch.cat(list(batches))
    apart = torch.zeros(count, dtype=torch.bool)
    apart[held] = True
    fitted = list(torch.split(sequences[~apart], size))
    both = fitted + list(torch.split(sequences[apart], size))
    return Split(both, range(len(fitted), len(both)), tuple(held))


def add_gram(total: torch.Tensor, z: torch.Tensor) -> None:
    """Add z^T z of `z` [tokens, f] to the upper triangle of `total` [f, f], in blocks of columns."""
    step = max(256, -(-z.shape[1] // _BLOCKS))
    for start in range(0, z.shape[1], step):
        total[start : start + step, start:] += z[:, start : start + step].T @ z[:, start:]


def _columns(count: int) -> list[slice]:
    """0 .. count in blocks of `_COLUMNS`."""
    return [slice(start, min(start + _COLUMNS, count)) for start in range(0, count, _COLUMNS)]


class NormalEquations:
    """G = sum w z z^T [f, f] and C = sum w r z^T [d, f] of the tokens to fit; and the held-out tokens themselves.

    G is in the upper triangle of one matrix; `ridge` works in the lower one.
    """

    def __init__(self, features: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self._gram = torch.zeros(features, features, dtype=torch.float64, device=device)  # G in its upper triangle
        self.cross = torch.zeros(outputs, features, dtype=torch.float64, device=device)
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._held_weight = 0.0

    def add(
        self, features: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, *, held_out: bool = False
    ) -> None:
        """Add tokens: `features` [tokens, f], `change` [tokens, d], `weight` [tokens]."""
        root = weight.float().sqrt()[:, None]
        z, r = features.float() * root, change.float() * root
        if held_out:
            self._held.append((z, r))
            self._held_weight += float(weight.double().sum())
            return
        add_gram(self._gram, z)
        self.cross += r.T @ z

    @property
    def gram(self) -> torch.Tensor:
        """G, both triangles; valid until `ridge` works in the lower one, or tokens are added."""
        for at in _columns(len(self._gram)):
            block = self._gram[at, at].triu()
            self._gram[at, at] = block + block.triu(1).T
            self._gram[at.stop :, at] = self._gram[at, at.stop :].T
        return self._gram

    def error(self, rows: Callable[[slice], torch.Tensor] | None) -> float:
        """sum w |r - D z|^2 / sum w over the held-out tokens; `rows(at)`: these rows of D; None: D = 0."""
        total = 0.0
        for at in _columns(len(self.cross)):
            part = None if rows is None else rows(at).T.float()
            for z, r in self._held:
                left = r[:, at]
                total += float((left if part is None else left - z @ part).double().square().sum())
        return total / max(self._held_weight, 1e-30)


@dataclass(frozen=True)
class Solution:
    """`delta`: D, float64 [d, f]. `strength`: lambda over the mean diagonal. `before`, `after`: the mean squared error
    per held-out token, without D and with it."""

    delta: torch.Tensor
    strength: float
    before: float
    after: float

    @property
    def left(self) -> float:
        """The share of the error that is left on the held-out tokens."""
        return self.after / self.before if self.before else 1.0


def solve(equations: NormalEquations) -> Solution | None:
    """The ridge solution with the strength that is best on the held-out tokens; None if none is better than D = 0.

    It replaces C: `equations` cannot be solved again.
    """
    gram, cross = equations.gram, equations.cross
    errors: dict[int, float] = {}

    def error(at: int) -> float:
        if at not in errors:
            factor = _factor(gram, STRENGTHS[at])
            rows = None if factor is None else lambda some: _solved(gram, factor, cross[some].clone())
            errors[at] = float("inf") if rows is None else equations.error(rows)
        return errors[at]

    # The error falls and then rises with the strength: walk downhill from the middle.
    at = len(STRENGTHS) // 2
    while True:
        near = min((k for k in (at - 1, at, at + 1) if 0 <= k < len(STRENGTHS)), key=error)
        if near == at:
            break
        at = near
    before = equations.error(None)
    if not errors[at] < before:
        return None
    return Solution(ridge(gram, cross, STRENGTHS[at]), STRENGTHS[at], before, errors[at])


def ridge(gram: torch.Tensor, cross: torch.Tensor, strength: float) -> torch.Tensor:
    """D = C (G + lambda I)^-1 by Cholesky, in place of C; lambda is `strength` times the mean of G's diagonal.

    Reads the upper triangle of `gram` and overwrites the rest. Raises ValueError if G + lambda I is not positive to
    working precision.
    """
    factor = _factor(gram, strength)
    if factor is None:
        raise ValueError("the matrix is not positive")
    return _solved(gram, factor, cross)


_Factor = list[tuple[slice, torch.Tensor]]  # (columns, block on the diagonal) of L; the rest of L is below G


def _solved(gram: torch.Tensor, factor: _Factor, delta: torch.Tensor) -> torch.Tensor:
    """Some rows of D with D L L^T = C, in place of the same rows of C, which `delta` holds."""
    for at, block in factor:  # C L^-T, block by block from the left, then D from the right
        delta[:, at].addmm_(delta[:, : at.start], gram[at, : at.start].T, alpha=-1)
        delta[:, at] = torch.linalg.solve_triangular(block.T, delta[:, at], upper=True, left=False)
    for at, block in reversed(factor):
        delta[:, at].addmm_(delta[:, at.stop :], gram[at.stop :, at], alpha=-1)
        delta[:, at] = torch.linalg.solve_triangular(block, delta[:, at], upper=False, left=False)
    return delta


def _factor(gram: torch.Tensor, strength: float) -> _Factor | None:
    """L with L L^T = G + lambda I, lambda = `strength` times the mean of G's diagonal; None if that is not positive.

    The part of L below its blocks on the diagonal replaces the lower triangle of `gram`; the upper one, G, stays.
    """
    blocks, damping = [], strength * gram.diagonal().mean()
    if not bool(damping > 0):
        return None
    for at in _columns(len(gram)):
        left, below, behind = gram[at, : at.start], gram[at.stop :, at], gram[at.stop :, : at.start]
        block = gram[at, at].triu()
        block = block + block.triu(1).T
        block.addmm_(left, left.T, alpha=-1).diagonal().add_(damping)
        block, failed = torch.linalg.cholesky_ex(block)
        if int(failed):
            return None
        below.copy_(gram[at, at.stop :].T).addmm_(behind, left.T, alpha=-1)
        below.copy_(torch.linalg.solve_triangular(block.T, below, upper=True, left=False))
        blocks.append((at, block))
    return blocks


def reduced_rank(
    solution: Solution, equations: NormalEquations, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(down [r, d], up [d, r], c [d]) of the best map of this rank, float64: up = U, down = U^T B, with U the leading
    eigenvectors of B G B^T, the covariance of the outputs of the full solution. The constant keeps full rank."""
    full, c = solution.delta[:, :-1], solution.delta[:, -1]
    gram = equations.gram[:-1, :-1]
    _, vectors = torch.linalg.eigh(full @ gram @ full.T)
    up = vectors[:, -rank:]
    return up.T @ full, up, c


@dataclass(frozen=True)
class LayerFit:
    """One layer, number `i` of the source: its input in the cut and its wanted output, by batch.

    Attributes:
        layer: the module in its present state: its weights in place, without the removed sublayers.
        entering, target: [batch, seq, d] each. held: numbers of the held-out batches.
    """

    walk: Walk
    i: int
    layer: nn.Module
    entering: States
    target: States
    held: range

    def run(self, b: int = 0) -> torch.Tensor:
        """The layer's present output for a batch: [batch, seq, d], on the device."""
        return self.walk.call(self.i, b, self.entering[b])


def gather(fit: LayerFit, output: Output, solver: str) -> NormalEquations:
    """The normal equations of `output` over all batches."""
    equations: NormalEquations | None = None
    with watching(fit.layer, output) as seen:
        for b in range(len(fit.entering)):
            h = fit.run(b)
            wanted = fit.target[b].to(h.device)
            if output.factor is None:  # a separate gate for each token
                factors = arriving(output, partial(fit.run, b))[0]
            else:
                factors = torch.full(h.shape[:2], output.factor, device=h.device)
            for row in range(len(h)):
                z, r, weight = _rows(output, seen, row, h, wanted, factors, solver)
                if equations is None:
                    equations = NormalEquations(z.shape[1], r.shape[1], z.device)
                equations.add(z[SINKS:], r[SINKS:], weight[SINKS:], held_out=b in fit.held)
    assert equations is not None
    return equations


def _rows(
    output: Output, seen: Observed, row: int, h: torch.Tensor, wanted: torch.Tensor, factors: torch.Tensor, solver: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(features [seq, f], change [seq, d], weight [seq]) of one sequence."""
    assert seen.output is not None
    length, d = h.shape[1:]
    u = seen.output.view(len(h), length, d)[row].float()
    if output.kind == "experts" or solver == "transform":
        z = u
    else:
        assert seen.features is not None
        z = seen.features.view(len(h), length, -1)[row].float()
        if output.bias is not None:
            z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
    r = wanted[row].float() - h[row].float()
    weight = token_weights(wanted[row].float())
    if output.kind != "normed":
        return z * factors[row][:, None], r, weight
    assert seen.normed is not None
    return z, *_through_norm(u, seen.normed.view(len(h), length, d)[row].float(), r, weight)


def _through_norm(
    u: torch.Tensor, o: torch.Tensor, r: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(change of u, weight) equivalent to the change r behind an RMS norm o = g u / |u|: a Gauss-Newton step.

    Only the part of a change that is orthogonal to u passes the norm, divided by the root mean square of u.
    """
    size = u.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    direction = u / size
    gain = (direction * o).sum(0) / direction.square().sum(0).clamp_min(1e-12)  # g [d], from input and output
    wanted = (o + r) * gain / (gain.square() + 1e-4 * gain.square().mean())
    across = wanted - direction
    across = across - direction * (across * direction).mean(-1, keepdim=True)
    return across * size, weight / size[:, 0].square()


def norm_gain(fit: LayerFit, output: Output) -> tuple[torch.Tensor, float]:
    """The change of the gain g [d] of the norm behind `output`, and the share of the squared error that is left on the
    held-out sequences.

    Each component separately: the g with which g u / |u| is closest to the wanted output, by least squares.
    """
    sums: list[Any] = [0.0, 0.0]  # of the sequences fitted, and of those held out
    with watching(fit.layer, output) as seen:
        for b in range(len(fit.entering)):
            h = fit.run(b)
            for row in range(len(h)):
                assert seen.output is not None and seen.normed is not None
                u = seen.output[row, SINKS:].float()
                wanted = fit.target[b][row, SINKS:].to(h.device).float()
                r = wanted - h[row, SINKS:].float()
                direction = u / u.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
                weight = token_weights(wanted)[:, None]
                terms = [weight * direction * r, weight * direction.square(), weight * r.square()]
                added = torch.stack([term.sum(0) for term in terms]).double()
                sums[b in fit.held] += added
    cross, own, _ = sums[0]
    change: torch.Tensor = cross / own.clamp_min(1e-30)
    cross, own, power = sums[1]
    after = power - 2 * change * cross + change.square() * own
    return change, float(after.sum() / power.sum().clamp_min(1e-30))


def token_weights(wanted: torch.Tensor) -> torch.Tensor:
    """1 / |x|^2 of each token, [.., d] -> [..], with |x| the root mean square."""
    return 1 / wanted.square().mean(-1).clamp_min(1e-12)
