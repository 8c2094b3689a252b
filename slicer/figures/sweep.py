"""Figures 1d, 2, 3, 5 and 6 of the paper for one sweep: a measure against the fraction of layers dropped, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slicer.figures.style import BLACK, BLUE, CYCLE, GREY, ORANGE, VERMILION, finish, plot, svg

COLOURS = {"similarity": BLUE, "deepest": VERMILION, "tail": ORANGE, "random": GREY}
MARKERS = {"none": "o", "fold": "s", "qlora": "D"}
DASHES = {"none": (0, (1, 1.5)), "fold": (0, ()), "qlora": (0, (6, 1.5))}


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


def against_fraction(curves: Sequence[Curve], unpruned: float | None, chance: float | None, label: str) -> str:
    """Plot a measure against the fraction dropped; unpruned model dashed black, chance dashed grey."""
    figure, axes = plot(5.4, 3.7)
    ranks = sorted({c.heal for c in curves if "@" in c.heal}, key=lambda heal: int(heal.split("@")[1]))
    if len({curve.strategy for curve in curves}) > 1:
        ranks = []  # strategies already differ by colour
    for curve in curves:
        colour = COLOURS[curve.strategy]
        if len(ranks) > 1 and curve.heal in ranks:
            colour = CYCLE[ranks.index(curve.heal) % len(CYCLE)]
        faint = curve.heal == "none" and any(c.heal != "none" for c in curves)
        _draw(axes, curve, curve.label, colour, alpha=0.65 if faint else 1.0)
    if unpruned is not None:
        axes.axhline(unpruned, color=BLACK, linestyle="--", linewidth=1, label="unpruned")
    return _finished(figure, axes, chance, label)


def overlaid(tasks: Mapping[str, tuple[Sequence[Curve], float | None]], chance: float | None, label: str) -> str:
    """Plot several variants of one task (figure 7: examples and their order) against the fraction dropped, one colour
    each; the unpruned model's score is dashed in the same colour. `tasks`: name -> its curves, that score."""
    figure, axes = plot(5.4, 3.7)
    for at, (task, (curves, unpruned)) in enumerate(tasks.items()):
        colour = CYCLE[at % len(CYCLE)]
        for curve in curves:
            _draw(axes, curve, task if len(curves) == 1 else f"{task}, {curve.label}", colour)
        if unpruned is not None:
            axes.axhline(unpruned, color=colour, linestyle="--", linewidth=0.8)
    return _finished(figure, axes, chance, label)


def _draw(axes: Any, curve: Curve, label: str, colour: str, alpha: float = 1.0) -> None:
    xs, ys, errors = zip(*curve.points, strict=True)
    base = curve.heal.split("@")[0]
    axes.errorbar(
        xs, ys, yerr=errors, label=label, color=colour, marker=MARKERS[base], markersize=4,
        linestyle=DASHES[base], linewidth=1.6, elinewidth=0.8, capsize=2, alpha=alpha,
    )  # fmt: skip
    if curve.each:
        xs, ys = zip(*curve.each, strict=True)
        axes.plot(xs, ys, color=colour, marker=".", markersize=3, linestyle="none", alpha=0.5)


def _finished(figure: Any, axes: Any, chance: float | None, label: str) -> str:
    if chance is not None:
        axes.axhline(chance, color=GREY, linestyle="--", linewidth=1, label="guessing")
    axes.set_xlim(left=0)
    finish(axes, xlabel="fraction of layers dropped", ylabel=label)
    return svg(figure)
