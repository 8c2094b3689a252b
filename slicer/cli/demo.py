"""The command line: options in, one line of error or a summary out. What a command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Keep the sliced model here.")
@click.option(
    "--drop", metavar="AMOUNT", default="3", show_default=True, help="How much to drop, as in convert."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def demo(out: Path | None, drop: str, debug: bool) -> None:
    """Slice the embedded model and let both write a line."""
    from slicer.cli.render import progress as bars
    from slicer.cli.render import written
    from slicer.demo.show import show

    with bars.progress() as progress:
        shown = show(drop, out, progress)
    written.print_demo(shown)
