"""The command `slicer demo`."""

from __future__ import annotations

from pathlib import Path

from slicer.cli import groups
from slicer.cli.groups import option


@groups.command()
@option("--drop", metavar="AMOUNT", default="3", help="How much to drop, as in convert.")
@groups.output_dir(help="Keep the sliced model here.")
def demo(drop: str, output_dir: Path | None, debug: bool) -> None:
    """Slice the embedded model and let both models write a line.

    \b
    slicer demo
    slicer demo --drop 5 -o demo-7L
    """
    from slicer.cli.render import progress, written
    from slicer.demo.show import show

    with progress.bars() as bars:
        shown = show(drop, output_dir, bars)
    written.print_demo(shown)
