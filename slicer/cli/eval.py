"""The command `slicer eval`, and the options of what to measure that sweep has too."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicer.checkpoint.tensors import DTYPES
from slicer.cli import groups
from slicer.cli.groups import Decorator, group, option
from slicer.errors import EvaluationError, UsageError

if TYPE_CHECKING:
    from slicer.evaluate.suite import SuiteSpec


def names(text: str) -> tuple[str, ...]:
    """Split comma-separated names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def measured_options(hidden: Collection[str] = ()) -> Decorator:
    """What to measure, of eval and sweep; the options in `hidden` are for experts."""

    def one(name: str, *more: str, **settings: Any) -> Decorator:
        return option(name, *more, hidden=name in hidden, **settings)

    return group(
        "What to measure",
        one("--tasks", metavar="NAMES", show_default="mmlu,boolq,c4; c4 for the demo model",
            help="lm-eval tasks or groups, comma-separated, with an optional number of few-shot examples (mmlu@5); c4 "
            "is the loss on text."),
        one("--data", **groups.DIRECTORY, show_default="the Hub's",
            help="Directory of local files: mmlu/dev and mmlu/test (CSV), boolq/dev.jsonl, TASK/SPLIT.jsonl of any "
            "task, and c4*.jsonl, .txt or .parquet for the loss."),
        one("--text", **groups.FILE, help="Measure the loss on this .jsonl, .txt or .parquet file."),
        one("--column", metavar="NAME", show_default="text", help="Column of the files that holds the text."),
        one("--num-fewshot", type=click.IntRange(min=0), metavar="N", show_default="the task's",
            help="Few-shot examples per question."),
        one("--limit", type=groups.POSITIVE, metavar="N",
            help="Use N items of each task and N excerpts of text. eval takes the first N of each subtask of a group, "
            "as lm_eval; sweep divides N among the subtasks."),
        one("--seed", type=click.IntRange(min=0), default=0,
            help="Seed of the text, of few-shot examples and of shared limits; 0 gives lm_eval's examples."),
    )  # fmt: skip


def machine_options(hidden: Collection[str] = ()) -> list[Decorator]:
    """Where and how models run, of eval and sweep."""
    return [
        option("--batch-size", default="auto", hidden="--batch-size" in hidden,
               help="Requests per forward pass; auto: as many as fit on a GPU, 1 on a CPU."),
        option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", hidden="--dtype" in hidden,
               help="Precision to run in; auto: as stored, for a sweep float32 on a CPU where that is faster."),
        groups.DEVICE,
        groups.TRUST,
    ]  # fmt: skip


@groups.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL [OTHER]...")
@measured_options()
@group(
    "Output",
    groups.output_file(help="Write the results, with the value of every item, to FILE."),
    option("--write-tasks", **groups.DIRECTORY,
           help="Keep the task files made from --data in DIR, for lm_eval --include_path DIR."),
    groups.JSON,
)  # fmt: skip
@group(
    "Machine",
    option("--backend", type=click.Choice(["hf", "vllm"]), default="hf", help="Engine that runs the model."),
    *machine_options(),
)  # fmt: skip
def evaluate(models: tuple[str, ...], **given: Any) -> None:
    """Evaluate MODEL: lm-eval tasks, loss on text, generated text.

    MODEL is a directory, a Hub id, "demo", or a result file of an earlier run (.json). If several are given, each is
    compared with the first, item by item, and each difference is marked as significant or within noise.

    \b
    slicer eval demo --limit 20
    slicer eval qwen2.5-0.5b qwen-20L --tasks mmlu@5,boolq,c4
    slicer eval before.json after.json
    """
    from slicer.checkpoint import hub
    from slicer.checkpoint.reader import Checkpoint
    from slicer.cli.render import progress, scores
    from slicer.evaluate.results import Evaluation, differences
    from slicer.evaluate.suite import Suite
    from slicer.evaluate.suite import evaluate as run
    from slicer.runtime.files import write_atomically

    stored = [model for model in models if model.endswith(".json")]
    to_run = [model for model in models if model not in stored]
    out = given["output_file"]
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise EvaluationError(f"{out}: cannot be written; pass a file in an existing directory")
    if given["write_tasks"] is not None and given["data"] is None:
        raise UsageError("--write-tasks needs --data: only tasks made from local files are written")
    options = suite_of(given, "demo" in to_run, backend=given["backend"], keep_tasks=given["write_tasks"])
    found = {model: Evaluation.load(Path(model)) for model in stored}
    for model in to_run:  # before the tasks, which take longer to load, so that errors show early
        Checkpoint.open(hub.resolve(model).path)
    with progress.bars() as bars:
        if to_run:
            with Suite(options, bars) as suite:
                for model in dict.fromkeys(to_run):
                    found[model] = run(model, suite)
    results = [found[model] for model in models]
    compared = [differences(results[0], other) for other in results[1:]]
    differ = [
        {"model": other.model, "against": results[0].model, "measures": [d.to_dict() for d in rows]}
        for other, rows in zip(results[1:], compared, strict=True)
    ]
    text = json.dumps({"results": [result.to_dict() for result in results], "differences": differ}, indent=1)
    if out is not None:
        write_atomically(out, text + "\n")
    if given["as_json"]:
        click.echo(text)
    else:
        scores.print_evaluations(results, compared)


def suite_of(given: Mapping[str, Any], demo: bool, tasks: tuple[str, ...] = (), **more: Any) -> SuiteSpec:
    """What to measure, from the options of eval and sweep. `tasks`: the default tasks.

    `demo`: the embedded model is among the models; by default it is measured on embedded text, without network.
    Raises UsageError for an invalid batch size.
    """
    from slicer.checkpoint.hub import DEMO
    from slicer.evaluate.suite import SuiteSpec

    batch_size, text = given["batch_size"], given["text"]
    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size) > 0):
        raise UsageError(f"--batch-size {batch_size}: pass a number of requests or auto")
    if demo and given["data"] is None and text is None:
        text, tasks = DEMO.parent / "heldout.txt", tasks or ("c4",)
    named = None if given["tasks"] is None else names(given["tasks"])
    same = ("data", "column", "num_fewshot", "limit", "batch_size", "seed", "dtype", "device", "trust_remote_code")
    chosen = {**{k: given[k] for k in same}, **more, "text": text, "tasks": named or tasks or named}
    return SuiteSpec(**{k: v for k, v in chosen.items() if v is not None})
