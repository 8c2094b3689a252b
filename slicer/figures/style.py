"""One palette, one canvas and one way to save for all figures. Files hold no dates: equal data gives equal bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from slicer.runtime.files import atomic_file

# Okabe and Ito's colours: distinct for all kinds of colour vision.
BLUE, ORANGE, VERMILION, GREEN = "#0072b2", "#e69f00", "#d55e00", "#009e73"
PURPLE, SKY, GREY, BLACK = "#cc79a7", "#56b4e9", "#6b6b6b", "#000000"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
BOTH = ".png+svg"  # suffix that writes both files


def canvas(width: float = 7, height: float = 4.6) -> Any:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot(width: float = 7, height: float = 4.6) -> tuple[Any, Any]:
    """A figure and its only axes."""
    figure = canvas(width, height)
    return figure, figure.add_subplot()


def mark(axes: Any, marker: str, x: float, y: float, label: str) -> None:
    """A red outline around the point that was chosen."""
    axes.plot(
        x, y, marker=marker, markersize=9, markerfacecolor="none", markeredgecolor="red", linestyle="none", label=label
    )


def finish(axes: Any, **labels: Any) -> None:
    """Labels, a faint grid and the legend, as all line plots have them."""
    axes.set(**labels)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)


def save(figure: Any, path: Path) -> None:
    """Write the figure, complete or not at all, as PNG or SVG by the suffix of `path`, or as both (`BOTH`)."""
    if path.suffix != ".svg":
        with atomic_file(path.with_suffix(".png") if path.suffix == BOTH else path) as temporary:
            figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    if path.suffix == BOTH:
        figure.set_layout_engine("none")  # keep the layout: computing it takes longer than drawing
    if path.suffix in (BOTH, ".svg"):
        with atomic_file(path.with_suffix(".svg")) as temporary:
            Path(temporary).write_text(svg(figure), "utf-8")


def svg(figure: Any) -> str:
    """The figure as SVG."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "slicer", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
