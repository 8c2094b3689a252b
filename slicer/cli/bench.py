"""The command `slicer bench`."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from dataclasses import fields
from typing import Any

import click

from slicer.checkpoint.tensors import DTYPES
from slicer.cli import groups
from slicer.cli.groups import group, option


class _Passing(groups.Command):
    """Separates the arguments after --, which are vLLM's own flags."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        context.meta["vllm"] = tuple(args[at + 1 :])
        return super().parse_args(context, args[:at])


@groups.command(cls=_Passing, options_metavar="[OPTIONS]", epilog="Pass vLLM's own flags after --.")
@click.argument("base", required=False)
@click.argument("sliced", nargs=-1)
@group(
    "Models",
    option("--drop", "drops", metavar="LIST", show_default="without SLICED: 0, 1/6, 1/3 and 1/2 of the layers",
           help="Measure BASE without this many layers: 0,4,8,12 or 0,0.25,0.5. Needs only the config."),
    option("--model-config", "config", **groups.FILE, help="A config.json instead of BASE."),
    option("--engine", type=click.Choice(["vllm", "transformers"]), default="vllm", help="What runs the models."),
    option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", help="Precision of the models."),
    option("--kv-cache", metavar="SIZE", show_default="4 GiB on GPUs, 1 GiB on a CPU with enough memory",
           help="KV cache of each model, e.g. 1GiB."),
)  # fmt: skip
@group(
    "Load",
    option("--concurrency", metavar="LIST", show_default="1,8,32 on GPUs, 1,4 on a CPU", help="Concurrent requests."),
    option("--input-len", type=groups.POSITIVE, show_default="512 on GPUs, 128 on a CPU", help="Tokens per prompt."),
    option("--output-len", type=click.IntRange(min=2), show_default="128 on GPUs, 32 on a CPU",
           help="Tokens to generate."),
    option("--seconds", type=click.FloatRange(min=0, min_open=True), show_default="10 on GPUs, 4 on a CPU",
           help="Approximate seconds per concurrency."),
    option("--rounds", type=groups.POSITIVE, default=3, help="Number of times each model is started and measured."),
    option("--seed", type=click.IntRange(min=0), default=0, help="Seed of prompts and random weights."),
)  # fmt: skip
@group(
    "Speculative decoding",
    option("--speculative", default=False, help="Compare BASE alone with BASE and each SLICED as its draft model."),
    groups.DRAFTED,
    option("--prompts", **groups.FILE, help="Prompts, one per line."),
)  # fmt: skip
@group(
    "Output",
    groups.output_dir(help="Directory of bench.json, .csv, .md, .png and .svg, and of finished runs: the same command "
                      "resumes."),
    option("--overwrite", default=False, help="Discard the runs in the output directory."),
    groups.JSON,
)  # fmt: skip
@click.pass_context
def bench(context: click.Context, /, base: str | None, sliced: tuple[str, ...], **given: Any) -> None:
    """Measure time and memory by depth, and fit straight lines.

    \b
    slicer bench BASE SLICED...                these checkpoints
    slicer bench BASE --drop 0,4,8,12          shapes of cuts of BASE with random weights
    slicer bench --model-config config.json    the same from a config alone
    """
    from slicer.benchmarks.bench import bench as run
    from slicer.benchmarks.workload import Request
    from slicer.cli.render import progress, written
    from slicer.plan.amounts import parse_counts, parse_size

    asked = {f.name: given[f.name] for f in fields(Request) if f.name in given}
    if given["concurrency"] is not None:
        asked["concurrency"] = parse_counts(given["concurrency"], "--concurrency")
    if given["kv_cache"] is not None:
        asked["kv_cache_bytes"] = parse_size(given["kv_cache"], "--kv-cache")
    command, out = shlex.join(["slicer", *sys.argv[1:]]), given["output_dir"]
    request = Request(base, sliced, arguments=context.meta["vllm"], command=command, **asked)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job would ignore it
    with progress.bars() as bars:
        try:
            result = run(request, out, force=given["overwrite"], progress=bars)
        except KeyboardInterrupt:
            bars.close()
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
