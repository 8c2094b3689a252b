"""The command `slicer sweep`. Heavy imports happen when it runs."""

from __future__ import annotations

import contextlib
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from slicer.cli.eval import check_batch, names
from slicer.cli.groups import training_of, training_options
from slicer.errors import EvaluationError, UsageError
from slicer.plan.amounts import parse_counts

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("source")
@click.option("-o", "--out", type=_FILE, metavar="DIR",
              help="Directory of the sweep; a second run resumes it  [default: SOURCE's name-sweep]")  # fmt: skip
@click.option(
    "--drop", metavar="AMOUNTS", default="0:0.5:0.05", show_default=True,
    help="Layers to drop: fractions 0:0.5:0.05 or 0.1,0.25; counts 0,2,4 or 0:8:2.",
)  # fmt: skip
@click.option("--strategies", metavar="NAMES", default="similarity,deepest", show_default=True,
              help="Comma-separated: similarity, deepest, tail, random.")  # fmt: skip
@click.option("--heal", "heals", metavar="NAMES", default="none", show_default=True,
              help="Comma-separated: none, fold (closed form), qlora, qlora@RANK.")  # fmt: skip
@click.option("--seeds", metavar="NUMBERS", default="0", show_default=True,
              help="Seeds of the random strategy and of trained healing.")  # fmt: skip
@click.option("--keep", type=float, metavar="SHARE",
              help="Instead of a grid: the deepest cut that retains this share of --metric, as plan.json.")  # fmt: skip
@click.option("--metric", metavar="TASK", help="Task that --keep measures  [default: the first task]")
@click.option("--suite", type=click.Choice(["paper"]),
              help="paper: both strategies, bare and healed; mmlu@5, boolq, c4 (figures 1d, 2, 3, 5, 6).")  # fmt: skip
@click.option("--ablate", type=click.Choice(["prompt", "shots", "seed", "rank"]),
              help="With --suite paper: run figure 7 (prompt, shots), 8 (seed) or 9 (rank) instead.")  # fmt: skip
@click.option("--tasks", metavar="NAMES",
              help="Tasks, as in eval  [default: mmlu,boolq,c4; c4 for the demo model]")  # fmt: skip
@click.option("--data", type=_FILE, metavar="DIR", help="Directory of local files, as in eval.")
@click.option("--text", type=_FILE, metavar="FILE", help="File to measure the loss on.")
@click.option("--text-column", "column", metavar="NAME",
              help="Column that holds the text in --text and --calibration  [default: text]")  # fmt: skip
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Few-shot examples per question.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N",
              help="Use N items of each task; a group such as mmlu divides them among its subtasks.")  # fmt: skip
@click.option("--calibration", metavar="DATA",
              help="Text for similarity and healing, as in convert  [default: text of --data]")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=1), help="Calibration sequences.")
@click.option("--seq-len", type=click.IntRange(min=2), help="Tokens per calibration sample.")
@click.option("--batch-size", default="auto", show_default=True,
              help="Requests per forward pass, as in eval.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Seed of the text, the items and the calibration sample.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
              show_default=True,
              help="Precision to run in; auto: as stored, or float32 on a CPU where it is faster.")  # fmt: skip
@click.option("--device", default="auto", show_default=True,
              help="Device to run on: auto, cpu, cuda, cuda:1.")  # fmt: skip
