"""The commands `slicer eval` and `slicer report`. Heavy imports happen when a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from slicer.errors import EvaluationError, UsageError

RESULTS = click.Path(path_type=Path)


def names(text: str) -> tuple[str, ...]:
    """Split comma-separated names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL [OTHER]...")
@click.option(
    "--tasks",
    metavar="NAMES",
    help="lm-eval tasks or groups, comma-separated, with an optional number of few-shot examples (mmlu@5); "
    "c4 is the loss on text  [default: mmlu,boolq,c4; c4 for the demo model]",
)
@click.option(
    "--data", type=RESULTS, metavar="DIR",
    help="Directory of local files to use instead of the Hub: mmlu/dev and mmlu/test (CSV), boolq/dev.jsonl, "
    "TASK/SPLIT.jsonl of any task, and c4*.jsonl, .txt or .parquet for the loss.",
)  # fmt: skip
@click.option("--text", type=RESULTS, metavar="FILE",
              help="Measure the loss on this .jsonl, .txt or .parquet file.")  # fmt: skip
@click.option("--text-column", "column", metavar="NAME",
              help="Column of that file that holds the text  [default: text]")  # fmt: skip
@click.option("--num-fewshot", type=click.IntRange(min=0),
              help="Few-shot examples per question  [default: the task's]")  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N",
    help="Use the first N items of each task (as in lm_eval: of each subtask of a group) and N excerpts of text.",
)  # fmt: skip
@click.option("--backend", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True,
              help="Engine that runs the model.")  # fmt: skip
@click.option(
    "--batch-size", default="auto", show_default=True,
    help="Requests per forward pass; auto: as many as fit on a GPU, 1 on a CPU.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True,
    help="Seed of the text and of few-shot examples; 0 selects the same examples as lm_eval.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
              show_default=True, help="Precision to run in; auto: as stored.")  # fmt: skip
@click.option("--device", default="auto", show_default=True,
              help="Device to run on: auto, cpu, cuda, cuda:1.")  # fmt: skip
@click.option("-o", "--out", type=RESULTS, metavar="FILE",
              help="Write the results, with the value of every item, to FILE.")  # fmt: skip
@click.option("--write-tasks", type=RESULTS, metavar="DIR",
              help="Keep the task files made from --data in DIR, for lm_eval --include_path DIR.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate(models: tuple[str, ...], **given: Any) -> None:
    """Evaluate MODEL: lm-eval tasks, the loss on text, and the health of generated text.

    MODEL is a directory, a Hub id, "demo", or a result file of an earlier run (.json). If several are given, each is
    compared with the first, item by item, and each difference is marked as significant or within noise.

    \b
    slicer eval qwen2.5-0.5b qwen-20L --tasks mmlu@5,boolq,c4
    slicer eval before.json after.json
    """
    from slicer.checkpoint import hub
    from slicer.checkpoint.reader import Checkpoint
    from slicer.cli.render import progress as bars
    from slicer.cli.render import scores
    from slicer.evaluate.results import Evaluation, differences
    from slicer.evaluate.suite import Suite, SuiteSpec
    from slicer.evaluate.suite import evaluate as run
    from slicer.runtime.files import write_atomically

    stored = [model for model in models if model.endswith(".json")]
    to_run = [model for model in models if model not in stored]
    out = given["out"]
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise EvaluationError(f"{out}: cannot be written; pass a file in an existing directory")
    tasks, text = given["tasks"], given["text"]
    if "demo" in to_run and given["data"] is None and text is None:
        from slicer import demo

        text = demo.path().parent / "heldout.txt"
        tasks = tasks or "c4"
    if given["write_tasks"] is not None and given["data"] is None:
        raise UsageError("--write-tasks needs --data: only tasks made from local files are written")
    check_batch(given["batch_size"])
    chosen = {
        "tasks": names(tasks) if tasks is not None else None,
        "text": text,
        **{k: given[k] for k in ("data", "column", "num_fewshot", "limit", "backend", "batch_size", "seed")},
        **{k: given[k] for k in ("dtype", "device", "trust_remote_code")},
        "keep_tasks": given["write_tasks"],
    }
    options = SuiteSpec(**{k: v for k, v in chosen.items() if v is not None})
    found = {model: Evaluation.load(Path(model)) for model in stored}
    for model in to_run:  # before the tasks, which take longer to load, so that errors show early
        Checkpoint.open(hub.resolve(model).path)
    with bars.progress() as progress:
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
        scores.print_evaluations(results, compared)


def check_batch(text: str) -> None:
    """Raise UsageError unless `text` is a positive number or "auto"."""
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise UsageError(f"--batch-size {text}: pass a number of requests or auto")
