"""Every figure. Pictures hold no dates, so that the same figures give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slicer.measure.analysis import Distances

_CURVES = 6


def heat_map(distances: Distances, path: Path, *, chosen: tuple[int, int] | None = None) -> None:
    """The paper's figure 4: d(l, l+n) by start l and size n, each row scaled to its own least and greatest.

    `chosen` is the (start, n) of the dropped block, marked where given. Writes a PNG.
    """
    import numpy as np

    depth = distances.depth
    grid = np.full((depth, depth), np.nan)
    for n in range(1, depth):
        values = np.asarray(distances.block(n))
        spread = values.max() - values.min()
        grid[n, : len(values)] = (values - values.min()) / spread if spread else 0.0
    figure, axes = _figure()
    image = axes.imshow(
        grid[1:], origin="lower", aspect="auto", cmap="viridis_r", interpolation="nearest",
        extent=(-0.5, depth - 0.5, 0.5, depth - 0.5), vmin=0, vmax=1,
    )  # fmt: skip
    for n in range(1, depth):
        row = list(distances.block(n))
        axes.plot(row.index(min(row)), n, marker=".", markersize=3, color="black")
    if chosen is not None:
        axes.plot(
            *chosen, marker="s", markersize=9, markerfacecolor="none", markeredgecolor="red", linestyle="none",
            label=f"dropped: {_block(*chosen)}",
        )  # fmt: skip
        axes.legend(loc="upper right", frameon=False)
    axes.set(
        xlabel="first layer of the block, l",
        ylabel="layers in the block, n",
        title="Angular distance d(l, l+n)",
    )
    axes.locator_params(integer=True)
    figure.colorbar(image, ax=axes, label="scaled within each n (black dot: the least)")
    _save(figure, path)


def curves(distances: Distances, path: Path, *, chosen: tuple[int, int] | None = None) -> None:
    """The paper's figure 1c: d(l, l+n) against l, a curve for each of some block sizes n. Writes a PNG."""
    depth = distances.depth
    sizes = sorted({max(1, round(depth * k / (2 * _CURVES))) for k in range(1, _CURVES + 1)})
    if chosen is not None:
        sizes = sorted({*sizes, chosen[1]} - {depth})
    figure, axes = _figure()
    from matplotlib import colormaps

    for at, n in enumerate(sizes):
        row, error = list(distances.block(n)), list(distances.standard_error[n])
        picked = chosen is not None and n == chosen[1]
        colour = colormaps["viridis"](at / max(1, len(sizes) - 1))
        axes.plot(range(len(row)), row, color=colour, linewidth=2.4 if picked else 1.2, label=f"n = {n}")
        lower = [d - e for d, e in zip(row, error, strict=True)]
        upper = [d + e for d, e in zip(row, error, strict=True)]
        axes.fill_between(range(len(row)), lower, upper, color=colour, alpha=0.15, linewidth=0)
    if chosen is not None:
        start, n = chosen
        axes.plot(
            start, distances.block(n)[start], marker="o", markersize=9, markerfacecolor="none", markeredgecolor="red",
            linestyle="none", label=f"dropped: {_block(*chosen)}",
        )  # fmt: skip
    axes.set(
        xlabel="first layer of the block, l", ylabel="angular distance d(l, l+n), units of pi",
        title="Where a block changes the residual stream least",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, fontsize="small")
    _save(figure, path)


def _block(start: int, n: int) -> str:
    return f"layer {start}" if n == 1 else f"layers {start}-{start + n - 1}"


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})
