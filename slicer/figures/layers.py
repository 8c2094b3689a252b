"""Figures of an analysis: distances of blocks, importance of layers and sublayers, agreement of metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slicer.errors import PlanError
from slicer.figures.style import BLUE, BOTH, ORANGE, canvas, mark, plot, save
from slicer.measure.metrics import title_of

if TYPE_CHECKING:
    from slicer.measure.analysis import Analysis, Distances

Whole = tuple[int, int] | None  # (first layer, number of layers) of a dropped block
Offset = tuple[int, int, float] | None  # (i, j, distance) of a half-offset block, from after attention i to after j
_CURVES = 6  # of the block sizes that are drawn
_SUBLAYERS = ((BLUE, "attention"), (ORANGE, "feed-forward"))  # in the order of a layer


def parts(analysis: Analysis, path: Path) -> None:
    """Plot each metric of the attention and feed-forward sublayers by layer, with standard errors."""
    tables = list(analysis.sublayers.values())
    figure, panels = _rows(tables, 1.7)
    for table, axes in zip(tables, panels, strict=True):
        row, error = list(table.block(1)), list(table.standard_error[1])
        for first, (colour, name) in enumerate(_SUBLAYERS):
            values, errors = row[first::2], error[first::2]
            axes.errorbar(
                range(len(values)), values, yerr=errors, color=colour, marker="o", markersize=3, linewidth=1,
                capsize=2, label=name,
            )  # fmt: skip
        _spread(row, axes.set_yscale)
        note_flat(axes, row)
        axes.locator_params(axis="x", integer=True)
    panels[0].legend(frameon=False, fontsize="small")
    panels[-1].set_xlabel("layer (bars: one standard error)")
    save(figure, path)


def _rows(tables: Sequence[Distances], height: float) -> tuple[Any, list[Any]]:
    """A figure with a wide panel of this `height` for each metric, one below the other, and these panels."""
    figure = canvas(7, height * len(tables) + 0.6)
    panels = [figure.add_subplot(len(tables), 1, at + 1) for at in range(len(tables))]
    for table, axes in zip(tables, panels, strict=True):
        axes.set_title(_title(table.metric), fontsize=10, loc="left")
    return figure, panels


def trade_off(one: Analysis, other: Analysis, path: Path) -> float:
    """Scatter the importance of each layer or sublayer for `one`'s and `other`'s text; returns the rank correlation.

    Uses Shapley values if both have them, else the loss without each sublayer, else block influence. Raises PlanError
    for analyses of different models, or without a common metric.
    """
    a, b = comparable(one, other)
    agreement = rank_agreement(a, b, sizes=(1,))
    x, y = list(a.block(1)), list(b.block(1))
    figure, axes = plot(5.6, 5.2)
    kinds = _SUBLAYERS if a.depth == 2 * one.depth else ((BLUE, "layer"),)
    for first, (colour, name) in enumerate(kinds):
        own = slice(first, None, len(kinds))
        axes.errorbar(
            x[own], y[own], xerr=a.standard_error[1][own], yerr=b.standard_error[1][own], color=colour,
            linestyle="none", marker="o", markersize=4, elinewidth=0.6, label=name,
        )  # fmt: skip
        for i, point in enumerate(zip(x[own], y[own], strict=True)):
            axes.annotate(str(i), point, xytext=(3, 3), textcoords="offset points", fontsize=7)
    _spread(x, axes.set_xscale)
    _spread(y, axes.set_yscale)
    axes.set_xlabel(f"on {_text(one, a.metric)}")
    axes.set_ylabel(f"on {_text(other, b.metric)}")
    axes.set_title(f"{_title(a.metric)}\nrank correlation {agreement:.2f}", fontsize=10)
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


def _text(analysis: Analysis, metric: str) -> str:
    if metric == "shapley_score":
        return str((analysis.shapley or {}).get("against", "task"))
    return Path(analysis.calibration.source).name if analysis.calibration else "calibration text"


def heat_map(
    distances: Distances,
    path: Path,
    *,
    chosen: Whole = None,
    offset: Offset = None,
    title: str = "Angular distance d(l, l+n)",
) -> None:
    """Figure 4 of the paper: d(l, l+n) by start l and size n, each row scaled to its own minimum and maximum.

    Marks the dropped block: `chosen`, of whole layers, or `offset`, a half-offset one, drawn half a layer further in.
    Writes a PNG or SVG, by the suffix.
    """
    figure, axes = plot()
    image = _heat(axes, distances)
    if block := _dropped(distances, chosen, offset):
        start, n, _, name = block
        mark(axes, "s", start, n, name)
        axes.legend(loc="upper right", frameon=False)
    axes.set(xlabel="first layer of the block, l", ylabel="layers in the block, n", title=title)
    axes.locator_params(integer=True)
    figure.colorbar(image, ax=axes, label="scaled within each n (black dot: minimum)")
    save(figure, path)


def _dropped(distances: Distances, chosen: Whole, offset: Offset) -> tuple[float, int, float, str] | None:
    """(place on the axis of layers, number of layers, distance, label) of the dropped block."""
    if chosen is not None:
        start, n = chosen
        layers = f"layer {start}" if n == 1 else f"layers {start}-{start + n - 1}"
        return start, n, distances.block(n)[start], f"dropped: {layers}"
    if offset is not None:  # half a layer further in than the block that starts at layer i
        i, j, distance = offset
        return i + 0.5, j - i, distance, f"dropped: half-offset, {i} to {j}"
    return None


def _heat(axes: Any, distances: Distances, percentile: float = 100) -> Any:
    depth = distances.depth
    grid = np.full((depth, depth), np.nan)
    sizes = [n for n in distances.sizes if n < depth]
    for n in sizes:
        values = np.asarray(distances.block(n))
        least = np.nanmin(values)
        spread = np.nanpercentile(values, percentile) - least
        grid[n, : len(values)] = (values - least) / spread if spread else 0.0
    image = axes.imshow(
        grid[1:], origin="lower", aspect="auto", cmap="viridis_r", interpolation="nearest",
        extent=(-0.5, depth - 0.5, 0.5, depth - 0.5), vmin=0, vmax=1,
    )  # fmt: skip
    for n in sizes:
        axes.plot(np.nanargmin(distances.block(n)), n, marker=".", markersize=3, color="black")
    return image


def curves(
    distances: Distances,
    path: Path,
    *,
    chosen: Whole = None,
    offset: Offset = None,
    title: str = "Where a block changes the residual stream least",
    label: str = "angular distance d(l, l+n), units of pi",
    minima: bool = False,
) -> None:
    """Figure 1c of the paper: d(l, l+n) against l, one curve for each of some block sizes n. Writes a PNG or SVG.

    Marks the block `chosen` or `offset`. `minima` marks the minimum of each n and joins those of all n.
    """
    from matplotlib import colormaps

    depth = distances.depth
    sizes = sorted({max(1, round(depth * k / (2 * _CURVES))) for k in range(1, _CURVES + 1)})
    sizes = [n for n in sizes if n in distances.sizes] or list(distances.sizes)
    block = _dropped(distances, chosen, offset)
    if block:
        sizes = sorted({*sizes, block[1]} - {depth})
    figure, axes = plot()
    for at, n in enumerate(sizes):
        row, error = np.asarray(distances.block(n)), np.asarray(distances.standard_error[n])
        colour = colormaps["viridis"](at / max(1, len(sizes) - 1))
        width = 2.4 if block and n == block[1] else 1.2
        axes.plot(range(len(row)), row, color=colour, linewidth=width, label=f"n = {n}")
        axes.fill_between(range(len(row)), row - error, row + error, color=colour, alpha=0.15, linewidth=0)
    if minima:
        rows = [list(distances.block(n)) for n in distances.sizes if n <= max(sizes)]
        least = [(row.index(min(row)), min(row)) for row in rows]
        axes.plot(*zip(*least, strict=True), color="black", linewidth=0.8, linestyle=":", marker=".", markersize=4,
                  label="minimum of each n")  # fmt: skip
    if block:
        start, _, distance, name = block
        mark(axes, "o", start, distance, name)
    axes.set(xlabel="first layer of the block, l", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, fontsize="small")
    save(figure, path)


def analysis_figures(analysis: Analysis, directory: Path) -> list[Path]:
    """Write every figure of an analysis, as PNG and SVG, into `directory`; returns the files.

    The first metric (the paper's) gets a full-size heat map and curves; all metrics share the other figures.
    """
    distances = next(iter(analysis.metrics.values()))
    title = _title(distances.metric)
    draw: dict[str, Callable[[Path], None]] = {
        "heat-map": partial(heat_map, distances, title=title),
        "curves": partial(curves, distances, title=title, label=title, minima=True),
        "heat-maps": partial(heat_maps, analysis),
        "importance": partial(importance, analysis),
        "agreement": partial(agreement, analysis),
        "blocks": partial(chosen_blocks, analysis),
    }
    for name, figure in draw.items():
        figure(directory / f"{name}{BOTH}")
    return [directory / f"{name}{suffix}" for name in draw for suffix in (".png", ".svg")]


def heat_maps(analysis: Analysis, path: Path) -> None:
    """Small heat maps of all metrics, with the minimum of each n marked."""
    figure, panels = _grid(analysis, "layers in the block, n", "first layer, l")
    for distances, axes in panels:
        image = _heat(axes, distances, percentile=90)
        axes.locator_params(integer=True)
    label = "scaled within each n, up to the 90th percentile (dot: minimum)"
    figure.colorbar(image, ax=[axes for _, axes in panels], shrink=0.6, label=label)
    save(figure, path)


def _grid(analysis: Analysis, upright: str, level: str) -> tuple[Any, list[tuple[Distances, Any]]]:
    """A figure with a small panel for each metric that measures blocks of several sizes, and these panels."""
    shown = [d for d in analysis.metrics.values() if len(d.sizes) > 2]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = canvas(3.2 * columns + 0.6, 2.6 * rows + 0.4)
    panels = [(distances, figure.add_subplot(rows, columns, at + 1)) for at, distances in enumerate(shown)]
    for at, (distances, axes) in enumerate(panels):
        axes.set_title(distances.metric.replace("_", " "), fontsize=10)
        axes.set_ylabel("" if at % columns else upright)
        axes.set_xlabel(level if at >= len(panels) - columns else "")
    return figure, panels


def _title(metric: str) -> str:
    """The name of a metric as a figure title."""
    title = title_of(metric)
    return title[0].upper() + title[1:]


def importance(analysis: Analysis, path: Path) -> None:
    """Bars of each metric by layer, with standard errors."""
    shown = [d for d in analysis.metrics.values() if 1 in d.sizes and d.metric != "healed_loss"]
    figure, panels = _rows(shown, 1.5)
    for distances, axes in zip(shown, panels, strict=True):
        row, error = list(distances.block(1)), list(distances.standard_error[1])
        least = min(v for v in row if v == v)
        colours = [BLUE if value != least else ORANGE for value in row]
        axes.bar(range(len(row)), row, yerr=error, color=colours, ecolor="black", error_kw={"linewidth": 0.8})
        note_flat(axes, row)
        known = sorted(v for v in row if v == v)
        if known[0] > 0 and known[-1] > 20 * known[len(known) // 2]:
            axes.set_yscale("log")  # one layer is far above the others
        else:
            axes.locator_params(axis="y", nbins=4)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlim(-0.7, len(row) - 0.3)
    axes.set_xlabel("layer (orange: minimum; bars: one standard error)")
    save(figure, path)


def note_flat(axes: Any, values: Sequence[float]) -> None:
    """Write a note into a panel that would look empty because all values are equal."""
    known = {v for v in values if v == v}
    if len(known) == 1:
        axes.text(0.5, 0.5, f"{known.pop():g} everywhere: no difference seen", transform=axes.transAxes,
                  ha="center", va="bottom", fontsize=9, color="0.35")  # fmt: skip


def agreement(analysis: Analysis, path: Path) -> None:
    """Spearman's rank correlation between the metrics, mean over the block sizes."""
    names, tables = list(analysis.metrics), analysis.metrics.values()
    grid = np.array([[rank_agreement(one, other) for other in tables] for one in tables])
    figure, axes = plot(1.6 + 0.75 * len(names), 1.2 + 0.7 * len(names))
    image = axes.imshow(grid, cmap="cividis", vmin=min(0.0, float(np.nanmin(grid))), vmax=1)
    middle = (image.norm.vmin + 1) / 2
    for (i, j), value in np.ndenumerate(grid):
        text = "" if np.isnan(value) else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", color="white" if value < middle else "black")
    labels = [name.replace("_", " ") for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), labels)
    axes.set_title("Do the metrics agree? Rank correlation of blocks", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.8)
    save(figure, path)


