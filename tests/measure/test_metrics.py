"""The angular distance, against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from slicer.errors import CalibrationError
from slicer.measure.metrics import AngularDistance


def states(depth: int = 5, batch: int = 6, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(depth + 1, batch, size, generator=torch.Generator().manual_seed(seed))


def accumulated(depth: int, *pieces: torch.Tensor) -> AngularDistance:
    angles = AngularDistance(depth)
    for piece in pieces:
        angles.add(piece)
    return angles


def test_it_is_equation_7() -> None:
    x = states().double()
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)  # [L+1, L+1, batch]
    expected = torch.arccos(cosine.clamp(-1, 1)) / math.pi
    angles = accumulated(5, x)
    off = ~torch.eye(6, dtype=torch.bool)
    assert torch.allclose(angles.mean()[off], expected.mean(-1)[off], atol=1e-12)
    error = expected.std(-1, correction=1) / math.sqrt(6)
    assert torch.allclose(angles.standard_error()[off], error[off], atol=1e-9)


def test_nearly_parallel_states_keep_their_digits() -> None:
    """arccos in float32 cannot tell an angle of 1e-5 from zero."""
    angle = 1e-5
    x = torch.zeros(2, 1, 4, dtype=torch.float64)
    x[0, 0, 0], x[1, 0, 0], x[1, 0, 1] = 1.0, 3 * math.cos(angle), 3 * math.sin(angle)
    assert accumulated(1, x).mean()[0, 1].item() == pytest.approx(angle / math.pi, rel=1e-9)


def test_batches_do_not_matter() -> None:
    x = states(batch=7)
    whole, pieces = accumulated(5, x), accumulated(5, x[:, :3], x[:, 3:])
    assert torch.allclose(whole.mean(), pieces.mean(), atol=1e-14)
    assert whole.count == pieces.count == 7


def test_opposite_is_one_and_length_does_not_count() -> None:
    x = states(depth=1)
    x[1] = -2 * x[0]
    assert accumulated(1, x).mean()[0, 1].item() == pytest.approx(1)


def test_states_that_are_not_finite_name_the_layer() -> None:
    x = states()
    x[3, 2, 1] = float("inf")
    with pytest.raises(CalibrationError, match="layer 3"):
        accumulated(5, x)
