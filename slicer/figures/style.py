"""Figures of an analysis. Files contain no dates, so equal data gives equal bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

BOTH_PARTS = ".png+svg"  # suffix that writes both files


def new_figure() -> tuple[Any, Any]:
    figure = canvas((7, 4.6))
    return figure, figure.add_subplot()


def canvas(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write by suffix (PNG, SVG or `_BOTH`), without timestamps."""
    from matplotlib import rc_context

    both = path.suffix == BOTH_PARTS
    if path.suffix != ".svg":
        png = path.with_suffix(".png") if both else path
        figure.savefig(png, format="png", dpi=130, metadata={"Software": None})
    if both:
        figure.set_layout_engine("none")  # keep the layout: computing it takes longer than drawing
    if both or path.suffix == ".svg":
        with rc_context({"svg.hashsalt": "slicer", "svg.fonttype": "path"}):
            figure.savefig(path.with_suffix(".svg"), format="svg", metadata={"Date": None, "Creator": None})


COLOURS = {"similarity": "#1f4e9c", "deepest": "#b3262a", "tail": "#b8741a", "random": "#6b6b6b"}
MARKERS = {"none": "o", "fold": "s", "qlora": "D"}
DASHES = {"none": (0, (1, 1.5)), "fold": (0, ()), "qlora": (0, (6, 1.5))}
# Colours of ranks and of task variants: distinct for all kinds of colour vision (Okabe and Ito).
OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def curve_figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.7), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def svg(figure: Any) -> str:
    """The figure as SVG without dates, so that equal data gives equal bytes."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "slicer"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
