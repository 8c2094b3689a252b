"""Figures: real pictures, the same bytes for the same distances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slicer.figures import layers, style
from slicer.measure.analysis import Distances


def distances(depth: int) -> Distances:
    mean = {n: [abs(start - 2) / depth + n / 50 for start in range(depth - n + 1)] for n in range(1, depth + 1)}
    return Distances(depth, 4, 16, mean, {n: [0.01] * len(row) for n, row in mean.items()})


@pytest.mark.parametrize("draw", [layers.heat_map, layers.curves])
@pytest.mark.parametrize("depth", [2, 3, 12, 80])
def test_the_same_figures_give_the_same_bytes(draw: Callable[..., None], depth: int, tmp_path: Path) -> None:
    from matplotlib import image

    for name in ("a", "b"):
        draw(distances(depth), tmp_path / name, chosen=(0, 1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    pixels = image.imread(tmp_path / "a", format="png")
    assert pixels.shape[0] > 300 and pixels[..., :3].std() > 0.05  # something is drawn
    draw(distances(depth), tmp_path / "c", chosen=(1, 1))
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()


def test_the_figures_of_an_analysis(tmp_path: Path) -> None:
    """Every one as PNG and SVG, the same bytes twice, also with a metric of few sizes and blocks not measured."""
    import math

    from slicer.figures.layers import analysis_figures
    from slicer.measure.analysis import Analysis

    depth = 5
    mean = {n: [0.1 * n + 0.05 * (start % 3) for start in range(depth - n + 1)] for n in range(1, depth + 1)}
    whole = Distances(depth, 4, 8, mean, {n: [0.01] * len(row) for n, row in mean.items()})
    few = Distances(depth, 4, 8, {1: [-0.1, 0.2, 9.0, 0.3, 0.2]}, {1: [0.0] * 5}, "loss")
    holes = Distances(depth, 4, 8, {2: [math.nan, 0.1, math.nan, 0.2]}, {2: [math.nan] * 4}, "healed_loss")
    analysis = Analysis(depth, 4, 8, {"angular_last_token": whole, "loss": few, "healed_loss": holes})
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    written = analysis_figures(analysis, tmp_path / "a")
    analysis_figures(analysis, tmp_path / "b")
    assert len(written) == 12
    for file in written:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")
        assert content == (tmp_path / "b" / file.name).read_bytes()


def test_metrics_that_agree() -> None:
    from slicer.figures.layers import rank_agreement

    rows = {1: [0.3, 0.1, 0.2, 0.4]}
    one, same = (Distances(4, 2, 8, {1: [f * v for v in rows[1]]}, {}) for f in (1, 7))
    against = Distances(4, 2, 8, {1: [-v for v in rows[1]]}, {})
    assert rank_agreement(one, same) == pytest.approx(1)
    assert rank_agreement(one, against) == pytest.approx(-1)


def test_a_half_offset_cut_is_marked_between_the_blocks_of_whole_layers(tmp_path: Path) -> None:
    layers.curves(distances(12), tmp_path / "none")
    layers.curves(distances(12), tmp_path / "whole", chosen=(4, 2))
    layers.curves(distances(12), tmp_path / "half", offset=(4, 6, 0.05))
    assert len({(tmp_path / name).read_bytes() for name in ("none", "whole", "half")}) == 3
    layers.heat_map(distances(12), tmp_path / "none")
    layers.heat_map(distances(12), tmp_path / "whole", chosen=(4, 2))
    layers.heat_map(distances(12), tmp_path / "half", offset=(4, 6, 0.05))
    assert len({(tmp_path / name).read_bytes() for name in ("none", "whole", "half")}) == 3


def test_a_panel_that_would_look_empty_says_so() -> None:
    _, axes = style.plot()
    layers.note_flat(axes, [0.0, float("nan"), 0.0])
    layers.note_flat(axes, [0.0, 0.1])
    assert [text.get_text() for text in axes.texts] == ["0 everywhere: no difference seen"]
