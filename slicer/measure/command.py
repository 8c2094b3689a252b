"""The commands `slicer analyze` and `slicer plan`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

METRICS = (
    "angular_last_token", "angular_mean", "block_influence", "relative_l1", "relative_l2", "cka", "fold_residual",
    "loss", "kl", "taylor", "greedy", "healed_loss", "shapley", "shapley_score",
)  # fmt: skip
_UNRECORDED = {"out", "force", "as_json", "debug", "device", "memory", "source", "directory"}


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The calibration text options, shared by convert, analyze and heal."""
    options = [
        click.option(
            "--calibration",
            metavar="DATA",
            help="Text to measure and heal on: a Hub data set, a .jsonl, .txt or .parquet file (conversations go "
            "through the chat template), task:NAME for the prompts of an lm-eval task, or 'self' (text sampled from "
            "the model); several, separated by commas, get equal shares  [default: allenai/c4, streamed; self for the "
            "demo model]",
        ),
        click.option("--samples", type=click.IntRange(min=1), help="Calibration sequences."),
        click.option("--seq-len", type=click.IntRange(min=2), help="Tokens per calibration sequence."),
        click.option("--batch-size", type=click.IntRange(min=1), help="Sequences per forward pass."),
        click.option(
            "--seed", type=click.IntRange(min=0), help="Seed of the calibration sample and of training."
        ),  # fmt: skip
        click.option(
            "--text-column", metavar="NAME", help="Column of the calibration data that holds the text."
        ),  # fmt: skip
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("source")
@calibration_options
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path),
              help="Directory for analysis.json and figures.")  # fmt: skip
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory for weights and states, e.g. 4GB; a larger model is read from disk layer by layer, and states beyond "
    "it go to a file  [default: 70% of the free memory]",
)
@click.option("--positions", type=click.IntRange(min=1),
              help="Tokens of each sequence that token averages use  [default: 16]")  # fmt: skip
@click.option(
    "--losses",
    metavar="N,...",
    help="Also measure loss and KL divergence without each block of these sizes, e.g. 1,4. One pass per size.",
)
@click.option("--greedy", type=click.IntRange(min=1), metavar="LAYERS",
              help="Also remove this many layers one by one, by loss (SLEB). One pass per layer.")  # fmt: skip
@click.option("--taylor", is_flag=True,
              help="Also measure |gradient x weight| of each layer. One forward and one backward pass.")  # fmt: skip
@click.option(
    "--sublayers",
    is_flag=True,
    help="Also measure attention and feed-forward sublayers separately, and half-offset cuts; with --losses also loss "
    "and KL without each sublayer. One more pass.",
)
@click.option(
    "--shapley",
    type=click.IntRange(min=1),
    metavar="PASSES",
    help="Also sample Shapley values of layers (with --sublayers: of sublayers), within this many forward passes.",
)
@click.option(
    "--against",
    metavar="loss|kl|task:NAME",
    default="loss",
    show_default=True,
    help="What the Shapley values add up to: the loss, the KL divergence from the full model, or the score of a "
    "multiple-choice lm-eval task, e.g. task:boolq or task:mmlu@5 (five examples).",
)
@click.option("--questions", type=click.IntRange(min=1), metavar="N",
              help="Number of questions of that task, drawn with the seed  [default: 64]")  # fmt: skip
@click.option("--data", metavar="DIR", type=click.Path(path_type=Path),
              help="Directory of local files of that task, as in slicer eval  [default: the Hub's]")  # fmt: skip
@click.option(
    "--beside",
    metavar="ANALYSIS",
    type=click.Path(path_type=Path),
    help="Also plot the importance of each layer or sublayer here against that in another analysis.",
)
@click.option(
    "--healed",
    metavar="N,...",
    help="Also heal the four closest blocks of these sizes in closed form and compare their losses.",
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
              help="Precision to measure in  [default: as stored]")  # fmt: skip
@click.option("--device", default="auto", show_default=True,
              help="Device to run on: auto, cpu, cuda, cuda:1.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing analysis in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the analysis as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def analyze(source: str, out: Path, **given: Any) -> None:
    """Measure the importance of the layers of SOURCE, by every metric.

    The model need not fit in memory. A stopped run resumes after the last finished layer when the command is run
    again. Several processes divide the samples: torchrun --nproc-per-node 2 -m slicer analyze ...

    \b
    slicer analyze Llama-2-70b-hf --memory 8GB -o analysis
    slicer plan analysis --drop 0.4
    """
    from slicer import console, show_layers
    from slicer.analyze import AnalyzeOptions
    from slicer.analyze import analyze as run
    from slicer.measure.calibration import CalibrationSpec
    from slicer.plan.amounts import parse_counts, parse_size

    calibration = given["calibration"] or ("self" if source == "demo" else None)
    spec = {
        k: given[k]
        for k in ("samples", "seq_len", "batch_size", "seed", "text_column")
        if given[k] is not None
    }
    chosen = {k: given[k] for k in ("positions", "greedy", "shapley", "questions") if given[k] is not None}
    options = AnalyzeOptions(
        calibration=CalibrationSpec(source=calibration, **spec),
        dtype=given["dtype"],
        device=given["device"],
        memory=parse_size(given["memory"], "--memory") if given["memory"] is not None else None,
        losses=parse_counts(given["losses"], "--losses") if given["losses"] is not None else (),
        healed=parse_counts(given["healed"], "--healed") if given["healed"] is not None else (),
        taylor=given["taylor"],
        sublayers=given["sublayers"],
        against=given["against"],
        data=given["data"],
        beside=given["beside"],
        force=given["force"],
        trust_remote_code=given["trust_remote_code"],
        command=recorded_command(_UNRECORDED),
        **chosen,
    )
    with console.progress() as progress:
        analysis = run(source, out, options, progress=progress)
    if analysis is None:
        return  # not rank 0: it prints nothing
    if given["as_json"]:
        click.echo(analysis.to_json(), nl=False)
    else:
        show_layers.print_analysis(analysis, out)


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
    from slicer import show_layers
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
        command=recorded_command(_UNRECORDED),
    )
    file = out or (directory if directory.is_dir() else directory.parent) / "plan.json"
    write_atomically(file, made.to_json())
    if as_json:
        click.echo(made.to_json(), nl=False)
    else:
        show_layers.print_chosen(replace(chosen, plan=made), analysis.samples, file)


def recorded_command(unrecorded: Collection[str]) -> str:
    """The current command line, in the order of the help, without `unrecorded` options."""
    context = click.get_current_context()
    arguments = [p for p in context.command.params if isinstance(p, click.Argument)]
    words = ["slicer", context.info_name or "", *(str(context.params[p.name or ""]) for p in arguments)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        default = parameter.get_default(context)
        if (
            parameter in arguments
            or parameter.name in unrecorded
            or value in (None, False)
            or value == default
        ):
            continue
        words += [parameter.opts[-1]] if value is True else [parameter.opts[-1], str(value)]
    return shlex.join(words)
