"""`slicer heal` and `slicer merge`: options in, a summary or one line of error out."""

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

UNRECORDED = {"out", "force", "as_json", "debug", "device", "verify", "sliced", "save_adapter"}


@click.command()
@click.argument("sliced")
@click.option(
    "--from", "source", metavar="SOURCE", help="What SLICED was sliced from  [default: as its plan says]"
)
@click.option(
    "--method",
    type=click.Choice(["fold", "qlora", "lora", "full"]),
    default="fold",
    show_default=True,
    help="fold: the weights around the cut are solved again in closed form. qlora, lora: adapters on the feed-forward "
    "matrices are trained, on 4-bit weights or those as stored, and merged. full: all weights are trained.",
)
@click.option(
    "--fold",
    type=click.Choice(["resolve", "transform"]),
    default="resolve",
    show_default=True,
    help="resolve: the output matrices themselves, by ridge regression. transform: only a linear map behind the "
    "feed-forward part (ReplaceMe).",
)
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Where the healed checkpoint goes."
)
@calibration_options
@training_options
@rank_options
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest weight file."
)
@click.option(
    "--device", default="auto", show_default=True, help="Where the source runs: auto, cpu, cuda, cuda:1."
)
@click.option(
    "--verify",
    type=click.Choice(["auto", "none", "load", "logits"]),
    default="auto",
    show_default=True,
    help="Check before the output appears: every key and shape (load), and the logits against the source with the "
    "new weights and the dropped layers bypassed (logits). auto: logits while the source fits in memory.",
)
@click.option("--force", is_flag=True, help="Replace the output directory if it holds a checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def heal(sliced: str, **given: Any) -> None:
    """Close the cut in SLICED, a checkpoint that slicer made.

    The shapes and the architecture stay as they are. All tensors but those that are solved again, or trained, keep
    their bytes. A training that was stopped goes on when the same command is given again.

    \b
    slicer heal qwen-20L --from Qwen/Qwen2.5-0.5B --calibration text.jsonl -o qwen-20L-healed
    slicer heal llama-24L --from meta-llama/Llama-2-7b-hf --method qlora -o llama-24L-healed
    """
    from slicer.cli.render import progress as bars
    from slicer.cli.render import written
    from slicer.data.sources import TextSpec
    from slicer.jobs.heal import Healed, HealOptions
    from slicer.jobs.heal import heal as run
    from slicer.plan.amounts import parse_size

    names = ("samples", "seq_len", "batch_size", "seed", "column")
    chosen = {name: given[name] for name in names if given[name] is not None}
    common: dict[str, Any] = {
        "fold": given["fold"],
        "calibration": TextSpec(source=given["calibration"], **chosen),
        "max_shard_bytes": parse_size(given["max_shard_size"], "--max-shard-size"),
        "command": recorded_command(UNRECORDED),
        **{name: given[name] for name in ("verify", "device", "force", "trust_remote_code")},
    }
    training = training_of(given, given["method"], "--method")
    with bars.progress() as progress:
        if training is None:
            done: Healed | None = run(
                sliced, given["source"], given["out"], HealOptions(**common), progress=progress
            )
        else:
            from slicer.heal.finetune.run import TrainOptions, train_cut
            from slicer.runtime.distributed import Processes
            from slicer.sweep.ranks import heal_with_best_rank

            options = TrainOptions(training=training, save_adapter=given["save_adapter"], **common)
            if given["rank_sweep"] is not None:
                done = heal_with_best_rank(
                    sliced, given["source"], given["out"], options, rank_sweep_of(given), progress=progress
                )
            else:
                done = train_cut(sliced, given["source"], given["out"], options, progress=progress)
            Processes.of_environment().leave()
    if done is None:  # not the first of several processes
        return
    if given["as_json"]:
        click.echo(json.dumps(done.to_dict(), indent=2))
    else:
        written.print_healed(done)
