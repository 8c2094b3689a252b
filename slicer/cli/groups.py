"""`slicer heal` and `slicer merge`: options in, a summary or one line of error out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from slicer.heal.finetune.settings import Training
    from slicer.sweep.ranks import RankSearch


_POSITIVE, _COUNT, _FLOAT = click.IntRange(min=1), click.IntRange(min=0), click.FLOAT
# option, the field of Training (None: of another name than the option's), its type, its help
_TRAINING: tuple[tuple[str, str | None, Any, str], ...] = (
    ("--start", None, click.Choice(["fold", "cut"]), "Train from the folded weights, or from the source's own  "
     "[default: fold, where the cut can be folded]"),
    ("--preset", None, click.Choice(["paper"]), "Values not given: the paper's table by model; for others that of the "
     "nearest by size  [default: paper]"),
    ("--steps", None, _POSITIVE, "Optimizer steps  [default: 5000]"),
    ("--train-batch-size", "batch_size", _POSITIVE, "Sequences of a step, over all processes  [default: 16]"),
    ("--micro-batch", None, _POSITIVE, "Sequences of one pass; the rest of a step is accumulated  [default: as many as "
     "have 4096 tokens]"),
    ("--train-seq-len", "seq_len", click.IntRange(min=2), "Tokens in each sequence  [default: 2048, or 4096 from 13B]"),
    ("--lr", None, _FLOAT, "Peak learning rate  [default: by model]"),
    ("--scheduler", None, click.Choice(["cosine", "linear", "constant", "constant_with_warmup"]),
     "How the learning rate falls  [default: cosine]"),
    ("--warmup", None, _COUNT, "Steps in which it rises  [default: 100, at most a tenth of the steps]"),
    ("--weight-decay", None, _FLOAT, "AdamW's  [default: 0]"),
    ("--rank", None, _POSITIVE, "Rank of the adapters  [default: by model]; of the maps of --emulate linear"),
    ("--alpha", None, _FLOAT, "Scale of the adapters, in units of the rank  [default: the rank]"),
    ("--dropout", None, _FLOAT, "Dropout of the adapters' input  [default: 0.05]"),
    ("--validation", None, str, "Text to measure the loss on, as --calibration; never trained on  [default: one "
     "document in 16 of the training text, set apart]"),
    ("--validation-samples", None, _POSITIVE, "Sequences of it  [default: 16]"),
    ("--eval-every", None, _POSITIVE, "Steps between two measurements, and two checkpoints  [default: a tenth of all]"),
    ("--patience", None, _COUNT, "Stop after so many measurements without a new best; 0: never  [default: 5]"),
    ("--compute", None, click.Choice(["auto", "float32", "bfloat16"]), "Precision of the arithmetic  [default: float32 "
     "on a CPU, bfloat16 on a GPU]"),
    ("--teacher", None, str, "A model to learn from as well  [default: the source, where a weight below is given]"),
    ("--mismatch-weight", None, _FLOAT, "Weight of the paper's equation 8: the distance to the teacher's residual "
     "stream behind each cut  [default: 0]"),
    ("--kl-weight", None, _FLOAT, "Weight of the divergence from the teacher's predictions  [default: 0]"),
    ("--teacher-cache", None, str, "Directory: let the teacher answer beforehand, once, from disk layer by layer where "
     "it does not fit  [default: it runs beside]"),
    ("--report-to", None, str, "Trackers of the Trainer, such as tensorboard or wandb  [default: none]"),
)  # fmt: skip


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of healing that trains: of convert and heal alike."""
    more = {"--start": ("--train-from", "start")}  # torchrun takes --start for an option of its own
    words = {"--validation": "DATA", "--teacher": "SOURCE", "--teacher-cache": "DIR", "--report-to": "NAMES"}
    options = [
        click.option(name, *more.get(name, ()), type=kind, help=text, metavar=words.get(name))
        for name, _, kind, text in _TRAINING
    ]
    options += [
        click.option("--teacher-4bit", is_flag=True, help="Run the teacher in NF4."),
        click.option(
            "--gradient-checkpointing",
            is_flag=True,
            help="Compute activations twice: less memory, a third more time.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def rank_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of healing that trains which a sweep has in its grid: of convert and heal."""
    options = [
        click.option(
            "--rank-sweep",
            metavar="RANKS",
            help="Pick the rank among these, such as 2,8,64, as the paper did: the largest, unless healing with it is "
            "significantly worse than none; then the best of all.",
        ),
        click.option(
            "--rank-metric",
            metavar="TASK",
            help="What to pick it by: an lm-eval task, or loss  [default: mmlu]",
        ),
        click.option(
            "--rank-data",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Local files of that task, as in eval.",
        ),
        click.option("--rank-limit", type=_POSITIVE, metavar="N", help="N items of that task."),
        click.option(
            "--save-adapter",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Keep the adapter here as well, and in DIR/base the weights it belongs to, where it was trained on a "
            "fold.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def training_of(given: dict[str, Any], method: str | None, option: str) -> Training | None:
    """What the options of `training_options` ask for; None where `method` does not train. Raises UsageError where they
    are given although it does not."""
    from slicer.errors import UsageError
    from slicer.heal.finetune.settings import METHODS, Training

    names = {name.lstrip("-").replace("-", "_"): field for name, field, _, _ in _TRAINING}
    chosen = {field or name: given[name] for name, field in names.items() if given[name] is not None}
    flags = {name: given[name] for name in ("teacher_4bit", "gradient_checkpointing")}
    if method not in METHODS:
        for name in (*names, *flags, "save_adapter", "rank_sweep", "rank_metric", "rank_data", "rank_limit"):
            if given.get(name) not in (None, False):
                or_emulate = ", or with --emulate linear" if name == "rank" and "emulate" in given else ""
                raise UsageError(
                    f"--{name.replace('_', '-')}: give it with {option} {', '.join(METHODS)}{or_emulate}"
                )
        return None
    if given.get("rank_sweep") is None:
        for name in ("rank_metric", "rank_data", "rank_limit"):
            if given.get(name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}: give it with --rank-sweep")
    elif given["rank"] is not None:
        raise UsageError("--rank: give it or --rank-sweep, not both")
    elif given["save_adapter"] is not None:
        raise UsageError("--save-adapter: not with --rank-sweep; heal again with the rank that it picks")
    return Training(method=method, seed=given["seed"] or 0, **chosen, **flags)


def rank_sweep_of(given: dict[str, Any]) -> RankSearch:
    """What the options of `training_options` say of picking a rank."""
    from slicer.plan.amounts import parse_counts
    from slicer.sweep.ranks import RankSearch

    chosen = {
        name: given[f"rank_{name}"]
        for name in ("metric", "data", "limit")
        if given[f"rank_{name}"] is not None
    }
    ranks = sorted(parse_counts(given["rank_sweep"], "--rank-sweep"), reverse=True)  # the largest first
    return RankSearch(tuple(ranks), **chosen)


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The calibration text options, shared by convert, analyze and heal."""
    options = [
        click.option(
            "--calibration",
            metavar="DATA",
            help="Text to measure and heal on: a Hub data set, a .jsonl, .txt or .parquet file (conversations go "
            "through the chat template), task:NAME for the prompts of an lm-eval task, or 'self' (text sampled from "
            "the model); several, separated by commas, get equal shares  [default: allenai/c4, streamed; self for the "
            "demo model]",
        ),
        click.option("--samples", type=click.IntRange(min=1), help="Calibration sequences."),
        click.option("--seq-len", type=click.IntRange(min=2), help="Tokens per calibration sequence."),
        click.option("--batch-size", type=click.IntRange(min=1), help="Sequences per forward pass."),
        click.option(
            "--seed", type=click.IntRange(min=0), help="Seed of the calibration sample and of training."
        ),  # fmt: skip
        click.option(
            "--text-column",
            "column",
            metavar="NAME",
            help="Column of the calibration data that holds the text.",
        ),  # fmt: skip
    ]
    for option in reversed(options):
        command = option(command)
    return command


def recorded_command(unrecorded: Collection[str]) -> str:
    """The current command line, in the order of the help, without `unrecorded` options."""
    context = click.get_current_context()
    arguments = [p for p in context.command.params if isinstance(p, click.Argument)]
    words = ["slicer", context.info_name or "", *(str(context.params[p.name or ""]) for p in arguments)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        default = parameter.get_default(context)
        if (
            parameter in arguments
            or parameter.name in unrecorded
            or value in (None, False)
            or value == default
        ):
            continue
        words += [parameter.opts[-1]] if value is True else [parameter.opts[-1], str(value)]
    return shlex.join(words)
