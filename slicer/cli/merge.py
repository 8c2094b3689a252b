"""`slicer heal` and `slicer merge`: options in, a summary or one line of error out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from slicer.cli.groups import recorded_command
from slicer.cli.heal import UNRECORDED


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
    from slicer.cli.render import progress as bars
    from slicer.cli.render import written
    from slicer.jobs.merge import merge as run
    from slicer.plan.amounts import parse_size

    with bars.progress() as progress:
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
            command=recorded_command(UNRECORDED),
            progress=progress,
        )
    if given["as_json"]:
        click.echo(json.dumps(done.to_dict(), indent=2))
    else:
        written.print_merged(done)
