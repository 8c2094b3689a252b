"""The figures of a report: sweep, analysis, healing and benchmark."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.figures import layers, sweep, training
from slicer.figures.bench import bench_line
from slicer.measure.analysis import Distances
from slicer.sweep.table import Table, curves_of

_BENCH = {
    "time_per_output_token_ms": "time per output token (ms)",
    "prefill_ms": "prefill (ms)",
    "weight_bytes": "weights (bytes)",
    "kv_bytes_per_token": "KV cache per token (bytes)",
    "peak_memory_bytes": "peak memory (bytes)",
}


@dataclass(frozen=True)
class Figure:
    """A figure: `name` is its file name beside the markdown; `data` is its SVG or PNG bytes."""

    name: str
    caption: str
    data: bytes

    @property
    def uri(self) -> str:
        """The figure as a data URI, for the self-contained page."""
        kind = "svg+xml" if self.name.endswith(".svg") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


def distance_figures(distances: Distances, chosen: layers.Whole, offset: layers.Offset) -> list[Figure]:
    """The distances that the cut was chosen by, with the chosen block marked."""
    with tempfile.TemporaryDirectory(prefix="slicer-report-") as scratch:
        heat, lines = Path(scratch) / "distances.png", Path(scratch) / "curves.png"
        layers.heat_map(distances, heat, chosen=chosen, offset=offset)
        layers.curves(distances, lines, chosen=chosen, offset=offset)
        return [
            Figure("distances.png", "Angular distance of every block of layers.", heat.read_bytes()),
            Figure("distance-curves.png", "The same for some block sizes.", lines.read_bytes()),
        ]


def curve_figures(table: Table) -> list[Figure]:
    """One figure per measure, against the fraction dropped; one for all variants of a task (shots, order)."""
    figures = []
    whole = table.unpruned
    asked: dict[str, list[str]] = {}  # task -> its variants
    alone = len({(row.strategy, row.heal) for row in table.rows if row.n}) == 1
    for task in table.tasks:
        asked.setdefault(task.split("@")[0] if alone else task, []).append(task)
    for name, ways in asked.items():
        score = whole.primary(ways[0]) if whole else None
        label = f"{name if len(ways) > 1 else ways[0]} ({score.metric})" if score else ways[0]
        chance = score.chance if score else None
        if len(ways) > 1:
            svg, file = sweep.overlaid({way: curves_of(table, way) for way in ways}, chance, label), name
        else:
            svg, file = sweep.against_fraction(*curves_of(table, ways[0]), chance, label), ways[0]
        file = f"{''.join(c if c.isalnum() else '-' for c in file)}.svg"
        figures.append(Figure(file, f"{label} against the fraction of layers dropped.", svg.encode()))
    if table.has_loss:
        svg = sweep.against_fraction(*curves_of(table, "c4"), 1.0, "loss / log V")
        figures.append(Figure("loss.svg", "Loss on text as a share of log V; 1 is chance.", svg.encode()))
    return figures


def healing_figures(held_out: Mapping[str, Mapping[int, float]]) -> list[Figure]:
    """The held-out losses by step, of each healing by name."""
    if not held_out:
        return []
    return [Figure("healing.svg", "Loss during healing.", training.healing_curve(held_out).encode())]


def bench_figures(bench: Mapping[str, Any]) -> list[Figure]:
    """The measurements of `slicer bench` against the number of layers."""
    models = [m for m in bench.get("models", ()) if isinstance(m, dict) and "layers" in m]
    figures = []
    for key, label in _BENCH.items():
        points = [(int(m["layers"]), float(m[key])) for m in models if isinstance(m.get(key), int | float)]
        if len({x for x, _ in points}) > 1:
            svg = bench_line(points, (bench.get("lines") or {}).get(key), label)
            figures.append(Figure(f"bench-{key}.svg", f"{label} against the number of layers.", svg.encode()))
    return figures
