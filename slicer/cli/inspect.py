"""The command `slicer inspect`."""

from __future__ import annotations

import json

import click

from slicer.cli import groups


@groups.command()
@click.argument("source")
@groups.JSON
def inspect(source: str, as_json: bool, debug: bool) -> None:
    """Show the architecture, sizes and costs of SOURCE.

    For a sliced checkpoint, also what was dropped and how it was healed.

    \b
    slicer inspect demo
    slicer inspect qwen-20L
    """
    from slicer.checkpoint.sizes import inspect as look
    from slicer.cli.render import written

    found = look(source)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        written.print_inspection(found)
