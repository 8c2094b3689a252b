"""Figures: real pictures, the same bytes for the same distances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slicer.judge import plots
from slicer.measure.analysis import Distances


def distances(depth: int) -> Distances:
    mean = {
        n: [abs(start - 2) / depth + n / 50 for start in range(depth - n + 1)] for n in range(1, depth + 1)
    }
    return Distances(depth, 4, 16, mean, {n: [0.01] * len(row) for n, row in mean.items()})


@pytest.mark.parametrize("draw", [plots.heat_map, plots.curves])
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
