"""The command `slicer merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slicer.cli import groups
from slicer.cli.groups import group, option
from slicer.jobs.request import MergeRequest


@groups.command()
@click.argument("sliced")
@click.argument("adapter", type=click.Path(path_type=Path))
@option(
    "--renumber",
    default=False,
    help="ADAPTER was trained on the unsliced model: renumber its layers and leave out the dropped ones.",
)
@group("Output", groups.output_dir(help="Directory of the merged checkpoint.", required=True), *groups.RESULT)
@group("Machine", groups.DEVICE, *groups.MEMORY, groups.TRUST)
def merge(sliced: str, adapter: Path, **given: Any) -> None:
    """Merge the LoRA adapter ADAPTER into the checkpoint SLICED.

    Tensor by tensor, into the weights as stored, never into a quantized copy.

    \b
    slicer merge llama-22L adapter -o llama-22L-merged
    slicer merge llama-22L adapter-of-the-unsliced-model --renumber -o llama-22L-merged
    """
    from slicer.cli.render import progress, written
    from slicer.jobs.merge import merge as run

    request = MergeRequest(sliced, adapter, given["renumber"], **groups.written_of(given))
    with progress.bars() as bars:
        done = run(request, bars)
    written.report(done, given["as_json"])
