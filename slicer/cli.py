"""The command line: options in, one line of error or a summary out. What a command needs is imported when it runs."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from slicer.benchmarks.command import bench
from slicer.errors import SlicerError
from slicer.heal.command import heal, merge, rank_options, rank_sweep_of, training_of, training_options
from slicer.judge.command import evaluate, report
from slicer.judge.sweep_command import sweep
from slicer.measure.command import analyze, calibration_options, plan, recorded_command
from slicer.serve.command import serve

# Options that do not change what is written stay out of the recorded command, so the same work has the same record.
_UNRECORDED = {"out", "force", "as_json", "dry_run", "debug", "device", "verify", "source", "memory"}


class _Group(click.Group):
    """Reports every SlicerError as one line; a traceback only with --debug."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        arguments = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in arguments
        signal.signal(signal.SIGTERM, _terminate)
        try:
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
            _fail(
                "out of memory; name the layers (--drop 24-31) or use --strategy deepest, and --verify load",
                1,
            )
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if debug:
                raise
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            _fail(f"{type(error).__name__}: {reason} (run again with --debug for the traceback)", 1)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    sys.exit(143)  # as an exception, so that temporary directories are removed


def _fail(message: str, code: int) -> NoReturn:
    click.echo("slicer: " + " ".join(message.split()), err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="slicer-llm", prog_name="slicer")
def main() -> None:
    """Make a large language model shallower and leave it a standard checkpoint.

    \b
    slicer convert meta-llama/Llama-2-70b-hf --drop 0.4
    slicer analyze meta-llama/Llama-2-70b-hf -o analysis
    slicer plan analysis --drop 0.4 --blocks 2
    slicer inspect Llama-2-70b-hf-48L
    """


@main.command()
@click.argument("source")
@click.option(
    "--drop", metavar="AMOUNT", help="Fraction 0.4, count 8, block 24-31 (inclusive) or list 3,7,9-12."
)
@click.option("--keep", type=int, metavar="LAYERS", help="Keep this many layers.")
@click.option(
    "--max-params", metavar="SIZE", help="Drop as few layers as bring the parameters to SIZE, e.g. 5B."
)
@click.option(
    "--max-bytes", metavar="SIZE", help="Drop as few layers as bring the weights to SIZE, e.g. 16GB."
)
@click.option(
    "--drop-attention",
    metavar="AMOUNT",
    help="Attention of so many layers (as in --drop), beside --drop or alone: their keys and values are not cached.",
)
@click.option("--drop-ffn", metavar="AMOUNT", help="Feed-forward part of so many layers, likewise.")
@click.option("--drop-sublayers", metavar="AMOUNT", help="So many of either, whichever changes least.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Replay a saved plan.json.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Output directory  [default: SOURCE's name-LAYERSL]"
)
@click.option(
    "--strategy",
    type=click.Choice(["similarity", "deepest", "tail"]),
    default="similarity",
    show_default=True,
    help="similarity: the block whose ends lie closest (angular distance). deepest: the last layers but the final "
    "one. tail: the last layers.",
)
@click.option(
    "--offset",
    type=click.Choice(["auto", "whole", "half"]),
    default="auto",
    show_default=True,
    help="Cut whole layers, or half-offset: from after one attention to after another, joined to the "
    "feed-forward part that follows. auto: whichever is closer (whole for --fold transform and training).",
)
@click.option(
    "--format",
    type=click.Choice(["native", "blockwise", "zeroed"]),
    help="How layers without attention or feed-forward part are written. blockwise: vLLM's DeciLM form (Llama, "
    "Mistral, Qwen2); transformers needs 'import slicer'. zeroed: output matrix zero; loads everywhere, saves nothing  "
    "[default: native, blockwise where a part is missing]",
)
@calibration_options
@click.option(
    "--heal",
    type=click.Choice(["none", "auto", "fold", "qlora", "lora", "full"]),
    help="Close the cut: fold solves the weights around it again, in closed form, on the calibration data; auto does "
    "so where there is such data and it helps; qlora, lora and full train from there, as in heal. none: keep every "
    "byte  [default: auto, or as --plan was]",
)
@click.option(
    "--fold",
    type=click.Choice(["resolve", "transform"]),
    default="resolve",
    show_default=True,
    help="resolve: the output matrices themselves, by ridge regression. transform: only a linear map behind the "
    "feed-forward part (ReplaceMe).",
)
@training_options
@rank_options
@click.option(
    "--emulate",
    type=click.Choice(["bias", "linear"]),
    help="Let something small stand for what is removed, solved in closed form on the calibration data: a constant "
    "(bias) or a low-rank map (linear, needs --rank).",
)
@click.option(
    "--emulate-steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Then train that, and nothing else, for so many steps; the best by held-out loss is kept.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest weight file."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Cast the weights (and measure with them)  [default: as stored, bit for bit]",
)
@click.option(
    "--device", default="auto", show_default=True, help="Where the model runs: auto, cpu, cuda, cuda:1."
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory for the weights, e.g. 8GB; a larger model is read from disk layer by layer  [default: what is free]",
)
@click.option(
    "--verify",
    type=click.Choice(["auto", "none", "load", "logits"]),
    default="auto",
    show_default=True,
    help="Check before the output appears: every key and shape (load), and the logits against the source with those "
    "layers bypassed (logits). auto: logits while the model fits in memory.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan, sizes and FLOPs a token; write nothing.")
