"""The command line: options in, one line of error or a summary out. What a command needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from slicer.cli.groups import (
    calibration_options,
    rank_options,
    rank_sweep_of,
    recorded_command,
    training_of,
    training_options,
)

# Options that do not change what is written stay out of the recorded command, so the same work has the same record.
_UNRECORDED = {"out", "force", "as_json", "dry_run", "debug", "device", "verify", "source", "memory"}


@click.command()
@click.argument("source")
@click.option(
    "--drop", metavar="AMOUNT", help="Fraction 0.4, count 8, block 24-31 (inclusive) or list 3,7,9-12."
)
@click.option("--keep", type=int, metavar="LAYERS", help="Keep this many layers.")
@click.option(
    "--max-params", metavar="SIZE", help="Drop as few layers as bring the parameters to SIZE, e.g. 5B."
)
@click.option(
    "--max-bytes", metavar="SIZE", help="Drop as few layers as bring the weights to SIZE, e.g. 16GB."
)
@click.option(
    "--drop-attention",
    metavar="AMOUNT",
    help="Attention of so many layers (as in --drop), beside --drop or alone: their keys and values are not cached.",
)
@click.option("--drop-ffn", metavar="AMOUNT", help="Feed-forward part of so many layers, likewise.")
@click.option("--drop-sublayers", metavar="AMOUNT", help="So many of either, whichever changes least.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Replay a saved plan.json.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Output directory  [default: SOURCE's name-LAYERSL]"
)
@click.option(
    "--strategy",
    type=click.Choice(["similarity", "deepest", "tail"]),
    default="similarity",
    show_default=True,
    help="similarity: the block whose ends lie closest (angular distance). deepest: the last layers but the final "
    "one. tail: the last layers.",
)
@click.option(
    "--offset",
    type=click.Choice(["auto", "whole", "half"]),
    default="auto",
    show_default=True,
    help="Cut whole layers, or half-offset: from after one attention to after another, joined to the "
    "feed-forward part that follows. auto: whichever is closer (whole for --fold transform and training).",
)
@click.option(
    "--format",
    type=click.Choice(["native", "blockwise", "zeroed"]),
    help="How layers without attention or feed-forward part are written. blockwise: vLLM's DeciLM form (Llama, "
    "Mistral, Qwen2); transformers needs 'import slicer'. zeroed: output matrix zero; loads everywhere, saves nothing  "
    "[default: native, blockwise where a part is missing]",
)
@calibration_options
@click.option(
    "--heal",
    type=click.Choice(["none", "auto", "fold", "qlora", "lora", "full"]),
    help="Close the cut: fold solves the weights around it again, in closed form, on the calibration data; auto does "
    "so where there is such data and it helps; qlora, lora and full train from there, as in heal. none: keep every "
    "byte  [default: auto, or as --plan was]",
)
@click.option(
    "--fold",
    type=click.Choice(["resolve", "transform"]),
    default="resolve",
    show_default=True,
    help="resolve: the output matrices themselves, by ridge regression. transform: only a linear map behind the "
    "feed-forward part (ReplaceMe).",
)
@training_options
@rank_options
@click.option(
    "--emulate",
    type=click.Choice(["bias", "linear"]),
    help="Let something small stand for what is removed, solved in closed form on the calibration data: a constant "
    "(bias) or a low-rank map (linear, needs --rank).",
)
@click.option(
    "--emulate-steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Then train that, and nothing else, for so many steps; the best by held-out loss is kept.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest weight file."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Cast the weights (and measure with them)  [default: as stored, bit for bit]",
)
@click.option(
    "--device", default="auto", show_default=True, help="Where the model runs: auto, cpu, cuda, cuda:1."
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory for the weights, e.g. 8GB; a larger model is read from disk layer by layer  [default: what is free]",
)
@click.option(
    "--verify",
    type=click.Choice(["auto", "none", "load", "logits"]),
    default="auto",
    show_default=True,
    help="Check before the output appears: every key and shape (load), and the logits against the source with those "
    "layers bypassed (logits). auto: logits while the model fits in memory.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan, sizes and FLOPs a token; write nothing.")
@click.option("--force", is_flag=True, help="Replace the output directory if it holds a checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def convert(source: str, **given: Any) -> None:
    """Drop layers of SOURCE and write a standard checkpoint.

    SOURCE is a directory, a Hub id (org/name or org/name@revision), or "demo", the embedded model.
    """
    from slicer.cli.render import progress as bars
    from slicer.cli.render import written
    from slicer.data.sources import TextSpec
    from slicer.jobs.convert import convert as run
    from slicer.jobs.options import Options
    from slicer.plan.amounts import parse_goal, parse_size
    from slicer.plan.plan import Plan

    whole = ("drop", "keep", "max_params", "max_bytes")
    goal = parse_goal(
        **{name: given[name] for name in (*whole, "drop_attention", "drop_ffn", "drop_sublayers")}
    )
    saved = Plan.load(given["plan_file"]) if given["plan_file"] is not None else None
    calibration = given["calibration"] or ("self" if source == "demo" and saved is None else None)
    chosen = {
        k: given[k] for k in ("samples", "seq_len", "batch_size", "seed", "column") if given[k] is not None
    }
    options = Options(
        strategy=given["strategy"],
        calibration=TextSpec(source=calibration, **chosen),
        verify=given["verify"],
        dtype=given["dtype"],
        device=given["device"],
        memory=parse_size(given["memory"], "--memory") if given["memory"] is not None else None,
        heal=given["heal"],
        fold=given["fold"],
        training=training_of({**given, "rank": None} if given["emulate"] else given, given["heal"], "--heal"),
        save_adapter=given["save_adapter"],
        rank_sweep=rank_sweep_of(given) if given["rank_sweep"] is not None else None,
        format=given["format"],
        offset=given["offset"],
        emulate=given["emulate"],
        rank=given["rank"] if given["emulate"] else None,
        emulate_steps=given["emulate_steps"],
        max_shard_bytes=parse_size(given["max_shard_size"], "--max-shard-size"),
        force=given["force"],
        dry_run=given["dry_run"],
        trust_remote_code=given["trust_remote_code"],
        command=recorded_command(_UNRECORDED),
    )
    with bars.progress() as progress:
        summary = run(source, goal, given["out"], options, plan=saved, progress=progress)
    if given["as_json"]:
        click.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        written.print_summary(summary)
