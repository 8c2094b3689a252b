"""The arithmetic of the straight line: what a layer costs, what slicing cannot remove, and what that allows.

With L layers, a cost of b a layer and an intercept a (embeddings, head, overhead), a model costs a + b L. Dropping
n layers then gives a speed-up of (a + b L) / (a + b (L - n)): short of the ideal L / (L - n), by the intercept.
Needs numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slicer.errors import BenchError

CONFIDENCE = 0.95
LINEAR, ROUGH = 0.98, 0.9  # least R2 of "linear" and of "roughly linear"


@dataclass(frozen=True)
class Line:
    """A least-squares line y = intercept + slope x layers.

    Attributes:
        slope: units of y a layer; `slope_interval` its 95% confidence interval (None through two points).
        intercept: y at no layers; `intercept_interval` likewise.
        r2: the share of the variance of y that the line explains; 1 for a constant y.
        points: the (layers, y) it was fitted through.
    """

    slope: float
    intercept: float
    r2: float
    slope_interval: tuple[float, float] | None
    intercept_interval: tuple[float, float] | None
    points: tuple[tuple[float, float], ...]

    def __call__(self, layers: float) -> float:
        """What the line gives for this many layers."""
        return self.intercept + self.slope * layers

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(layers: Sequence[float], values: Sequence[float]) -> Line:
    """The least-squares line through (layers, values), with Student's t intervals.

    Raises BenchError for fewer than two different depths, and for values that are not finite.
    """
    x, y = np.asarray(layers, dtype=float), np.asarray(values, dtype=float)
    if x.shape != y.shape or len(set(x.tolist())) < 2:
        raise BenchError("a line needs at least two different depths: give more of them (--drop 0,4,8)")
    if not np.isfinite(y).all():
        raise BenchError("a measured value is not a number; measure again")
    centre = x.mean()
    spread = float(((x - centre) ** 2).sum())
    slope = float(((x - centre) * (y - y.mean())).sum() / spread)
    intercept = float(y.mean() - slope * centre)
    residual = float(((y - intercept - slope * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    # A residual at the limit of the arithmetic is none: constants and exact lines have R2 = 1.
    if residual <= len(x) * (1e-12 * float(np.abs(y).max())) ** 2:
        residual = 0.0
    r2 = 1 - residual / total if residual and total else 1.0
    freedom = len(x) - 2
    slope_interval = intercept_interval = None
    if freedom > 0:
        deviation = math.sqrt(residual / freedom)
        t = student_t(freedom)
        about_slope = t * deviation / math.sqrt(spread)
        about_intercept = t * deviation * math.sqrt(1 / len(x) + centre**2 / spread)
        slope_interval = (slope - about_slope, slope + about_slope)
        intercept_interval = (intercept - about_intercept, intercept + about_intercept)
    points = tuple(zip(x.tolist(), y.tolist(), strict=True))
    return Line(slope, intercept, r2, slope_interval, intercept_interval, points)


def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t: P(|T| < t) = confidence with so many degrees of freedom.

    With T = sqrt(freedom) tan(theta), theta has the density cos(theta)^(freedom - 1) up to a factor.
    """
    theta = np.linspace(0, math.pi / 2, 20001)
    density = np.cos(theta) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence, below / below[-1], theta)))


@dataclass(frozen=True)
class SpeedUp:
    """How much faster a depth is than the deepest: as measured, as the line with its intercept allows, ideally."""

    layers: int
    measured: float
    allowed: float
    ideal: float


def speed_ups(line: Line, times: dict[int, float]) -> list[SpeedUp]:
    """For each depth of `times` (layers -> time), against the deepest."""
    deepest = max(times)

    def ratio(above: float, below: float) -> float:
        return above / below if below > 0 else math.nan

    return [
        SpeedUp(
            layers=layers,
            measured=ratio(times[deepest], times[layers]),
            allowed=ratio(line(deepest), line(layers)),
            ideal=deepest / layers,
        )
        for layers in sorted(times, reverse=True)
    ]


def verdict(line: Line, times: dict[int, float], unit: str = "ms") -> str:
    """One sentence: is it a line, what a layer costs, and what the shallowest depth measured gains."""
    shallow = speed_ups(line, times)[-1]
    deepest = max(times)
    if len(times) < 3:
        shape = "two depths always lie on a line: measure a third"
    elif line.slope <= 0 or (line.slope_interval and line.slope_interval[0] <= 0 and line.r2 < LINEAR):
        return (
            f"no line: R2 {line.r2:.3f}; what a layer costs does not show above the noise and the fixed cost of "
            f"{line.intercept:.3g} {unit}; measure longer (--seconds, --rounds), or a larger model"
        )
    elif line.r2 >= LINEAR:
        shape = f"linear: R2 {line.r2:.3f}"
    elif line.r2 >= ROUGH:
        shape = f"roughly linear: R2 {line.r2:.3f}"
    else:
        shape = f"not a line: R2 {line.r2:.3f} (a busy machine? measure longer with --rounds)"
    share = 1 - shallow.layers / deepest
    return (
        f"{shape}; each layer costs {line.slope:.3g} {unit} and {line.intercept:.3g} {unit} stay; "
        f"{share:.0%} fewer layers gives {shallow.measured:.2f}x here, {shallow.ideal:.2f}x at most"
    )


@dataclass(frozen=True)
class Roofline:
    """The least time that a step can take on a machine, and what bounds it ("memory" or "arithmetic")."""

    milliseconds: float
    bound: str


def roofline(nbytes: float, flops: float, bytes_per_second: float, flops_per_second: float) -> Roofline:
    """max(bytes / bandwidth, FLOPs / rate), Williams et al. 2009."""
    memory, arithmetic = nbytes / bytes_per_second, flops / flops_per_second
    return Roofline(1000 * max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic")
