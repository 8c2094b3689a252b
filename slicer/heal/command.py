"""`slicer heal` and `slicer merge`: options in, a summary or one line of error out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from slicer.measure.command import calibration_options


@click.command()
@click.argument("sliced")
@click.option(
    "--from", "source", metavar="SOURCE", help="What SLICED was sliced from  [default: as its plan says]"
)
@click.option(
    "--method",
    type=click.Choice(["fold"]),
    default="fold",
    show_default=True,
    help="fold: the weights before the cut are solved again in closed form.",
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

    The shapes and the architecture stay as they are. All tensors but the few that are solved again keep their bytes.

    \b
    slicer heal qwen-20L --from Qwen/Qwen2.5-0.5B --calibration text.jsonl -o qwen-20L-healed
    """
    from slicer import console
    from slicer.heal.job import HealOptions
    from slicer.heal.job import heal as run
    from slicer.measure.calibration import CalibrationSpec
    from slicer.plan import parse_size

    names = ("samples", "seq_len", "batch_size", "seed", "text_column")
    chosen = {name: given[name] for name in names if given[name] is not None}
    words = ["slicer", "heal", sliced, "--method", given["method"], "--fold", given["fold"]]
    for name in ("source", "calibration", *names):
        if given[name] is not None:
            option = "--from" if name == "source" else f"--{name.replace('_', '-')}"
            words += [option, str(given[name])]
    options = HealOptions(
        fold=given["fold"],
        calibration=CalibrationSpec(source=given["calibration"], **chosen),
        verify=given["verify"],
        device=given["device"],
        max_shard_bytes=parse_size(given["max_shard_size"], "--max-shard-size"),
        force=given["force"],
        trust_remote_code=given["trust_remote_code"],
        command=shlex.join(words),
    )
    with console.progress() as progress:
        done = run(sliced, given["source"], given["out"], options, progress=progress)
    if given["as_json"]:
        click.echo(json.dumps(done.to_dict(), indent=2))
    else:
        console.print_healed(done)


@click.command()
@click.argument("sliced")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Where the merged checkpoint goes."
)
@click.option(
    "--renumber",
    is_flag=True,
    help="ADAPTER was trained on the unsliced model: count its layers anew and leave out those that were dropped.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest weight file."
)
@click.option("--device", default="auto", show_default=True, help="Where the check runs.")
@click.option(
    "--verify",
    type=click.Choice(["auto", "none", "load", "logits"]),
    default="auto",
    show_default=True,
    help="Check before the output appears: every key and shape (load), and the logits against SLICED with the adapter "
    "put on by peft (logits). auto: logits while the model fits in memory.",
)
@click.option("--force", is_flag=True, help="Replace the output directory if it holds a checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def merge(sliced: str, adapter: Path, **given: Any) -> None:
    """Merge the LoRA adapter ADAPTER into the checkpoint SLICED.

    Tensor by tensor, into the weights as stored, never into a quantized copy.
    """
    from slicer import console
    from slicer.checkpoint.merge import merge as run
    from slicer.plan import parse_size

    with console.progress() as progress:
        done = run(
            sliced,
            adapter,
            given["out"],
            renumber=given["renumber"],
            check=given["verify"],
            device=given["device"],
            max_shard_bytes=parse_size(given["max_shard_size"], "--max-shard-size"),
            force=given["force"],
            trust_remote_code=given["trust_remote_code"],
            progress=progress,
        )
    if given["as_json"]:
        click.echo(json.dumps(done.to_dict(), indent=2))
    else:
        console.print_merged(done)