@click.option("--force", is_flag=True, help="Replace the output directory if it holds a checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def convert(source: str, **given: Any) -> None:
    """Drop layers of SOURCE and write a standard checkpoint.

    SOURCE is a directory, a Hub id (org/name or org/name@revision), or "demo", the embedded model.
    """
    from slicer import console
    from slicer.convert import convert as run
    from slicer.measure.calibration import CalibrationSpec
    from slicer.options import Options
    from slicer.plan.amounts import parse_goal, parse_size
    from slicer.plan.plan import Plan

    whole = ("drop", "keep", "max_params", "max_bytes")
    goal = parse_goal(
        **{name: given[name] for name in (*whole, "drop_attention", "drop_ffn", "drop_sublayers")}
    )
    saved = Plan.load(given["plan_file"]) if given["plan_file"] is not None else None
    calibration = given["calibration"] or ("self" if source == "demo" and saved is None else None)
    chosen = {
        k: given[k]
        for k in ("samples", "seq_len", "batch_size", "seed", "text_column")
        if given[k] is not None
    }
    options = Options(
        strategy=given["strategy"],
        calibration=CalibrationSpec(source=calibration, **chosen),
        verify=given["verify"],
        dtype=given["dtype"],
        device=given["device"],
        memory=parse_size(given["memory"], "--memory") if given["memory"] is not None else None,
        heal=given["heal"],
        fold=given["fold"],
        training=training_of({**given, "rank": None} if given["emulate"] else given, given["heal"], "--heal"),
        save_adapter=given["save_adapter"],
        rank_sweep=rank_sweep_of(given) if given["rank_sweep"] is not None else None,
        format=given["format"],
        offset=given["offset"],
        emulate=given["emulate"],
        rank=given["rank"] if given["emulate"] else None,
        emulate_steps=given["emulate_steps"],
        max_shard_bytes=parse_size(given["max_shard_size"], "--max-shard-size"),
        force=given["force"],
        dry_run=given["dry_run"],
        trust_remote_code=given["trust_remote_code"],
        command=recorded_command(_UNRECORDED),
    )
    with console.progress() as progress:
        summary = run(source, goal, given["out"], options, plan=saved, progress=progress)
    if given["as_json"]:
        click.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        console.print_summary(summary)


@main.command()
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(source: str, as_json: bool, debug: bool) -> None:
    """Show what SOURCE is: architecture, depth, sizes, costs, and what was sliced off it."""
    from slicer import console
    from slicer.inspect import inspect as look

    found = look(source)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        console.print_inspection(found)


@main.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Keep the sliced model here.")
@click.option(
    "--drop", metavar="AMOUNT", default="3", show_default=True, help="How much to drop, as in convert."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def demo(out: Path | None, drop: str, debug: bool) -> None:
    """Slice the embedded model and let both write a line."""
    from slicer import console
    from slicer.demo.show import show

    with console.progress() as progress:
        shown = show(drop, out, progress)
    console.print_demo(shown)


main.add_command(analyze)
main.add_command(plan)
main.add_command(heal)
main.add_command(evaluate)
main.add_command(sweep)
main.add_command(report)
main.add_command(merge)
main.add_command(serve)
main.add_command(bench)
