"""Figures 1d, 2, 3, 5 and 6 of the paper for one sweep: a measure against the fraction of layers dropped, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slicer.judge.table import Row, Table

_COLOURS = {"similarity": "#1f4e9c", "deepest": "#b3262a", "tail": "#b8741a", "random": "#6b6b6b"}
_MARKERS = {"none": "o", "fold": "s", "qlora": "D"}
_DASHES = {"none": (0, (1, 1.5)), "fold": (0, ()), "qlora": (0, (6, 1.5))}
# Colours of ranks and of task variants: distinct for all kinds of colour vision (Okabe and Ito).
_OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Curve:
    """One line of a strategy and a healing method: (fraction dropped, value, standard error).

    With several seeds, values are means. The error is that of one seed (all seeds use the same items) with the spread
    over seeds added; `each` holds (fraction, value) of every seed.
    """

    strategy: str
    heal: str
    points: tuple[tuple[float, float, float], ...]
    each: tuple[tuple[float, float], ...] = ()

    @property
    def label(self) -> str:
        """Legend entry."""
        return self.strategy if self.heal == "none" else f"{self.strategy}, healed ({self.heal})"


def value_of(row: Row, measure: str) -> tuple[float, float] | None:
    """(value, standard error) of a task's first metric, or, for "c4", of the loss as a share of log V."""
    if row.evaluation is None:
        return None
    if measure == "c4":
        loss = row.evaluation.loss
        if loss is None:
            return None
        return loss.normalised, loss.standard_error * loss.normalised / loss.nats_per_token
    score = row.evaluation.primary(measure)
    return (score.value, score.standard_error or 0.0) if score else None


def curves_of(table: Table, measure: str) -> list[Curve]:
    """The curves of a measure, each starting at the unpruned model."""
    whole = next((value_of(row, measure) for row in table.rows if row.n == 0), None)
    found: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
    for row in table.rows:
        value = value_of(row, measure)
        if row.n and value is not None:
            found.setdefault((row.strategy, row.heal), {}).setdefault(row.n, []).append(value)
    curves = []
    for (strategy, heal), by_n in sorted(found.items()):
        points = [(0.0, *whole)] if whole else []
        each: list[tuple[float, float]] = []
        for n, values in sorted(by_n.items()):
            k, x = len(values), n / table.depth
            mean = sum(v for v, _ in values) / k
            spread = sum((v - mean) ** 2 for v, _ in values) / (k - 1) if k > 1 else 0.0
            points.append((x, mean, (sum(e * e for _, e in values) / k + spread) ** 0.5))
            each += [(x, v) for v, _ in values] if k > 1 else []
        curves.append(Curve(strategy, heal, tuple(points), tuple(each)))
    return curves


def against_fraction(table: Table, measure: str, chance: float | None, label: str) -> str:
    """Plot a measure against the fraction dropped; unpruned model dashed red, chance dashed grey, as in the paper."""
    figure, axes = _figure()
    curves = curves_of(table, measure)
    ranks = sorted({c.heal for c in curves if "@" in c.heal}, key=lambda heal: int(heal.split("@")[1]))
    if len({curve.strategy for curve in curves}) > 1:
        ranks = []  # strategies already differ by colour
    for curve in curves:
        colour = _COLOURS[curve.strategy]
        if len(ranks) > 1 and curve.heal in ranks:
            colour = _OTHERS[ranks.index(curve.heal) % len(_OTHERS)]
        faint = curve.heal == "none" and any(c.heal != "none" for c in curves)
        _draw(axes, curve, curve.label, colour, alpha=0.65 if faint else 1.0)
    whole = next((value_of(row, measure) for row in table.rows if row.n == 0), None)
    if whole is not None:
        axes.axhline(whole[0], color="#d62728", linestyle="--", linewidth=1, label="unpruned")
    if chance is not None:
        axes.axhline(chance, color="#8a8a8a", linestyle="--", linewidth=1, label="guessing")
    return _against_fraction(figure, axes, label)


def overlaid(table: Table, tasks: Sequence[str], chance: float | None, label: str) -> str:
    """Plot several variants of one task (figure 7: examples and their order) against the fraction dropped, one colour
    each; the unpruned model's score is dashed in the same colour."""
    figure, axes = _figure()
    for at, task in enumerate(tasks):
        colour = _OTHERS[at % len(_OTHERS)]
        curves = curves_of(table, task)
        for curve in curves:
            name = task if len(curves) == 1 else f"{task}, {curve.label}"
            _draw(axes, curve, name, colour)
        whole = next((value_of(row, task) for row in table.rows if row.n == 0), None)
        if whole is not None:
            axes.axhline(whole[0], color=colour, linestyle="--", linewidth=0.8)
    if chance is not None:
        axes.axhline(chance, color="#8a8a8a", linestyle="--", linewidth=1, label="guessing")
    return _against_fraction(figure, axes, label)


def _draw(axes: Any, curve: Curve, label: str, colour: str, alpha: float = 1.0) -> None:
    xs, ys, errors = zip(*curve.points, strict=True)
    base = curve.heal.split("@")[0]
    axes.errorbar(
        xs, ys, yerr=errors, label=label, color=colour, marker=_MARKERS[base], markersize=4,
        linestyle=_DASHES[base], linewidth=1.6, elinewidth=0.8, capsize=2, alpha=alpha,
    )  # fmt: skip
    if curve.each:
        xs, ys = zip(*curve.each, strict=True)
        axes.plot(xs, ys, color=colour, marker=".", markersize=3, linestyle="none", alpha=0.5)


def _against_fraction(figure: Any, axes: Any, label: str) -> str:
    axes.set(xlabel="fraction of layers dropped", ylabel=label)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def healing_curve(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Plot the losses of healing against the step: name -> [{"step": ..., loss name: value}]."""
    figure, axes = _figure()
    for name, history in histories.items():
        for key in sorted({k for entry in history for k in entry if "loss" in k}):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axes.plot(*zip(*points, strict=True), label=f"{name}: {key.replace('_', ' ')}", linewidth=1.4)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def bench_line(points: Sequence[tuple[int, float]], line: Mapping[str, Any] | None, label: str) -> str:
    """Plot a measurement of `slicer bench` against the number of layers, with its fitted line."""
    figure, axes = _figure()
    xs, ys = zip(*sorted(points), strict=True)
    axes.plot(xs, ys, marker="o", linestyle="none", color="#1f4e9c", label="measured")
    if line is not None:
        ends = (0, max(xs))
        fitted = [line["intercept"] + line["slope"] * x for x in ends]
        axes.plot(ends, fitted, color="#6b6b6b", linewidth=1, label=f"line, R² = {line['r2']:.4f}")
    axes.set(xlabel="layers", ylabel=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.7), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    """The figure as SVG without dates, so that equal data gives equal bytes."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "slicer"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
