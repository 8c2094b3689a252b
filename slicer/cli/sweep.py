"""The command `slicer sweep`. Heavy imports happen when it runs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from slicer.cli import groups
from slicer.cli.eval import machine_options, measured_options, names, suite_of
from slicer.cli.groups import FILE, expert, group, option
from slicer.cli.training import from_file, training_of, training_options
from slicer.data.sources import TextSpec
from slicer.errors import EvaluationError, UsageError
from slicer.plan.amounts import parse_counts

# for experts: a grid of the paper's needs few of them
_HIDDEN = ("--text", "--column", "--num-fewshot", "--seed", "--batch-size", "--dtype")


def _options_by_name(command: click.Command) -> dict[str, click.Parameter]:
    return {
        p.opts[-1].lstrip("-").replace("-", "_"): p
        for p in command.params
        if isinstance(p, click.Option) and p.expose_value and not p.is_eager
    }


GRID = option(
    "--grid", **FILE, is_eager=True, callback=lambda context, _, file: from_file(context, file, _options_by_name),
    help="YAML file with values for the options of this command, by name; options override it.",
)  # fmt: skip


@groups.command()
@click.argument("source")
@group(
    "Grid",
    GRID,
    option("--drop", metavar="AMOUNTS", default="0:0.5:0.05",
           help="Layers to drop: fractions 0:0.5:0.05 or 0.1,0.25; counts 0,2,4 or 0:8:2."),
    option("--strategies", metavar="NAMES", default="similarity,deepest",
           help="Comma-separated: similarity, deepest, tail, random."),
    option("--heal", "heals", metavar="NAMES", default="none",
           help="Comma-separated: none, fold (closed form), qlora, qlora@RANK."),
    option("--seeds", metavar="NUMBERS", default="0", help="Seeds of the random strategy and of trained healing."),
    option("--retain", type=float, metavar="SHARE",
           help="Instead of a grid: the deepest cut that keeps this share of --metric, as plan.json."),
    option("--metric", metavar="TASK", show_default="the first task", help="Task that --retain measures."),
    expert("--suite", type=click.Choice(["paper"]),
           help="paper: both strategies, bare and healed; mmlu@5, boolq, c4 (figures 1d, 2, 3, 5, 6)."),
    expert("--ablate", type=click.Choice(["prompt", "shots", "seed", "rank"]),
           help="With --suite paper: run figure 7 (prompt, shots), 8 (seed) or 9 (rank) instead."),
)  # fmt: skip
@measured_options(_HIDDEN)
@group(
    "Calibration and training",
    option("--calibration", metavar="DATA", show_default="text of --data",
           help="Text for similarity and healing, as in convert."),
    expert("--samples", type=groups.POSITIVE, show_default=str(TextSpec.samples), help="Calibration sequences."),
    expert("--seq-len", type=click.IntRange(min=2), show_default=str(TextSpec.seq_len),
           help="Tokens per calibration sequence."),
    *training_options(),
)  # fmt: skip
@group(
    "Output",
    groups.output_dir(help="Directory of the sweep; a second run resumes it.", show_default="SOURCE's name-sweep"),
    groups.JSON,
)  # fmt: skip
@group("Machine", *machine_options(_HIDDEN))
def sweep(source: str, **given: Any) -> None:
    """Evaluate SOURCE at every depth, strategy and healing of a grid.

    Finished cells are stored; run the same command again to resume. Several processes, also on machines that share
    DIR, divide the cells among themselves.

    \b
    slicer sweep demo --drop 0:6:2 --limit 20
    slicer sweep qwen2.5-0.5b --drop 0:0.5:0.05 --tasks mmlu,boolq,c4 --limit 100
    slicer sweep qwen2.5-0.5b --grid sweep.yaml
    slicer sweep qwen2.5-0.5b --retain 0.98 --metric mmlu
    accelerate launch --num_processes 8 -m slicer sweep llama-2-70b --suite paper
    """
    from slicer.cli.render import progress, scores
    from slicer.heal.finetune.settings import Training
    from slicer.runtime.distributed import first_process
    from slicer.runtime.files import write_atomically
    from slicer.sweep import bisect, grid
    from slicer.sweep.run import SweepRequest, open_sweep, record_cells, run_cells
    from slicer.sweep.table import read_table, to_csv, to_dict

    if given["ablate"] and not given["suite"]:
        raise UsageError("--ablate needs --suite paper")
    if given["metric"] and given["retain"] is None:
        raise UsageError("--metric needs --retain")
    seeds = parse_counts(given["seeds"], "--seeds", least=0)
    axes = grid.Grid(given["drop"], names(given["strategies"]), names(given["heals"]), seeds)
    tasks: tuple[str, ...] = ()
    if given["suite"]:
        axes, tasks = grid.paper(given["ablate"], axes, groups.explicit())
    options = suite_of(given, source == "demo", tasks, share_limit=True)
    metric = bisect.check(given["retain"], given["metric"], options.tasks) if given["retain"] is not None else None
    calibration = given["calibration"] or _calibration(source, given["data"], options.text)
    named = ("samples", "seq_len", "seed", *(["column"] if given["calibration"] is not None else []))
    text = TextSpec(source=calibration, **{k: given[k] for k in named if given[k] is not None})
    command = groups.recorded_command({"as_json", "debug", "grid"}, defaults=True)
    trains = any(heal.startswith("qlora") for heal in axes.heals)
    training = training_of(given, "qlora" if trains else None, "--heal") or Training()
    directory = given["output_dir"] or Path(f"{Path(source).name or 'model'}-sweep")
    request = SweepRequest(source, directory, options, text, training, command)
    found = None
    with progress.bars() as bars, open_sweep(request, bars) as running:
        if metric is None:
            cells = grid.cells(axes, running.depth)
            record_cells(running.store, cells, command)
            run_cells(running, cells)
        elif first_process():  # bisection is sequential: there is nothing to share
            found = bisect.deepest_cut(running, given["retain"], metric, axes, command)
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
            scores.print_kept(found, given["retain"], metric, directory / "plan.json", source)


def _calibration(source: str, data: Path | None, text: Path | None) -> str | None:
    """Default of --calibration: text of --data that the loss is not measured on, else the demo model's own text."""
    from slicer.evaluate import loss

    if data is None:
        return "self" if source == "demo" else None
    with contextlib.suppress(EvaluationError):
        text = text or loss.find_text(data)
    found = loss.other_text(data, text)
    return str(found) if found else "self"
