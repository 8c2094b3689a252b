"""The commands `slicer analyze` and `slicer plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from slicer.cli.analyze import UNRECORDED
from slicer.cli.groups import recorded_command

METRICS = (
    "angular_last_token", "angular_mean", "block_influence", "relative_l1", "relative_l2", "cka", "fold_residual",
    "loss", "kl", "taylor", "greedy", "healed_loss", "shapley", "shapley_score",
)  # fmt: skip


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--drop", metavar="AMOUNT", help="Layers to drop: fraction 0.4 or count 8.")
@click.option("--drop-attention", metavar="AMOUNT", help="Number or fraction of attention sublayers to drop.")
@click.option("--drop-ffn", metavar="AMOUNT", help="Number or fraction of feed-forward sublayers to drop.")
@click.option("--drop-sublayers", metavar="AMOUNT",
              help="Number or fraction of sublayers of either kind to drop, least important first.")  # fmt: skip
@click.option("--metric", type=click.Choice(METRICS), default="angular_last_token", show_default=True,
              help="Metric to choose by.")  # fmt: skip
@click.option("--blocks", type=click.IntRange(min=1), default=1, show_default=True,
              help="Maximum number of separate blocks; the optimum is exact.")  # fmt: skip
@click.option("--protect", metavar="LAYERS", help="Layers to keep, e.g. 0,1,-1 (from the end) or 0-3.")
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Plan file  [default: plan.json in DIRECTORY]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def plan(
    directory: Path,
    drop: str | None,
    drop_attention: str | None,
    drop_ffn: str | None,
    drop_sublayers: str | None,
    metric: str,
    blocks: int,
    protect: str | None,
    out: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Choose layers to drop from the analysis in DIRECTORY. Needs no model.

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
    goal = parse_goal(drop, drop_attention=drop_attention, drop_ffn=drop_ffn, drop_sublayers=drop_sublayers)
    if goal is None:
        raise UsageError("say how much to drop: --drop, --drop-attention, --drop-ffn or --drop-sublayers")
    if goal.named or any(amount.layers for amount in goal.sublayers.values()):
        raise UsageError("give fractions or counts; slicer convert takes named layers without a plan")
    stay = parse_protected(protect, analysis.depth) if protect is not None else frozenset()
    chosen = choose(
        goal, analysis.depth, analysis, lambda plan: None, metric=metric, blocks=blocks, protect=stay
    )
    made = replace(
        chosen.plan,
        source=analysis.source,
        revision=analysis.revision,
        model_type=analysis.model_type,
        versions=analysis.versions,
        command=recorded_command(UNRECORDED),
    )
    file = out or (directory if directory.is_dir() else directory.parent) / "plan.json"
    write_atomically(file, made.to_json())
    if as_json:
        click.echo(made.to_json(), nl=False)
    else:
        layers.print_chosen(replace(chosen, plan=made), analysis.samples, file)
