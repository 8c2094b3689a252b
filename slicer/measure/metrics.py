"""Every metric of an analysis, and those that compare the residual stream entering layer l and layer m, for all pairs.

`METRICS` is the one list: the command line, tables and figures take names and titles from it. A metric that averages
over tokens is one entry, with its comparison. `cka` and `fold_residual` need tokens of many sequences together; the
rest is measured by `measure/losses`, `measure/shapley` and `jobs/analyze`. All are 0 for a block that changes nothing
and grow with the change. Comparisons are in float64, of states in the model's precision. Torch is imported only where
it is used: names and titles are read without it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from slicer.errors import CalibrationError
from slicer.plan.plan import METRIC

if TYPE_CHECKING:
    import torch


SKETCH = 32  # dimensions of the random projection used for the fold residual
RIDGES = (1e-3, 1e-1)  # relative to the mean eigenvalue; the better one on left-out sequences is used
_TINY = sys.float_info.min


class TokenStates:
    """Residual streams u = x(l) and v = x(m) of some sequences at some tokens, with what several metrics share.

    `states`: x(0)..x(L) [L+1, batch, positions, d]; the last position is the last token of its sequence. All
    products are float64 [batch, positions, L+1, L+1], with entry (l, m).
    """

    def __init__(self, states: torch.Tensor) -> None:
        self.last = states[:, :, -1]  # [L+1, batch, d]
        self.plain = states.permute(1, 2, 0, 3).contiguous().float()  # [batch, positions, L+1, d]

    @cached_property
    def gram(self) -> torch.Tensor:
        """u . v"""
        tokens = self.plain.double()
        return tokens @ tokens.mT

    @cached_property
    def square(self) -> torch.Tensor:
        """|u|^2, [batch, positions, L+1]"""
        return self.gram.diagonal(dim1=-2, dim2=-1).clamp_min(_TINY)

    @cached_property
    def cosine(self) -> torch.Tensor:
        """u . v / |u| |v|"""
        norm = self.square.sqrt()
        return (self.gram / (norm[..., :, None] * norm[..., None, :])).clamp_(-1, 1)

    def relative_l1(self) -> torch.Tensor:
        """|v - u|_1 / |u|_1"""
        import torch

        length = self.plain.abs().sum(-1).double().clamp_min(_TINY)
        return torch.cdist(self.plain, self.plain, p=1).double() / length[..., None]

    def relative_l2(self) -> torch.Tensor:
        """|v - u|_2 / |u|_2"""
        square = self.square
        apart = (square[..., :, None] + square[..., None, :] - 2 * self.gram).clamp_min_(0).sqrt_()
        return apart / square.sqrt()[..., None]


@dataclass(frozen=True)
class Metric:
    """A metric of blocks of layers.

    Attributes:
        title: of its figures and tables.
        compare: [batch, L+1, L+1] of some sequences, for a metric that averages over the tokens of a sequence.
        single: whether it is worth measuring at one token alone.
    """

    title: str
    compare: Callable[[TokenStates], torch.Tensor] | None = None
    single: bool = True


METRICS = {
    METRIC: Metric("angular distance, last token (units of pi)", lambda x: angles(x.last)),
    "angular_mean": Metric(
        "angular distance, mean over tokens (units of pi)",
        lambda x: (x.cosine.arccos() / math.pi).mean(1),
        single=False,  # the same as at the last token
    ),
    "block_influence": Metric("block influence, 1 - cosine", lambda x: (1 - x.cosine).mean(1)),  # ShortGPT, equation 1
    "relative_l1": Metric("relative L1 change", lambda x: x.relative_l1().mean(1)),
    "relative_l2": Metric("relative L2 change", lambda x: x.relative_l2().mean(1)),
    "cka": Metric("1 - linear CKA"),
    "fold_residual": Metric("residual of a fold, relative L2"),
    "loss": Metric("loss without the block (nats per token, increase)"),
    "kl": Metric("KL divergence to the full model (nats per token)"),
    "taylor": Metric("Taylor importance, |gradient x weight|"),
    "shapley": Metric("Shapley value (nats per token)"),
    "shapley_score": Metric("Shapley value (share of questions answered wrongly)"),
    "healed_loss": Metric("loss after closed-form healing (nats per token, increase)"),
}


def title_of(name: str) -> str:
    """The title of a metric; its name where it is unknown, as in an analysis of another version."""
    return METRICS[name].title if name in METRICS else name


def check_finite(states: torch.Tensor, first: int = 0) -> None:
    """`states`: x(first), x(first + 1), ..., [layers, ...]. Raises CalibrationError if one is not finite."""
    finite = states.isfinite()
    if not finite.all():
        layer = first + int((~finite).flatten(1).any(1).nonzero()[0])
        raise CalibrationError(
            f"the residual stream entering layer {layer} has infinite or NaN values; "
            "measure in another dtype (--dtype float32)"
        )


def angles(states: torch.Tensor) -> torch.Tensor:
    """[L+1, batch, d] -> [batch, L+1, L+1]: angular distances in units of pi (equation 7 of the paper).

    d = arccos(u . v / |u| |v|) / pi, in [0, 1], computed as 2 atan2(|u - v|, |u + v|) of the unit vectors: arccos loses
    half the digits near 0.
    """
    import torch

    unit = states.double().transpose(0, 1)
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    apart = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    together = torch.cdist(unit, -unit, compute_mode="donot_use_mm_for_euclid_dist")
    return 2 * torch.atan2(apart, together) / math.pi


def per_sequence(states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every metric that averages over tokens: [L+1, batch, positions, d] -> name -> [batch, L+1, L+1], float64."""
    shared = TokenStates(states)
    return {name: metric.compare(shared) for name, metric in METRICS.items() if metric.compare is not None}


