"""`slicer heal` and `slicer merge`: options in, a summary or one line of error out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicer.measure.command import calibration_options, recorded_command

if TYPE_CHECKING:
    from slicer.heal.rank_sweep import RankSweep
    from slicer.heal.settings import Training

_POSITIVE, _COUNT, _FLOAT = click.IntRange(min=1), click.IntRange(min=0), click.FLOAT
_UNRECORDED = {"out", "force", "as_json", "debug", "device", "verify", "sliced", "save_adapter"}
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
    from slicer.heal.settings import METHODS, Training

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


def rank_sweep_of(given: dict[str, Any]) -> RankSweep:
    """What the options of `training_options` say of picking a rank."""
    from slicer.heal.rank_sweep import RankSweep
    from slicer.plan.amounts import parse_counts

    chosen = {
        name: given[f"rank_{name}"]
        for name in ("metric", "data", "limit")
        if given[f"rank_{name}"] is not None
    }
    ranks = sorted(parse_counts(given["rank_sweep"], "--rank-sweep"), reverse=True)  # the largest first
    return RankSweep(tuple(ranks), **chosen)


@click.command()
@click.argument("sliced")
@click.option(
    "--from", "source", metavar="SOURCE", help="What SLICED was sliced from  [default: as its plan says]"
)
@click.option(
    "--method",
    type=click.Choice(["fold", "qlora", "lora", "full"]),
    default="fold",
    show_default=True,
    help="fold: the weights around the cut are solved again in closed form. qlora, lora: adapters on the feed-forward "
    "matrices are trained, on 4-bit weights or those as stored, and merged. full: all weights are trained.",
)
@click.option(
    "--fold",
    type=click.Choice(["resolve", "transform"]),
    default="resolve",
    show_default=True,
    help="resolve: the output matrices themselves, by ridge regression. transform: only a linear map behind the "
    "feed-forward part (ReplaceMe).",
)
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Where the healed checkpoint goes."
)
@calibration_options
@training_options
@rank_options
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest weight file."
)
@click.option(
    "--device", default="auto", show_default=True, help="Where the source runs: auto, cpu, cuda, cuda:1."
)
@click.option(
    "--verify",
    type=click.Choice(["auto", "none", "load", "logits"]),
    default="auto",
    show_default=True,
    help="Check before the output appears: every key and shape (load), and the logits against the source with the "
    "new weights and the dropped layers bypassed (logits). auto: logits while the source fits in memory.",
)
@click.option("--force", is_flag=True, help="Replace the output directory if it holds a checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def heal(sliced: str, **given: Any) -> None:
    """Close the cut in SLICED, a checkpoint that slicer made.

    The shapes and the architecture stay as they are. All tensors but those that are solved again, or trained, keep
    their bytes. A training that was stopped goes on when the same command is given again.

    \b
    slicer heal qwen-20L --from Qwen/Qwen2.5-0.5B --calibration text.jsonl -o qwen-20L-healed
    slicer heal llama-24L --from meta-llama/Llama-2-7b-hf --method qlora -o llama-24L-healed
    """
    from slicer import console
    from slicer.heal.job import Healed, HealOptions
    from slicer.heal.job import heal as run
    from slicer.measure.calibration import CalibrationSpec
    from slicer.plan.amounts import parse_size

    names = ("samples", "seq_len", "batch_size", "seed", "text_column")
    chosen = {name: given[name] for name in names if given[name] is not None}
    common: dict[str, Any] = {
        "fold": given["fold"],
        "calibration": CalibrationSpec(source=given["calibration"], **chosen),
        "max_shard_bytes": parse_size(given["max_shard_size"], "--max-shard-size"),
        "command": recorded_command(_UNRECORDED),
        **{name: given[name] for name in ("verify", "device", "force", "trust_remote_code")},
    }
    training = training_of(given, given["method"], "--method")
    with console.progress() as progress:
        if training is None:
            done: Healed | None = run(
                sliced, given["source"], given["out"], HealOptions(**common), progress=progress
            )
        else:
            from slicer.heal.rank_sweep import pick_rank
            from slicer.heal.trained import TrainOptions, train_cut
            from slicer.runtime.distributed import Processes

            options = TrainOptions(training=training, save_adapter=given["save_adapter"], **common)
            if given["rank_sweep"] is not None:
                done = pick_rank(
                    sliced, given["source"], given["out"], options, rank_sweep_of(given), progress=progress
                )
            else:
                done = train_cut(sliced, given["source"], given["out"], options, progress=progress)
            Processes.of_environment().leave()
    if done is None:  # not the first of several processes
        return
    if given["as_json"]:
        click.echo(json.dumps(done.to_dict(), indent=2))
    else:
        console.print_healed(done)


@click.command()
@click.argument("sliced")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Where the merged checkpoint goes."
)
@click.option(
    "--renumber",
    is_flag=True,
    help="ADAPTER was trained on the unsliced model: count its layers anew and leave out those that were dropped.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest weight file."
)
@click.option("--device", default="auto", show_default=True, help="Where the check runs.")
@click.option(
    "--verify",
    type=click.Choice(["auto", "none", "load", "logits"]),
    default="auto",
    show_default=True,
    help="Check before the output appears: every key and shape (load), and the logits against SLICED with the adapter "
    "put on by peft (logits). auto: logits while the model fits in memory.",
)
@click.option("--force", is_flag=True, help="Replace the output directory if it holds a checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def merge(sliced: str, adapter: Path, **given: Any) -> None:
    """Merge the LoRA adapter ADAPTER into the checkpoint SLICED.

    Tensor by tensor, into the weights as stored, never into a quantized copy.
    """
    from slicer import console
    from slicer.checkpoint.merge import merge as run
    from slicer.plan.amounts import parse_size

    with console.progress() as progress:
        done = run(
            sliced,
            adapter,
            given["out"],
            renumber=given["renumber"],
            check=given["verify"],
            device=given["device"],
            max_shard_bytes=parse_size(given["max_shard_size"], "--max-shard-size"),
            force=given["force"],
            trust_remote_code=given["trust_remote_code"],
            command=recorded_command(_UNRECORDED),
            progress=progress,
        )
    if given["as_json"]:
        click.echo(json.dumps(done.to_dict(), indent=2))
    else:
        console.print_merged(done)
