"""Figures of attention and feed-forward sublayers: each metric by layer, and the trade-off between two texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.errors import PlanError
from slicer.judge.plots import BLUE, ORANGE, _canvas, analysis_title, note_flat, save

if TYPE_CHECKING:
    from slicer.measure.analysis import Analysis, Distances


def parts(analysis: Analysis, path: Path) -> None:
    """Plot each metric of the attention and feed-forward sublayers by layer, with standard errors."""
    tables = list(analysis.sublayers.values())
    figure = _canvas((7, 1.7 * len(tables) + 0.6))
    for at, table in enumerate(tables):
        axes = figure.add_subplot(len(tables), 1, at + 1)
        row, error = list(table.block(1)), list(table.standard_error[1])
        for first, colour, name in ((0, BLUE, "attention"), (1, ORANGE, "feed-forward part")):
            values, errors = row[first::2], error[first::2]
            axes.errorbar(
                range(len(values)), values, yerr=errors, color=colour, marker="o", markersize=3, linewidth=1,
                capsize=2, label=name,
            )  # fmt: skip
        _spread(row, axes.set_yscale)
        note_flat(axes, row)
        axes.set_title(analysis_title(table.metric), fontsize=10, loc="left")
        axes.locator_params(axis="x", integer=True)
        if not at:
            axes.legend(frameon=False, fontsize="small")
    axes.set_xlabel("layer (bars: one standard error)")
    save(figure, path)


def trade_off(one: Analysis, other: Analysis, path: Path) -> float:
    """Scatter the importance of each layer or sublayer for `one`'s and `other`'s text; returns the rank correlation.

    Uses Shapley values if both have them, else the loss without each sublayer, else block influence. Raises PlanError
    for analyses of different models, or without a common metric.
    """
    from slicer.judge.plots import rank_agreement

    a, b = comparable(one, other)
    agreement = rank_agreement(_singles(a), _singles(b))
    x, y = list(a.block(1)), list(b.block(1))
    figure = _canvas((5.6, 5.2))
    axes = figure.add_subplot()
    halves = a.depth == 2 * one.depth
    kinds = ((0, BLUE, "attention"), (1, ORANGE, "feed-forward part")) if halves else ((0, BLUE, "layer"),)
    step = len(kinds)
    for first, colour, name in kinds:
        axes.errorbar(
            x[first::step], y[first::step], xerr=list(a.standard_error[1])[first::step],
            yerr=list(b.standard_error[1])[first::step], color=colour, linestyle="none", marker="o", markersize=4,
            elinewidth=0.6, label=name,
        )  # fmt: skip
        for i, point in enumerate(zip(x[first::step], y[first::step], strict=True)):
            axes.annotate(str(i), point, xytext=(3, 3), textcoords="offset points", fontsize=7)
    for values, scale in ((x, axes.set_xscale), (y, axes.set_yscale)):
        _spread(values, scale)
    axes.set_xlabel(f"on {_text(one, a.metric)}")
    axes.set_ylabel(f"on {_text(other, b.metric)}")
    axes.set_title(f"{analysis_title(a.metric)}\nrank correlation {agreement:.2f}", fontsize=10)
    axes.legend(frameon=False, fontsize="small")
    save(figure, path)
    return agreement


def _spread(values: list[float], scale: Callable[..., None]) -> None:
    """Choose a logarithmic axis if one value is far above the others; symmetric-log if some are not positive."""
    known = sorted(abs(v) for v in values if v == v)
    middle = known[len(known) // 2]
    if known[-1] <= 20 * middle or not middle:
        return
    if min(v for v in values if v == v) > 0:
        scale("log")
    else:
        scale("symlog", linthresh=middle)


def comparable(one: Analysis, other: Analysis) -> tuple[Distances, Distances]:
    """The tables of the best metric that both analyses have. Raises PlanError."""
    if (one.depth, one.model_type) != (other.depth, other.model_type):
        raise PlanError(
            f"the other analysis is of a {other.model_type} of {other.depth} layers, this one of a {one.model_type} of "
            f"{one.depth}: compare analyses of the same model"
        )
    for metric in ("shapley_score", "shapley", "loss", "kl", "block_influence"):
        for mine, theirs in ((one.sublayers, other.sublayers), (one.metrics, other.metrics)):
            if metric in mine and metric in theirs and 1 in mine[metric].sizes and 1 in theirs[metric].sizes:
                return mine[metric], theirs[metric]
    raise PlanError("the two analyses have no metric in common; run both with the same options")


def _singles(table: Distances) -> Distances:
    from dataclasses import replace

    return replace(table, mean={1: table.mean[1]}, standard_error={1: table.standard_error[1]})


def _text(analysis: Analysis, metric: str) -> str:
    if metric == "shapley_score":
        return str((analysis.shapley or {}).get("against", "task"))
    source = str((analysis.calibration or {}).get("source", "calibration text"))
    return Path(source).name
