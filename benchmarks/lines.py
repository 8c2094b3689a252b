"""Straight-line fits: the cost per layer, the cost that slicing cannot remove, and the resulting speed-up.

With cost b per layer and intercept a (embeddings, head, overhead), a model of L layers costs a + b L. Dropping n layers
gives a speed-up of (a + b L) / (a + b (L - n)), less than the ideal L / (L - n) because of the intercept. Needs only
numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slicer.errors import BenchError

CONFIDENCE = 0.95
LINEAR, ROUGH = 0.98, 0.9  # minimum R2 of "linear" and of "roughly linear"


@dataclass(frozen=True)
class Line:
    """A least-squares line y = intercept + slope x layers.

    Attributes:
        slope: units of y per layer; `slope_interval`: its 95% confidence interval (None for two points).
        intercept: y at 0 layers; `intercept_interval`: as for the slope.
        r2: the share of the variance of y that the line explains; 1 for a constant y.
        points: the fitted (layers, y).
        band: (layers, lower, upper), the 95% confidence band of the line; empty for two points.
    """

    slope: float
    intercept: float
    r2: float
    slope_interval: tuple[float, float] | None
    intercept_interval: tuple[float, float] | None
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()

    def __call__(self, layers: float) -> float:
        """The line's value for this number of layers."""
        return self.intercept + self.slope * layers


def fit(layers: Sequence[float], values: Sequence[float]) -> Line:
    """Fit a least-squares line through (layers, values), with Student's t intervals. Raises BenchError for fewer than
    two different depths, and for values that are not finite."""
    x, y = np.asarray(layers, dtype=float), np.asarray(values, dtype=float)
    if x.shape != y.shape or len(set(x.tolist())) < 2:
        raise BenchError("a line needs at least two different depths: pass more (--drop 0,4,8)")
    if not np.isfinite(y).all():
        raise BenchError("a measured value is not finite; measure again")
    centre = x.mean()
    spread = float(((x - centre) ** 2).sum())
    slope = float(((x - centre) * (y - y.mean())).sum() / spread)
    intercept = float(y.mean() - slope * centre)
    residual = float(((y - intercept - slope * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    # Treat a residual at the limit of the arithmetic as 0: constants and exact lines have R2 = 1.
    if residual <= len(x) * (1e-12 * float(np.abs(y).max())) ** 2:
        residual = 0.0
    r2 = 1 - residual / total if residual and total else 1.0
    freedom = len(x) - 2
    slope_interval = intercept_interval = None
    band: tuple[tuple[float, float, float], ...] = ()
    if freedom > 0:
        deviation = math.sqrt(residual / freedom)
        t = student_t(freedom)
        about_slope = t * deviation / math.sqrt(spread)
        about_intercept = t * deviation * math.sqrt(1 / len(x) + centre**2 / spread)
        slope_interval = (slope - about_slope, slope + about_slope)
        intercept_interval = (intercept - about_intercept, intercept + about_intercept)
        reach = np.linspace(0, float(x.max()) * 1.03, 60)
        about = t * deviation * np.sqrt(1 / len(x) + (reach - centre) ** 2 / spread)
        middle = intercept + slope * reach
        band = tuple(zip(reach.tolist(), (middle - about).tolist(), (middle + about).tolist(), strict=True))
    points = tuple(zip(x.tolist(), y.tolist(), strict=True))
    return Line(slope, intercept, r2, slope_interval, intercept_interval, points, band)


def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t: P(|T| < t) = confidence, with `freedom` degrees of freedom.

    With T = sqrt(freedom) tan(theta), theta has the density cos(theta)^(freedom - 1) up to a factor.
    """
    theta = np.linspace(0, math.pi / 2, 20001)
    density = np.cos(theta) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence, below / below[-1], theta)))


@dataclass(frozen=True)
class SpeedUp:
    """Speed-up of a depth over the deepest: measured, by the fitted line with its intercept, and ideal."""

    layers: int
    measured: float
    allowed_by_intercept: float
    ideal: float


def speed_ups(line: Line, times: dict[int, float]) -> list[SpeedUp]:
    """The speed-up of each depth in `times` (layers -> time) over the deepest."""
    deepest = max(times)

    def gain(time: Callable[[int], float], layers: int) -> float:
        return time(deepest) / time(layers) if time(layers) > 0 else math.nan

    depths = sorted(times, reverse=True)
    return [SpeedUp(n, gain(times.__getitem__, n), gain(line, n), deepest / n) for n in depths]


def verdict(line: Line, times: dict[int, float], unit: str = "ms") -> str:
    """One sentence: the quality of the fit, the cost per layer, and the speed-up of the smallest depth."""
    shallow = speed_ups(line, times)[-1]
    deepest = max(times)
    if len(times) < 3:
        shape = "two depths always give a line: measure a third"
    elif line.slope <= 0 or (line.slope_interval and line.slope_interval[0] <= 0 and line.r2 < LINEAR):
        return (
            f"no line: R2 {line.r2:.3f}; the cost per layer is below the noise and the fixed cost of "
            f"{line.intercept:.3g} {unit}; measure longer (--seconds, --rounds), or a larger model"
        )
    elif line.r2 >= LINEAR:
        shape = f"linear: R2 {line.r2:.3f}"
    elif line.r2 >= ROUGH:
        shape = f"roughly linear: R2 {line.r2:.3f}"
    else:
        shape = f"not a line: R2 {line.r2:.3f} (if the machine was busy, measure more --rounds)"
    share = 1 - shallow.layers / deepest
    return (
        f"{shape}; each layer costs {line.slope:.3g} {unit}, and {line.intercept:.3g} {unit} are fixed; "
        f"{share:.0%} fewer layers give a speed-up of {shallow.measured:.2f}x here, of {shallow.ideal:.2f}x ideally"
    )


def roofline(nbytes: float, flops: float, bytes_per_second: float, flops_per_second: float) -> tuple[float, str]:
    """The minimum milliseconds of a step, max(bytes / bandwidth, FLOPs / rate); its bound, "memory" or "arithmetic".

    Williams et al. 2009.
    """
    memory, arithmetic = nbytes / bytes_per_second, flops / flops_per_second
    return 1000 * max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


# Lines of bench.json: name -> (title, unit)
LINES = {
    "time_per_output_token_ms": ("time per output token", "ms"),
    "prefill_ms": ("prefill", "ms"),
    "weight_bytes": ("weights", "bytes"),
    "kv_bytes_per_token": ("KV cache per token", "bytes"),
    "peak_memory_bytes": ("peak memory", "bytes"),
    "load_seconds": ("load", "s"),
}