def standard_error(values: torch.Tensor) -> torch.Tensor:
    """[samples, ...] -> [...]: the standard error of the mean; 0 for a single sample."""
    if len(values) < 2:
        return values[0] * 0
    return values.std(0, correction=1) / math.sqrt(len(values))


def cka(points: Sequence[torch.Tensor], groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear CKA between layers, as a distance: 1 - CKA(l, m) (Kornblith et al. 2019, equation 5).

    CKA = <K, L> / |K| |L| of the centred token-by-token kernels. `points`: L+1 tensors [N, d], N tokens in `groups`
    sequences of equal length. Returns the value over all N tokens [L+1, L+1], and the jackknife pseudo-values of
    leaving out one sequence [groups, L+1, L+1], whose standard error is that of the value.
    """
    import torch

    layers, count = len(points), len(points[0])
    share = count // groups
    kernels = torch.empty(layers, count, count)
    for l in range(layers):  # noqa: E741
        x = points[l].to(torch.float32)
        x = x - x.mean(0)
        kernels[l] = x @ x.T / x.square().sum().clamp_min(1e-30)
    whole = torch.zeros(layers, layers, dtype=torch.float64)
    left_out = []
    for g in range(groups):
        own = slice(g * share, (g + 1) * share)
        rows = kernels[:, own].to(torch.float64)  # [L+1, share, N]
        flat = rows.flatten(1)
        product = flat @ flat.T
        corner = rows[:, :, own].flatten(1)
        # Centre again without g: each remaining row of a centred kernel sums to minus its entries in g.
        sums = -rows.sum(1)
        total = -sums[:, own].sum(1)
        sums[:, own] = 0
        rest = max(1, count - share)
        centring = -2 / rest * sums @ sums.T + total[:, None] * total[None] / rest**2
        whole += product
        left_out.append(-2 * product + corner @ corner.T + centring)
    value = _one_minus_cka(whole)
    if groups < 2:
        return value, value[None]
    pseudo = [groups * value - (groups - 1) * _one_minus_cka(whole + change) for change in left_out]
    return value, torch.stack(pseudo)


def _one_minus_cka(hsic: torch.Tensor) -> torch.Tensor:
    own = hsic.diagonal().clamp_min(_TINY).sqrt()
    return (1 - hsic / (own[:, None] * own[None])).clamp(0, 1)


def fold_residual(points: Sequence[torch.Tensor], mlp: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """The part of x(m) - x(l) that no linear map of layer l-1's feed-forward output explains, relative to x(l).

    `points`: x(l), L+1 tensors [N, d]; `mlp`: feed-forward output of layer l-1 at index l-1; N tokens in `groups`
    sequences of equal length. Returns [groups, L+1, L+1]: for every sequence |x(m) - x(l) - M T| / |x(l)|, Frobenius
    norms over its tokens, where T is the ridge regression on all other sequences (leave-one-out in closed form, the
    better of two ridges for each l). Comparable with relative_l2. The change is projected to 32 fixed random
    directions. For l = 0 there is no layer before, and nothing is explained.
    """
    import torch

    layers, (count, width) = len(points), points[0].shape
    share = count // groups
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(width, SKETCH, generator=generator) / math.sqrt(SKETCH)
    seen, size = torch.empty(layers, count, SKETCH), torch.empty(layers, groups)
    for l in range(layers):  # noqa: E741
        states = points[l].to(torch.float32)
        seen[l] = states @ directions
        size[l] = states.view(groups, -1).norm(dim=1).clamp_min(1e-30)
    found = torch.zeros(groups, layers, layers, dtype=torch.float64)
    for l in range(layers - 1):  # noqa: E741
        change = (seen[l + 1 :] - seen[l]).permute(1, 0, 2)  # [N, L-l, SKETCH]
        best = change.reshape(groups, share, -1)
        if l:
            m = mlp[l - 1].to(torch.float32)
            kernel = m @ m.T
            kernel /= (kernel.trace() / count).clamp_min(1e-30)
            tries = [_left_out(kernel, change, groups, ridge) for ridge in RIDGES]
            best = min([*tries, best], key=lambda residual: float(residual.square().sum()))
        norms = best.reshape(groups, share, layers - 1 - l, SKETCH).square().sum((1, 3)).sqrt()
        found[:, l, l + 1 :] = (norms / size[l][:, None]).to(torch.float64)
    return found


def _left_out(kernel: torch.Tensor, change: torch.Tensor, groups: int, ridge: float) -> torch.Tensor:
    """Residuals of each group predicted from the others: (A_gg)^-1 (A Y)_g with A = (K + ridge)^-1."""
    import torch

    count = len(kernel)
    share = count // groups
    unit = torch.eye(count)
    inverse = torch.cholesky_solve(unit, torch.linalg.cholesky(kernel + ridge * unit))
    applied = (inverse @ change.reshape(count, -1)).view(groups, share, -1)
    blocks = inverse.view(groups, share, groups, share).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    residual: torch.Tensor = torch.linalg.inv(blocks) @ applied
    return residual


def points_affordable(layers: int, width: int, samples: int, tokens: int, layer_parameters: int) -> int:
    """Number of tokens for CKA and the fold residual: at most 1024, at most about 2% of the cost of a forward pass.

    A multiple or a divisor of `samples`, so that all sequences give equally many tokens.
    """
    forward = 2.0 * layer_parameters * tokens
    for count in (1024, 512, 256, 128):
        kernels = 4.0 * count**2 * width * layers
        # A factorisation runs at a quarter of the speed of a matrix product.
        solving = len(RIDGES) * layers * (8.0 * count**3 + count**2 * layers * SKETCH)
        if kernels + solving + 4.0 * count**2 * layers**2 <= 0.02 * forward:
            break
    return max(1, count // samples) * min(samples, count)
