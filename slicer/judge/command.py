"""`slicer eval` and `slicer report`: options in, figures or one line of error out, imports when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from slicer.errors import EvaluationError, UsageError

_FILE = click.Path(path_type=Path)


def names(text: str) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL [OTHER]...")
@click.option(
    "--tasks",
    metavar="NAMES",
    help="lm-eval tasks or groups, comma-separated, each with its examples if you like (mmlu@5); c4 is the loss on "
    "text  [default: mmlu,boolq,c4; c4 for the demo model]",
)
@click.option(
    "--data", type=_FILE, metavar="DIR",
    help="Local files instead of the Hub's: mmlu/dev and mmlu/test (CSV), boolq/dev.jsonl, TASK/SPLIT.jsonl of any "
    "task, and c4*.jsonl, .txt or .parquet for the loss.",
)  # fmt: skip
@click.option("--text", type=_FILE, metavar="FILE", help="Measure the loss on this .jsonl, .txt or .parquet.")
@click.option("--text-column", metavar="NAME", help="Column of it that holds the text  [default: text]")
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), help="Examples before each question  [default: the task's]"
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N",
    help="Only the first N items of each task (as in lm_eval: of each subtask of a group); N excerpts for the loss.",
)  # fmt: skip
@click.option(
    "--backend",
    type=click.Choice(["hf", "vllm"]),
    default="hf",
    show_default=True,
    help="What runs the model.",
)
@click.option(
    "--batch-size", default="auto", show_default=True,
    help="Requests in a forward pass; auto: what fits on a GPU, 1 on a CPU.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True,
    help="Seed of the text and of few-shot examples; 0 takes the examples lm_eval takes.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
              show_default=True, help="Run in this precision; auto: as stored.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option(
    "-o", "--out", type=_FILE, metavar="FILE", help="Also write the results, with every item's, here."
)
@click.option("--write-tasks", type=_FILE, metavar="DIR",
              help="Keep the tasks made from --data here, for lm_eval --include_path DIR.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate(models: tuple[str, ...], **given: Any) -> None:
    """Score MODEL: tasks by lm-eval, the loss on text, the health of what it writes.

    MODEL is a directory, a Hub id, "demo", or a result written before (.json). With more than one, each is compared
    with the first, item by item, and a difference within noise is called that.

    \b
    slicer eval qwen2.5-0.5b qwen-20L --tasks mmlu@5,boolq,c4
    slicer eval before.json after.json
    """
    from slicer import console, show_scores
    from slicer.checkpoint import hub
    from slicer.checkpoint.reader import Checkpoint
    from slicer.judge.evaluate import EvalOptions, Suite
    from slicer.judge.evaluate import evaluate as run
    from slicer.judge.results import Evaluation, differences
    from slicer.runtime.files import write_atomically

    stored = [model for model in models if model.endswith(".json")]
    to_run = [model for model in models if model not in stored]
    out = given["out"]
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise EvaluationError(f"{out}: cannot be written; give a file in a directory that exists")
    tasks, text = given["tasks"], given["text"]
    if "demo" in to_run and given["data"] is None and text is None:
        from slicer import demo

        text = demo.path().parent / "heldout.txt"
        tasks = tasks or "c4"
    if given["write_tasks"] is not None and given["data"] is None:
        raise UsageError("--write-tasks: there are only tasks to write with --data")
    check_batch(given["batch_size"])
    chosen = {
        "tasks": names(tasks) if tasks is not None else None,
        "text": text,
        **{
            k: given[k]
            for k in ("data", "text_column", "num_fewshot", "limit", "backend", "batch_size", "seed")
        },
        **{k: given[k] for k in ("dtype", "device", "trust_remote_code")},
        "keep_tasks": given["write_tasks"],
    }
    options = EvalOptions(**{k: v for k, v in chosen.items() if v is not None})
    found = {model: Evaluation.load(Path(model)) for model in stored}
    for model in to_run:  # before the tasks, which take longer to load
        Checkpoint.open(hub.resolve(model).path)
    with console.progress() as progress:
        if to_run:
            with Suite(options, progress) as suite:
                for model in dict.fromkeys(to_run):
                    found[model] = run(model, suite)
    results = [found[model] for model in models]
    compared = [differences(results[0], other) for other in results[1:]]
    record = {
        "results": [result.to_dict() for result in results],
        "differences": [
            {"model": other.model, "against": results[0].model, "measures": [d.to_dict() for d in rows]}
            for other, rows in zip(results[1:], compared, strict=True)
        ],
    }
    if out is not None:
        write_atomically(out, json.dumps(record, indent=1) + "\n")
    if given["as_json"]:
        click.echo(json.dumps(record, indent=1))
    else:
        show_scores.print_evaluations(results, compared)


@click.command()
@click.argument("directory", type=_FILE, metavar="DIR")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report(directory: Path, debug: bool) -> None:
    """Write DIR/report.html, one page that needs nothing else, and DIR/report.md.

    From whatever is in DIR: a sweep, distances of layers, a bench, a sliced checkpoint with its healing.
    """
    from slicer.judge.report import write_report

    for file in write_report(directory):
        click.echo(f"written   {file}")


def check_batch(text: str) -> None:
    """Raise UsageError unless it is a number of requests, or auto."""
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise UsageError(f"--batch-size {text}: write a number of requests, or auto")
