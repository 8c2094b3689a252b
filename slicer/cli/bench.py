"""The command `slicer bench`."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import click


class _Passing(click.Command):
    """Separates the arguments after --, which are vLLM's own flags."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        context.meta["vllm"] = tuple(args[at + 1 :])
        return super().parse_args(context, args[:at])


@click.command(cls=_Passing, options_metavar="[OPTIONS]", epilog="Pass vLLM's own flags after --.")
@click.argument("base", required=False)
@click.argument("sliced", nargs=-1)
@click.option("--drop", metavar="LIST",
              help="Measure BASE without this many layers: 0,4,8,12 or 0,0.25,0.5. Needs only the config; writes no "
              "checkpoint  [default, without SLICED: 0, 1/6, 1/3 and 1/2 of them]")  # fmt: skip
@click.option("--config", type=click.Path(path_type=Path), help="A config.json instead of BASE.")
@click.option("--engine", type=click.Choice(["vllm", "transformers"]), default="vllm", show_default=True)
@click.option("--concurrency", metavar="LIST",
              help="Concurrent requests  [default: 1,4 on a CPU, 1,8,32 on GPUs]")  # fmt: skip
@click.option("--input-len", type=click.IntRange(min=1),
              help="Tokens per prompt  [default: 128 on a CPU, 512 on GPUs]")  # fmt: skip
@click.option("--output-len", type=click.IntRange(min=2),
              help="Tokens to generate  [default: 32 on a CPU, 128 on GPUs]")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True),
              help="Approximate seconds per concurrency  [default: 4 on a CPU, 10 on GPUs]")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True,
              help="Number of times each model is started and measured.")  # fmt: skip
@click.option("--kv-cache", metavar="SIZE", help="KV cache of each model, e.g. 1GiB  [default: 1 GiB on a "
              "CPU with enough memory, 4 GiB on GPUs]")  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--speculative", is_flag=True,
              help="Compare BASE alone with BASE and each SLICED as its draft model.")  # fmt: skip
@click.option("--num-speculative-tokens", type=click.IntRange(min=1), default=3, show_default=True,
              help="Tokens to draft per step.")  # fmt: skip
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts for --speculative, one per line.")
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Directory for bench.json, .csv, .md, .png and .svg. Finished runs are stored in it: the same "
              "command resumes.")  # fmt: skip
@click.option("--force", is_flag=True, help="Discard the runs in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print the content of bench.json.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def bench(context: click.Context, /, base: str | None, sliced: tuple[str, ...], **given: Any) -> None:
    """Measure time and memory by depth, and fit straight lines.

    \b
    slicer bench BASE SLICED...              these checkpoints
    slicer bench BASE --drop 0,4,8,12        shapes of cuts of BASE with random weights
    slicer bench --config config.json        the same from a config alone
    """
    from slicer.benchmarks.bench import Request
    from slicer.benchmarks.bench import bench as run
    from slicer.cli.render import progress as bars
    from slicer.cli.render import written
    from slicer.plan.amounts import parse_counts, parse_size

    request = Request(
        base=base,
        sliced=sliced,
        drops=given["drop"],
        config=given["config"],
        engine=given["engine"],
        dtype=given["dtype"],
        input_len=given["input_len"],
        output_len=given["output_len"],
        concurrency=None
        if given["concurrency"] is None
        else parse_counts(given["concurrency"], "--concurrency"),
        seconds=given["seconds"],
        rounds=given["rounds"],
        kv_cache_bytes=None if given["kv_cache"] is None else parse_size(given["kv_cache"], "--kv-cache"),
        seed=given["seed"],
        speculative=given["speculative"],
        speculative_tokens=given["num_speculative_tokens"],
        prompts=given["prompts"],
        arguments=context.meta["vllm"],
        command=shlex.join(["slicer", *sys.argv[1:]]),
    )
    out: Path | None = given["out"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job would ignore it
    with bars.progress() as progress:
        try:
            result = run(request, out, force=given["force"], progress=progress)
        except KeyboardInterrupt:
            progress.close()
            kept = f"; finished runs are in {out}: run the same command to resume" if out is not None else ""
            click.echo(f"stopped{kept}", err=True)
            sys.exit(130)
    if given["as_json"]:
        click.echo(json.dumps(result, indent=2, default=str))
        return
    from slicer.benchmarks.page import tables

    written.print_tables(tables(result))
    click.echo(result["verdict"])
    if out is not None:
        click.echo(f"written   {out}")
