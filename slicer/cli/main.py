"""The command line: options in, a summary or one line of error out. The imports of a command run with it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import cloup

from slicer.cli.analyze import analyze
from slicer.cli.bench import bench
from slicer.cli.convert import convert
from slicer.cli.demo import demo
from slicer.cli.eval import evaluate
from slicer.cli.heal import heal
from slicer.cli.inspect import inspect
from slicer.cli.merge import merge
from slicer.cli.plan import plan
from slicer.cli.report import report
from slicer.cli.serve import serve
from slicer.cli.sweep import sweep
from slicer.errors import SlicerError, reason_of
from slicer.runtime.files import within_disk


class _Group(cloup.Group):
    """Reports every SlicerError as one line; a traceback only with --debug."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        arguments = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in arguments
        signal.signal(signal.SIGTERM, _terminate)
        try:
            with within_disk(Path.cwd()):
                end = super().main(arguments, **{**extra, "standalone_mode": False})
            sys.exit(end if isinstance(end, int) else 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.UsageError as error:
            at = error.ctx.command_path if error.ctx else "slicer"
            _fail(f"{error.format_message().rstrip('.')} (see {at} --help)", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("stopped", 130)
        except SlicerError as error:
            if debug:
                raise
            _fail(str(error), error.exit_code)
        except MemoryError:
            _fail("out of memory; name the layers (--drop 24-31) or use --strategy deepest, and --verify load", 1)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if debug:
                raise
            _fail(f"{type(error).__name__}: {reason_of(error)} (run again with --debug for the traceback)", 1)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    sys.exit(143)  # as an exception, so that temporary directories are removed


def _fail(message: str, code: int) -> NoReturn:
    click.echo("slicer: " + " ".join(message.split()), err=True)
    sys.exit(code)


@click.group(
    cls=_Group,
    sections=[
        cloup.Section("Look and choose", [inspect, analyze, plan]),
        cloup.Section("Cut and repair", [convert, heal, merge]),
        cloup.Section("Judge and use", [evaluate, sweep, report, bench, serve]),
        cloup.Section("Try it", [demo]),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.version_option(package_name="slicer-llm", prog_name="slicer")
def main() -> None:
    """Make a large language model shallower and write a standard checkpoint.

    \b
    slicer convert meta-llama/Llama-2-70b-hf --drop 0.4
    slicer analyze meta-llama/Llama-2-70b-hf -o analysis
    slicer plan analysis --drop 0.4 --blocks 2
    slicer inspect Llama-2-70b-hf-48L
    """
