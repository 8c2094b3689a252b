"""The command `slicer report`."""

from __future__ import annotations

from pathlib import Path

import click

from slicer.cli import groups


@groups.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
def report(directory: Path, debug: bool) -> None:
    """Write report.html, one self-contained page, and report.md.

    They lie in DIR and cover what DIR contains: a sweep, layer distances, a benchmark, a sliced checkpoint.

    \b
    slicer report qwen2.5-0.5b-sweep
    """
    from slicer.report.page import write_report

    for file in write_report(directory):
        click.echo(f"written   {file}")
