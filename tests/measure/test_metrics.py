"""The angular distance, against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from slicer.errors import CalibrationError
from slicer.measure import metrics


def states(depth: int = 5, batch: int = 6, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(depth + 1, batch, size, generator=torch.Generator().manual_seed(seed))


def test_it_is_equation_7() -> None:
    x = states().double()
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)  # [L+1, L+1, batch]
    expected = torch.arccos(cosine.clamp(-1, 1)) / math.pi
    angles = metrics.angles(x)
    off = ~torch.eye(6, dtype=torch.bool)
    assert torch.allclose(angles.mean(0)[off], expected.mean(-1)[off], atol=1e-12)
    error = expected.std(-1, correction=1) / math.sqrt(6)
    assert torch.allclose(metrics.standard_error(angles)[off], error[off], atol=1e-9)


def test_nearly_parallel_states_keep_their_digits() -> None:
    """arccos in float32 cannot tell an angle of 1e-5 from zero."""
    angle = 1e-5
    x = torch.zeros(2, 1, 4, dtype=torch.float64)
    x[0, 0, 0], x[1, 0, 0], x[1, 0, 1] = 1.0, 3 * math.cos(angle), 3 * math.sin(angle)
    assert metrics.angles(x).mean(0)[0, 1].item() == pytest.approx(angle / math.pi, rel=1e-9)


def test_batches_do_not_matter() -> None:
    x = states(batch=7)
    pieces = torch.cat([metrics.angles(x[:, :3]), metrics.angles(x[:, 3:])])
    assert torch.allclose(metrics.angles(x), pieces, atol=1e-14) and len(pieces) == 7


def test_opposite_is_one_and_length_does_not_count() -> None:
    x = states(depth=1)
    x[1] = -2 * x[0]
    assert metrics.angles(x).mean(0)[0, 1].item() == pytest.approx(1)


def test_states_that_are_not_finite_name_the_layer() -> None:
    x = states()
    x[3, 2, 1] = float("inf")
    with pytest.raises(CalibrationError, match="layer 3"):
        metrics.check_finite(x)


def test_every_metric_by_hand() -> None:
    """Each pair of layers, each token, in the plainest words."""
    x = torch.stack([states(depth=3, batch=2, size=12, seed=s) for s in range(4)], 2)  # [4, 2, positions 4, 12]
    found = metrics.per_sequence(x)
    for b in range(2):
        for low in range(4):
            for high in range(low + 1, 4):
                u, v = x[low, b].double(), x[high, b].double()
                cosine = torch.nn.functional.cosine_similarity(u, v, dim=-1)
                expected = {
                    "angular_last_token": torch.arccos(cosine[-1]) / math.pi,
                    "angular_mean": torch.arccos(cosine).mean() / math.pi,
                    "block_influence": (1 - cosine).mean(),
                    "relative_l1": ((v - u).abs().sum(-1) / u.abs().sum(-1)).mean(),
                    "relative_l2": ((v - u).norm(dim=-1) / u.norm(dim=-1)).mean(),
                }
                assert set(expected) == set(found)
                for name, value in expected.items():
                    assert found[name][b, low, high].item() == pytest.approx(value.item(), abs=1e-6), name


def linear_cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Kornblith et al., in its feature form: |X'Y|^2 / |X'X| |Y'Y| of centred columns."""
    a, b = (z.double() - z.double().mean(0) for z in (a, b))
    return float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))


def test_cka_and_its_jackknife() -> None:
    x = torch.cumsum(torch.randn(4, 24, 10, generator=torch.Generator().manual_seed(0)), 0)
    value, pseudo = metrics.cka(x, groups=6)
    for low in range(4):
        for high in range(low + 1, 4):
            whole = 1 - linear_cka(x[low], x[high])
            assert value[low, high].item() == pytest.approx(whole, abs=1e-6)
            for g in range(6):
                stay = torch.ones(24, dtype=torch.bool)
                stay[g * 4 : g * 4 + 4] = False
                without = 1 - linear_cka(x[low][stay], x[high][stay])
                assert pseudo[g, low, high].item() == pytest.approx(6 * whole - 5 * without, abs=1e-5)
    rotation = torch.linalg.qr(torch.randn(10, 10)).Q
    again, _ = metrics.cka(torch.stack([x[0], 3 * x[0] @ rotation + 1]), groups=6)
    assert again[0, 1].item() == pytest.approx(0, abs=1e-5), "a rotation, a scale and a shift are no change"


def test_the_fold_residual_is_leave_one_sequence_out_ridge() -> None:
    """Against a refit without each sequence; in so few dimensions that the projection is done by hand too."""
    generator = torch.Generator().manual_seed(0)
    groups, share, width = 5, 6, 8
    x = torch.cumsum(torch.randn(3, groups * share, width, generator=generator), 0)
    mlp = torch.randn(2, groups * share, width, generator=generator)
    x[2] = x[1] + mlp[0] @ torch.randn(width, width, generator=generator) + 0.1 * x[0]
    found = metrics.fold_residual(x, mlp, groups)
    directions = torch.randn(width, metrics.SKETCH, generator=torch.Generator().manual_seed(0))
    y = ((x[2] - x[1]) @ directions / math.sqrt(metrics.SKETCH)).double()
    m = mlp[0].double()
    m = m / ((m @ m.T).trace() / len(m)).sqrt()
    tries = []
    for ridge in metrics.RIDGES:
        residual = torch.empty_like(y)
        for g in range(groups):
            out = torch.zeros(len(m), dtype=torch.bool)
            out[g * share : (g + 1) * share] = True
            a = m[~out]
            fit = torch.linalg.solve(a.T @ a + ridge * torch.eye(width).double(), a.T @ y[~out])
            residual[out] = y[out] - m[out] @ fit
        tries.append(residual)
    best = min(tries, key=lambda r: float(r.square().sum())).view(groups, -1).norm(dim=1)
    expected = best / x[1].double().reshape(groups, -1).norm(dim=1)
    assert torch.allclose(found[:, 1, 2], expected, rtol=1e-3)
    assert (found[:, 1, 2] < 0.5 * (x[2] - x[1]).norm() / x[1].norm()).all(), "most of it can be explained"
    assert (found[:, 0, 1:] > 0).all(), "with no layer before it nothing is explained, and the block still counts"


def test_the_cost_of_points_is_bounded() -> None:
    large = metrics.points_affordable(81, 8192, 64, 64 * 256, 70 * 10**9)
    small = metrics.points_affordable(13, 192, 64, 64 * 256, 3 * 10**6)
    assert large == 1024 and small < 1024
    assert metrics.points_affordable(81, 8192, 3000, 3000 * 256, 70 * 10**9) == 1024