def rank_agreement(one: Distances, other: Distances, sizes: Collection[int] | None = None) -> float:
    """Spearman's correlation of two metrics over blocks of one size, mean over `sizes` with at least three blocks.
    `sizes`: None for all that both have."""
    found = []
    for n in sorted({*one.sizes} & {*other.sizes} if sizes is None else sizes):
        a, b = np.asarray(one.block(n)), np.asarray(other.block(n))
        both = ~(np.isnan(a) | np.isnan(b))
        if both.sum() >= 3:
            first, second = (np.argsort(np.argsort(row[both], kind="stable"), kind="stable") for row in (a, b))
            found.append(float(np.corrcoef(first, second)[0, 1]))
    return float(np.mean(found)) if found else float("nan")


def chosen_blocks(analysis: Analysis, path: Path) -> None:
    """The block that each metric would drop, for every size: a line from its first layer to its last."""
    figure, panels = _grid(analysis, "layers dropped, n", "layer")
    for distances, axes in panels:
        for n in distances.sizes:
            if n == distances.depth:
                continue
            row = [v if v == v else float("inf") for v in distances.block(n)]
            start = row.index(min(row))
            axes.plot([start - 0.4, start + n - 0.6], [n, n], color=BLUE, linewidth=2, solid_capstyle="butt")
        axes.set_xlim(-0.6, analysis.depth - 0.4)
        axes.set_ylim(0, analysis.depth)
        axes.locator_params(integer=True)
    figure.suptitle("The block that each metric would drop", fontsize=11)
    save(figure, path)
