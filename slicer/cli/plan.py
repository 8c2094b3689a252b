"""The command `slicer plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from slicer.cli import groups
from slicer.cli.groups import group, option
from slicer.measure.metrics import METRICS
from slicer.plan.plan import METRIC


@groups.command()
@click.argument("directory", type=click.Path(path_type=Path))
@group(
    "How much to drop",
    option("--drop", metavar="AMOUNT", help="Layers: fraction 0.4 or count 8."),
    option("--drop-attention", metavar="AMOUNT", help="Drop the attention of this many layers."),
    option("--drop-ffn", metavar="AMOUNT", help="Drop the feed-forward of this many layers."),
    option("--drop-sublayers", metavar="AMOUNT",
           help="Drop this many sublayers of either kind, least important first."),
)  # fmt: skip
@group(
    "How to choose",
    option("--metric", type=click.Choice([*METRICS, "greedy"]), default=METRIC, help="Metric to choose by."),
    option("--blocks", type=groups.POSITIVE, default=1,
           help="Maximum number of separate blocks; the best choice is found exactly."),
    option("--protect", metavar="LAYERS", help="Layers to keep, e.g. 0,1,-1 (from the end) or 0-3."),
)  # fmt: skip
@group("Output", groups.output_file(help="Plan file.", show_default="plan.json in DIRECTORY"), groups.JSON)
def plan(directory: Path, **given: Any) -> None:
    """Choose layers to drop from the analysis in DIRECTORY.

    This needs no model.

    \b
    slicer plan analysis --drop 8 --blocks 3 --protect 0,1,-1
    slicer convert SOURCE --plan analysis/plan.json
    """
    from slicer.cli.render import layers
    from slicer.errors import UsageError
    from slicer.measure.analysis import Analysis
    from slicer.plan.amounts import parse_goal, parse_protected
    from slicer.plan.choose import choose
    from slicer.runtime.files import write_atomically

    analysis = Analysis.load(directory)
    goal = parse_goal(**{k: given[k] for k in ("drop", "drop_attention", "drop_ffn", "drop_sublayers")})
    if goal is None:
        raise UsageError("give an amount to drop: --drop, --drop-attention, --drop-ffn or --drop-sublayers")
    if goal.named or any(amount.layers for amount in goal.sublayers.values()):
        raise UsageError("give fractions or counts; slicer convert takes named layers without a plan")
    protect = frozenset() if given["protect"] is None else parse_protected(given["protect"], analysis.depth)
    how = {"metric": given["metric"], "blocks": given["blocks"], "protect": protect}
    chosen = choose(goal, analysis.depth, analysis, lambda plan: None, **how)
    origin: dict[str, Any] = {k: getattr(analysis, k) for k in ("source", "revision", "model_type", "versions")}
    made = replace(chosen.plan, **origin, command=groups.recorded_command())
    file = given["output_file"] or (directory if directory.is_dir() else directory.parent) / "plan.json"
    write_atomically(file, made.to_json())
    if given["as_json"]:
        click.echo(made.to_json(), nl=False)
    else:
        layers.print_chosen(replace(chosen, plan=made), analysis.samples, file)