@training_options
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def sweep(source: str, **given: Any) -> None:
    """Evaluate SOURCE at every depth, strategy and healing method of a grid.

    Finished cells are stored; run the same command again to resume. Several processes, also on machines that share
    DIR, divide the cells among themselves:

    \b
    slicer sweep qwen2.5-0.5b --drop 0:0.5:0.05 --tasks mmlu,boolq,c4 --limit 100
    slicer sweep qwen2.5-0.5b --keep 0.98 --metric mmlu
    accelerate launch --num_processes 8 -m slicer sweep llama-2-70b --suite paper
    """
    from slicer.cli.render import progress as bars
    from slicer.cli.render import scores
    from slicer.data.sources import TextSpec
    from slicer.evaluate.suite import SuiteSpec
    from slicer.heal.finetune.settings import Training
    from slicer.runtime.distributed import first_process
    from slicer.runtime.files import write_atomically
    from slicer.sweep import bisect, grid
    from slicer.sweep.bisect import deepest_cut
    from slicer.sweep.run import Sweep, SweepOptions, record_cells
    from slicer.sweep.table import read_table, to_csv, to_dict

    context = click.get_current_context()
    typed = {
        name for name in context.params
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }  # fmt: skip
    if given["ablate"] and not given["suite"]:
        raise UsageError("--ablate needs --suite paper")
    if given["metric"] and given["keep"] is None:
        raise UsageError("--metric needs --keep")
    check_batch(given["batch_size"])
    axes = grid.Grid(
        given["drop"],
        names(given["strategies"]),
        names(given["heals"]),
        parse_counts(given["seeds"], "--seeds", least=0),
    )
    tasks = names(given["tasks"]) if given["tasks"] is not None else None
    if given["suite"]:
        axes, preset = grid.paper(given["ablate"], axes, typed)
        tasks = tasks or preset
    text = given["text"]
    if source == "demo" and given["data"] is None and text is None:
        from slicer import demo

        text = demo.path().parent / "heldout.txt"
        tasks = tasks or ("c4",)
    chosen = {
        "tasks": tasks,
        "text": text,
        **{k: given[k] for k in ("data", "column", "num_fewshot", "limit", "batch_size", "seed")},
        **{k: given[k] for k in ("dtype", "device", "trust_remote_code")},
        "share_limit": True,
    }
    options = SuiteSpec(**{k: v for k, v in chosen.items() if v is not None})
    metric = (
        bisect.check(given["keep"], given["metric"], options.tasks) if given["keep"] is not None else None
    )
    calibration = given["calibration"] or _calibration(source, given["data"], text)
    named = ("samples", "seq_len", "seed", *(["column"] if given["calibration"] is not None else []))
    spec = {k: given[k] for k in named if given[k] is not None}
    command = shlex.join(["slicer", *_typed(context, typed)])
    trains = any(heal.startswith("qlora") for heal in axes.heals)
    training = training_of(given, "qlora" if trains else None, "--heal") or Training()
    settings = SweepOptions(options, TextSpec(source=calibration, **spec), training, command)
    directory = given["out"] or Path(f"{Path(source).name or 'model'}-sweep")
    found = None
    with bars.progress() as progress, Sweep(source, directory, settings, progress) as running:
        if metric is None:
            cells = grid.cells(axes, running.depth)
            record_cells(running.journal, cells, command)
            running.run(cells)
        elif first_process():  # bisection is sequential: there is nothing to share
            found = deepest_cut(running, given["keep"], metric, axes, command)
    if not first_process():
        return
    table = read_table(directory)
    write_atomically(directory / "table.csv", to_csv(table))
    if given["as_json"]:
        record = to_dict(table) | {"keep": found and asdict(found)}
        click.echo(json.dumps(record, indent=1))
    else:
        scores.print_sweep(table, directory)
        if found is not None and metric is not None:
            scores.print_kept(found, given["keep"], metric, directory / "plan.json", source)


def _calibration(source: str, data: Path | None, text: Path | None) -> str | None:
    """Default of --calibration: text of --data that the loss is not measured on, else the demo model's own text."""
    from slicer.evaluate import loss

    if data is None:
        return "self" if source == "demo" else None
    with contextlib.suppress(EvaluationError):
        text = text or loss.find_text(data)
    found = loss.other_text(data, text)
    return str(found) if found else "self"


def _typed(context: click.Context, typed: set[str]) -> list[str]:
    """The words of the command line, in the order of the help and with paths, for the record."""
    words = [context.command.name or "", str(context.params["source"])]
    for parameter in context.command.params:
        name = parameter.name or ""
        if isinstance(parameter, click.Option) and name in typed and name not in ("as_json", "debug"):
            value = context.params[name]
            words += [parameter.opts[-1]] if value is True else [parameter.opts[-1], str(value)]
    return words
