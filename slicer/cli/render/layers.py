"""Terminal output of an analysis and of a plan made from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from slicer.cli.render.progress import stdout, table
from slicer.plan.amounts import runs, spell_layers
from slicer.plan.plan import spell_dropped

if TYPE_CHECKING:
    from slicer.measure.analysis import Analysis, Distances
    from slicer.plan.choose import Chosen


_SHADES = "@%#*+=-:. "  # closest to farthest


def print_analysis(analysis: Analysis, out: Path) -> None:
    """Print the heat map, the best block of each size by each metric, and the output files."""
    console = stdout()
    distances = analysis.distances()
    text = f"{analysis.samples} sequences of {analysis.seq_len} tokens"
    console.print(f"{analysis.source}: {analysis.depth} layers, {text}\n")
    console.print("angular distance d(l, l+n), last token; scaled within each n from @ (closest) to blank")
    console.print("\n".join(heat_lines(distances, width=max(20, min(console.width, 120) - 26))) + "\n")
    sizes = sorted({max(1, round(analysis.depth * k / 8)) for k in range(1, 5)})
    closest = table("closest block of n layers, its first layer", "metric", *(f"n = {n}" for n in sizes))
    for name, found in analysis.metrics.items():
        rows = ([(v, -i) for i, v in enumerate(found.mean.get(n, ())) if not math.isnan(v)] for n in sizes)
        closest.add_row(name, *(f"{-min(row)[1]} ({min(row)[0]:.4f})" if row else "-" for row in rows))
    console.print(closest)
    if analysis.sublayers:
        console.print(_parts_table(analysis))
    if analysis.base_loss is not None:
        console.print(f"loss      {analysis.base_loss:.4f} nats per token with all layers")
    if analysis.greedy:
        order = ", ".join(f"{int(step['layer'])} ({step['loss']:.3f})" for step in analysis.greedy)
        console.print(f"greedy    {order}")
    console.print(f"written   {out} (analysis.json and figures)\nnext      slicer plan {out} --drop 0.25")


def _parts_table(analysis: Analysis) -> Table:
    """The least important attention and feed-forward sublayers by every metric."""
    title = "least important attention and feed-forward sublayers"
    made = table(title, "metric", "attention", "feed-forward", texts=3)
    for name, found in analysis.sublayers.items():
        cells = []
        for at in (0, 1):
            row = list(found.block(1))[at::2]
            least = sorted(range(len(row)), key=row.__getitem__)[:3]
            cells.append(", ".join(f"{i} ({row[i]:.4f})" for i in least))
        made.add_row(name, *cells)
    return made


def heat_lines(distances: Distances, width: int) -> list[str]:
    """The heat map as text: a line for each n, a column for each l, thinned or doubled to fit `width` columns.

    Each row is scaled to its own range, with a square root to show differences near the minimum.
    """
    depth = distances.depth
    sizes = [n for n in distances.sizes if n < depth]
    step = max(1, math.ceil(len(sizes) / 24))
    thin = max(1, math.ceil(depth / width))
    wide = max(1, min(3, width // depth))
    across = -(-depth // thin) * wide
    lines = []
    for n in reversed(sizes[::step]):
        row = list(distances.block(n))
        known = [v for v in row if not math.isnan(v)]
        least, most = min(known), max(known)
        cells = ""
        for at in range(0, len(row), thin):
            value = min((v for v in row[at : at + thin] if not math.isnan(v)), default=most)
            shade = 0.0 if most == least else math.sqrt((value - least) / (most - least))
            cells += _SHADES[min(len(_SHADES) - 1, int(shade * len(_SHADES)))] * wide
        best = row.index(least)
        lines.append(f"n {n:>4} |{cells:<{across}}| {best}-{best + n - 1}  {least:.4f}")
    last = f"{depth - 1}"
    lines.append(f"       l = 0{last:>{max(len(last), across - 4)}}")
    return lines


def print_chosen(chosen: Chosen, samples: int, file: Path) -> None:
    """The chosen layers and why: the runners-up, their distance, and whether the best two can be distinguished.

    `samples`: the sequences measured.
    """
    console = stdout()
    plan = chosen.plan
    dropped = f"{spell_layers(plan.dropped)} of {plan.depth} layers, {len(plan.kept)} stay"
    if plan.below_layers:
        dropped = f"{spell_dropped(plan)}, {len(plan.kept)} layers stay"
    console.print(f"plan      drop {dropped}")
    sublayers = bool(plan.no_attention or plan.no_ffn)
    total = " (sum over blocks)" if not sublayers and plan.metric != "greedy" and len(runs(plan.dropped)) > 1 else ""
    console.print(f"by        {plan.metric} {plan.distance:.4f}{total}")
    for other in plan.runners_up:
        more = "" if sublayers else f" (+{other.distance - (plan.distance or 0.0):.4f})"
        console.print(f"          next {other.block} at {other.distance:.4f}{more}")
    if (doubt := chosen.doubt) is not None:
        settle = "no number of samples can decide"
        if doubt.samples is not None:
            settle = f"about {doubt.samples:,} samples are needed to decide"
        console.print(
            f"warning   the best two cannot be distinguished on {samples} samples: they differ by "
            f"{doubt.difference:.4f} with a standard error of {doubt.error:.4f}; {settle}"
        )
    console.print(f"written   {file}\nnext      slicer convert {plan.source or 'SOURCE'} --plan {file}")
