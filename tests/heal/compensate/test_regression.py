"""The ridge solve against NumPy's own least squares and against what it was told to find."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch

from slicer.errors import HealError
from slicer.heal.compensate.regression import STRENGTHS, NormalEquations, reduced_rank, ridge, solve, split


def data(tokens: int, f: int = 300, d: int = 7, noise: float = 0.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(tokens, f, generator=generator) * torch.linspace(0.2, 2, f)
    truth = torch.randn(d, f, generator=generator) / f**0.5
    return z, z @ truth.T + noise * torch.randn(tokens, d, generator=generator), truth


def gathered(z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor | None = None) -> NormalEquations:
    equations, weight = NormalEquations(z.shape[1], r.shape[1]), torch.ones(len(z)) if weight is None else weight
    for at, start in enumerate(range(0, len(z), 100)):
        piece = slice(start, start + 100)
        equations.add(z[piece], r[piece], weight[piece], held_out=at % 4 == 3)
    return equations


def test_the_sums_are_those_of_all_tokens_at_once() -> None:
    z, r, _ = data(1000)
    weight = torch.rand(1000)
    equations = gathered(z, r, weight)
    fitted = torch.cat([torch.arange(s, s + 100) for s in range(0, 1000, 100) if s // 100 % 4 != 3])
    z, r, weight = z[fitted], r[fitted], weight[fitted]
    exact = (z.double() * weight[:, None].double()).T @ z.double()
    assert torch.allclose(equations.gram, exact, rtol=1e-5, atol=1e-3)
    cross = (r.double() * weight[:, None].double()).T @ z.double()
    assert torch.allclose(equations.cross, cross, rtol=1e-5, atol=1e-3)


def test_ridge_solves_the_stacked_system() -> None:
    """min |r - z D'|^2 + lambda |D|^2 is ordinary least squares with sqrt(lambda) I stacked below z."""
    z, r, _ = data(500, f=20, noise=0.3)
    gram, cross = z.double().T @ z.double(), r.double().T @ z.double()
    strength = 0.5
    root = float((strength * gram.diagonal().mean()) ** 0.5)
    stacked = numpy.vstack([z.double().numpy(), root * numpy.eye(20)])
    target = numpy.vstack([r.double().numpy(), numpy.zeros((20, 7))])
    expected = numpy.linalg.lstsq(stacked, target, rcond=None)[0].T
    found = ridge(gram, cross, strength)
    assert numpy.allclose(found.numpy(), expected, atol=1e-9)


def test_ridge_leaves_the_matrix_for_another_strength() -> None:
    """In blocks of 256 columns, the last of them smaller, with the factor below the diagonal."""
    z, r, _ = data(1200, f=600, noise=0.3)
    whole, cross = z.double().T @ z.double(), r.double().T @ z.double()
    gram = whole.triu()
    for strength in (1e-4, 1.0, 1e-4):
        found = ridge(gram, cross.clone(), strength)
        damped = whole + strength * whole.diagonal().mean() * torch.eye(600, dtype=torch.float64)
        expected = torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T
        assert float((found - expected).norm() / expected.norm()) < 1e-9
    assert torch.equal(gram.triu(), whole.triu())
    indefinite = whole.clone()
    indefinite[500, 500] = -1
    for other in (-gram.triu(), indefinite):
        with pytest.raises(ValueError, match="not positive"):
            ridge(other, cross, 1e-4)


def test_both_triangles_after_a_solution_are_those_before() -> None:
    equations = gathered(*data(1200, f=600, noise=0.3)[:2])
    before = equations.gram.clone()
    assert torch.equal(before, before.T)
    assert solve(equations) is not None
    assert torch.equal(equations.gram, before)


def test_solving_takes_the_memory_of_the_formula() -> None:
    """8 (f^2 + d f) bytes, with what is there before, and a few rows and columns."""
    f, d = 2560, 1024
    z, r, _ = data(2000, f, d, noise=0.3)
    equations = gathered(z, r)
    with torch.profiler.profile(profile_memory=True) as profiled:
        assert solve(equations) is not None
    steps = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = 8 * (f * f + d * f) + max(itertools.accumulate(steps))
    assert 0.95 < most / (8 * (f * f + d * f)) < 1.25


def test_the_error_is_that_of_the_tokens() -> None:
    z, r, truth = data(1000, noise=0.3)
    equations = gathered(z, r)
    held = torch.cat([torch.arange(s, s + 100) for s in range(300, 1000, 400)])
    delta = truth.double() * 0.9
    exact = float((r[held].double() - z[held].double() @ delta.T).square().sum(1).mean())
    assert equations.error(delta.__getitem__) == pytest.approx(exact, rel=1e-4)


def test_a_linear_change_is_found() -> None:
    z, r, truth = data(2000)
    found = solve(gathered(z, r))
    assert found is not None
    assert found.strength == STRENGTHS[0] and found.left < 1e-4
    assert torch.allclose(found.delta, truth.double(), atol=0.02)


def test_the_more_noise_the_stronger_the_ridge() -> None:
    found = [solve(gathered(*data(800, noise=noise)[:2])) for noise in (0.0, 1.0, 4.0)]
    strengths = [solution.strength for solution in found if solution is not None]
    assert strengths == sorted(strengths) and strengths[0] < strengths[-1]


def test_pure_noise_is_left_alone() -> None:
    z, _, _ = data(400)
    r = torch.randn(400, 7, generator=torch.Generator().manual_seed(5))
    found = solve(gathered(z, r))
    assert found is None or (found.after < found.before and float(found.delta.norm()) < 0.2)


def test_features_that_are_all_zero_change_nothing() -> None:
    assert solve(gathered(torch.zeros(400, 5), torch.randn(400, 3))) is None


def test_a_higher_rank_leaves_no_larger_error_on_what_it_is_fitted_to() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 12, generator=generator)
    z[:, -1] = 1
    truth = torch.randn(10, 12, generator=generator)
    r = z @ truth.T + 0.1 * torch.randn(400, 10, generator=generator)
    equations = NormalEquations(12, 10)
    equations.add(z[:300], r[:300], torch.ones(300))
    equations.add(z[300:], r[300:], torch.ones(100), held_out=True)
    solution = solve(equations)
    assert solution is not None
    errors = []
    for rank in (1, 3, 6, 10):
        down, up, c = reduced_rank(solution, equations, rank)
        assert torch.linalg.matrix_rank(up @ down) == rank
        errors.append(equations.error(torch.cat([up @ down, c[:, None]], 1).__getitem__))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(equations.error(solution.delta.__getitem__), rel=1e-6)


@pytest.mark.parametrize(("sequences", "held"), [(4, 1), (16, 1), (40, 2), (64, 4)])
def test_every_sequence_is_fitted_or_held_out(sequences: int, held: int) -> None:
    tokens = torch.arange(sequences)[:, None].expand(-1, 20)
    data = split(list(tokens.split(4)))
    numbers = [int(row[0]) for batch in data.batches for row in batch]
    assert sorted(numbers) == list(range(sequences))
    assert sum(len(data.batches[b]) for b in data.held) == held
    assert data.held.stop == len(data.batches) > data.held.start


def test_too_few_sequences_to_hold_any_out() -> None:
    for tokens in (torch.zeros(3, 20), torch.zeros(8, 8)):
        with pytest.raises(HealError, match="too few"):
            split([tokens])
