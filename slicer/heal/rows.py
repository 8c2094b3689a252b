"""What a fold asks of a layer on the calibration tokens: the rows of its least-squares problems.

A row is a token: the features z of the map that is solved, the change r that the stream should have had, and a weight
1 / |x|^2, because the norms behind the cut see the stream x relative to its length. The first positions of each
sequence (attention sinks) are left out.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from slicer.heal.least_squares import NormalEquations
from slicer.heal.outputs import Output, Seen, arriving, watching
from slicer.measure.states import States
from slicer.measure.stream import Walk

SINKS = 4  # positions at the start of a sequence that take no part


def gather(
    walk: Walk,
    layer: nn.Module,
    i: int,
    output: Output,
    student: States,
    target: States,
    held: range,
    solver: str,
) -> NormalEquations:
    """The normal equations of `output` over all batches, in the layer as it is now."""
    equations: NormalEquations | None = None
    with watching(layer, output) as seen:
        for batch, states in enumerate(student):
            h = walk.call(i, batch, states)
            wanted = target[batch].to(h.device)
            factor = output.factor
            if factor is None:  # a gate of each token's own
                factors = arriving(output, partial(walk.call, i, batch, states))[0]
            else:
                factors = torch.full(h.shape[:2], factor, device=h.device)
            for row in range(len(h)):
                kept = slice(SINKS, None)
                z, r, weight = _rows(output, seen, row, h, wanted, factors, solver)
                if equations is None:
                    equations = NormalEquations(z.shape[1], r.shape[1], z.device)
                equations.add(z[kept], r[kept], weight[kept], held_out=batch in held)
    assert equations is not None
    return equations


def _rows(
    output: Output,
    seen: Seen,
    row: int,
    h: torch.Tensor,
    wanted: torch.Tensor,
    factors: torch.Tensor,
    solver: str,
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
    weight = _weights(wanted[row].float())
    if output.kind != "normed":
        return z * factors[row][:, None], r, weight
    assert seen.normed is not None
    return z, *_through_norm(u, seen.normed.view(len(h), length, d)[row].float(), r, weight)


def _through_norm(
    u: torch.Tensor, o: torch.Tensor, r: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(change of u, weight) that stand for the change r behind an RMS norm o = g u / |u|: a Gauss-Newton step.

    Only the part of a change of u across u passes the norm, divided by u's root mean square.
    """
    size = u.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    direction = u / size
    gain = _gain(direction, o)
    wanted = (o + r) * gain / (gain.square() + 1e-4 * gain.square().mean())
    across = wanted - direction
    across = across - direction * (across * direction).mean(-1, keepdim=True)
    return across * size, weight / size[:, 0].square()


def _gain(direction: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """g [d] of o = g u / |u|, read off what went in and came out."""
    return (direction * o).sum(0) / direction.square().sum(0).clamp_min(1e-12)


def norm_gain(
    walk: Walk, i: int, layer: nn.Module, output: Output, student: States, target: States, held: range
) -> tuple[torch.Tensor, float]:
    """How the norm's gain g [d] should change, and the share of the squared error left on tokens held out.

    For every component apart: the g that brings g u / |u| closest to what should have come out, least squares.
    """
    sums = [torch.zeros(0)] * 2
    with watching(layer, output) as seen:
        for batch, states in enumerate(student):
            h = walk.call(i, batch, states)
            for row in range(len(h)):
                assert seen.output is not None and seen.normed is not None
                u = seen.output[row, SINKS:].float()
                wanted = target[batch][row, SINKS:].to(h.device).float()
                r = wanted - h[row, SINKS:].float()
                direction = u / u.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
                weight = _weights(wanted)[:, None]
                terms = torch.stack(
                    [
                        (weight * direction * r).sum(0),
                        (weight * direction.square()).sum(0),
                        (weight * r.square()).sum(0),
                    ]
                ).double()
                at = int(batch in held)
                sums[at] = sums[at] + terms if len(sums[at]) else terms
    cross, own, _ = sums[0]
    change = cross / own.clamp_min(1e-30)
    cross, own, power = sums[1]
    after = power - 2 * change * cross + change.square() * own
    return change, float(after.sum() / power.sum().clamp_min(1e-30))


def _weights(wanted: torch.Tensor) -> torch.Tensor:
    """1 / |x|^2 of each token, [seq, d] -> [seq], with |x| the root mean square."""
    return 1 / wanted.square().mean(-1).clamp_min(1e-12)
