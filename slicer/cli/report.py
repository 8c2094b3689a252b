"""The commands `slicer eval` and `slicer report`. Heavy imports happen when a command runs."""

from __future__ import annotations

from pathlib import Path

import click

from slicer.cli.eval import RESULTS


@click.command()
@click.argument("directory", type=RESULTS, metavar="DIR")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report(directory: Path, debug: bool) -> None:
    """Write DIR/report.html, one self-contained page, and DIR/report.md.

    The report covers what DIR contains: a sweep, layer distances, a benchmark, a sliced checkpoint with its healing.
    """
    from slicer.report.page import write_report

    for file in write_report(directory):
        click.echo(f"written   {file}")
