"""The command line, run within the test's process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from slicer.cli.main import main


def slicer(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeeds(*arguments: object) -> Result:
    result = slicer(*arguments)
    assert result.exit_code == 0, result.output
    return result
