"""The command line: options in, one line of error or a summary out. What a command needs is imported when it runs."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(source: str, as_json: bool, debug: bool) -> None:
    """Show what SOURCE is: architecture, depth, sizes, costs, and what was sliced off it."""
    from slicer.checkpoint.sizes import inspect as look
    from slicer.cli.render import written

    found = look(source)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        written.print_inspection(found)
