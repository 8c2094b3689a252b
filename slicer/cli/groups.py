"""Shared by the commands: the command class, groups of options, old names, and requests from options.

Options are visible, or `expert`: shown only by --help-all. Their defaults are those of the values that they set.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import cloup
from click.core import ParameterSource
from click.types import OptionHelpExtra

from slicer.checkpoint.tensors import DTYPES
from slicer.data.sources import TextSpec
from slicer.jobs.request import VERIFICATIONS, Output, Text
from slicer.plan.amounts import parse_size
from slicer.plan.records import SOLVERS
from slicer.runtime.compute import Compute
from slicer.runtime.memory import DEVICE_SHARE, HOST_SHARE

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# Names of slicer 0.1, accepted until 0.3, and their present names; of several names, the one that the command has. A
# command that itself has an option of the old name keeps it. Empty: the option had only one value, and is ignored.
OLD_NAMES: dict[str, tuple[str, ...]] = {
    "--out": ("--output-dir", "--output-file"),
    "--force": ("--overwrite",),
    "--from": ("--base-model",),
    "--keep": ("--keep-layers", "--retain"),
    "--text-column": ("--column",),
    "--fold": ("--solver",),
    "--emulate": ("--heal",),
    "--emulate-steps": ("--heal-steps",),
    "--start": ("--train-from",),
    "--steps": ("--max-steps",),
    "--lr": ("--learning-rate",),
    "--scheduler": ("--lr-scheduler-type",),
    "--warmup": ("--warmup-steps",),
    "--rank": ("--lora-r",),
    "--alpha": ("--lora-alpha",),
    "--dropout": ("--lora-dropout",),
    "--preset": (),
    "--config": ("--model-config",),
}
# Options that do not change what is written stay out of the recorded command, so the same work has the same record.
UNRECORDED = {
    "output_dir", "output_file", "overwrite", "dry_run", "verify", "device", "memory", "device_memory", "save_adapter",
    "config", "grid", "as_json", "debug",
}  # fmt: skip


# --- commands and options ---------------------------------------------------------------------------------------------


class Command(cloup.Command):
    """A command with the options that all commands have; old names of options are accepted with a note."""

    def __init__(self, *args: Any, params: Iterable[click.Parameter] | None = None, **settings: Any) -> None:
        last = [
            Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_help_all,
                   help="Show all options, also those for experts, and exit."),
            Option(["--debug"], is_flag=True, hidden=True, help="Show the traceback of an error."),
        ]  # fmt: skip
        super().__init__(*args, params=[*(params or ()), *last], **settings)

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(context, self._renamed(args))

    def _renamed(self, args: list[str]) -> list[str]:
        known = {name for parameter in self.params for name in parameter.opts}
        at = args.index("--") if "--" in args else len(args)
        words, found = iter(args[:at]), []
        for word in words:
            old, equals, value = word.partition("=")
            if old not in OLD_NAMES or old in known:
                found.append(word)
                continue
            new = next((name for name in OLD_NAMES[old] if name in known), None)
            if new is not None:
                click.echo(f"note: {old} is now {new}; the old name will be removed in slicer 0.3", err=True)
                found.append(new + equals + value)
            elif OLD_NAMES[old] or "--lora-r" not in known:
                found.append(word)  # this command never had it
            else:
                click.echo(
                    f"note: {old} is ignored, because it had only one value; it will be removed in slicer 0.3", err=True
                )
                if not equals:
                    next(words, None)
        return found + args[at:]


def _help_all(context: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing or not isinstance(context.command, Command):
        return
    options = [p for p in context.command.params if isinstance(p, click.Option) and p.hidden]
    hidden: list[Any] = [*options, *(group for group in context.command.option_groups if group.hidden)]
    for item in hidden:
        item.hidden = False
    text = context.get_help()
    for item in hidden:
        item.hidden = True
    click.echo(text)
    context.exit()


class Option(cloup.Option):
    """An option whose help shows its real default, and no range."""

    def get_help_extra(self, context: click.Context) -> OptionHelpExtra:
        extra = super().get_help_extra(context)
        extra.pop("range", None)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


def option(*names: str, **settings: Any) -> Decorator:
    """An option; a flag if its default is False."""
    if settings.get("default") is False:
        settings["is_flag"] = True
    if isinstance(settings.get("type"), click.IntRange) and settings.get("metavar") is None:
        settings["metavar"] = "N"
    return cloup.option(*names, cls=Option, **settings)


command = partial(cloup.command, cls=Command)
expert = partial(option, hidden=True)
group = cloup.option_group
DIRECTORY = {"type": click.Path(path_type=Path), "metavar": "DIR"}
FILE = {"type": click.Path(path_type=Path), "metavar": "FILE"}
POSITIVE = click.IntRange(min=1)
output_dir = partial(option, "-o", "--output-dir", **DIRECTORY)
output_file = partial(option, "-o", "--output-file", **FILE)
dtype_option = partial(option, "--dtype", type=click.Choice(list(DTYPES)))
JSON = option("--json", "as_json", default=False, help="Print the result as JSON.")
TRUST = expert("--trust-remote-code", default=False, help="Run the checkpoint's own Python code.")
DEVICE = option("--device", metavar="DEVICE", default=Compute.device, help="Where models run: auto, cpu, cuda, cuda:1.")
OVERWRITE = option("--overwrite", default=False, help="Replace an earlier result at the output.")
SOLVER = expert(
    "--solver", type=click.Choice(SOLVERS), show_default=SOLVERS[0],
    help="Of a fold. resolve: the output matrices, by ridge regression. transform: one linear map behind the "
    "feed-forward (ReplaceMe).",
)  # fmt: skip
ADAPT = expert(
    "--adapt", default=False,
    help="Of a fold: also adapt the model to the kind of the calibration text. It then writes such text better, and is "
    "further from its source on all other text.",
)  # fmt: skip
VERIFY = expert(
    "--verify", type=click.Choice(VERIFICATIONS), default=Output.verify,
    help="Check before the output appears. load: every key and shape. logits: also the logits, against the source with "
    "the dropped layers bypassed. auto: logits if the model fits in memory or text is read.",
)  # fmt: skip
SHARDS = expert(
    "--max-shard-size", metavar="SIZE", default=f"{Output.max_shard_bytes // 10**9}GB", help="Maximum file size."
)
RESULT = (OVERWRITE, SHARDS, VERIFY, JSON)
MEMORY = (
    expert("--memory", metavar="SIZE", show_default=f"{HOST_SHARE:.0%} of the machine's",
           help="Memory for weights and states, e.g. 8GB. A larger model is read from disk layer by layer."),
    expert("--device-memory", metavar="SIZE", show_default=f"{DEVICE_SHARE:.0%} of the GPU's",
           help="The same of each GPU."),
)  # fmt: skip
DRAFTED = option(
    "--num-speculative-tokens", "speculative_tokens", type=POSITIVE, default=3, help="Tokens to draft per step."
)


def text_options(default: str = "allenai/c4, streamed; self for the demo model") -> Decorator:
    """Calibration text, of convert, analyze and heal."""
    spec = TextSpec()
    return group(
        "Text",
        option("--calibration", metavar="DATA", show_default=default,
               help="Text to measure and heal on: a Hub data set, a .jsonl, .txt or .parquet file, task:NAME for the "
               "prompts of an lm-eval task, or self: text sampled from the model. Separate several by commas."),
        option("--samples", type=POSITIVE, show_default=f"{spec.samples}; to heal a wide model, more",
               help="Number of sequences."),
        option("--seq-len", type=click.IntRange(min=2), show_default=str(spec.seq_len), help="Tokens per sequence."),
        option("--seed", type=click.IntRange(min=0), show_default=str(spec.seed),
               help="Seed for the choice of text and for training."),
        expert("--batch-size", type=POSITIVE, show_default=str(spec.batch_size), help="Sequences per forward pass."),
        expert("--column", metavar="NAME", show_default=spec.column, help="Column of the data that holds the text."),
    )  # fmt: skip


# --- from options to requests -----------------------------------------------------------------------------------------


def text_of(given: Mapping[str, Any], source: str | None = None) -> Text:
    """The text of the options. By default the demo model samples its own text, so it needs no network."""
    names = ("samples", "seq_len", "batch_size", "seed", "column")
    return Text(given["calibration"] or ("self" if source == "demo" else None), **{k: given[k] for k in names})


def written_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all requests for a checkpoint have: output and checks, device and memory, the command."""
    shard = parse_size(given["max_shard_size"], "--max-shard-size")
    output = Output(given["output_dir"], given["overwrite"], given["verify"], shard, given.get("dry_run", False))
    return {"output": output, "compute": compute_of(given), "command": recorded_command()}


def compute_of(given: Mapping[str, Any]) -> Compute:
    """Where models run; options that a command does not have get their defaults."""
    host, device = (
        None if given.get(name) is None else parse_size(given[name], option)
        for name, option in (("memory", "--memory"), ("device_memory", "--device-memory"))
    )
    return Compute(given["device"], given.get("dtype"), host, device, given["trust_remote_code"])


def explicit() -> set[str]:
    """The parameters that the command line or a settings file sets."""
    context, sources = click.get_current_context(), (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    return {name for name in context.params if context.get_parameter_source(name) in sources}


def recorded_command(unrecorded: Iterable[str] = UNRECORDED, *, defaults: bool = False) -> str:
    """The current command line, in the order of the help, without `unrecorded` options.

    `defaults`: also options that were given with their default value.
    """
    context, given = click.get_current_context(), explicit()
    arguments = [p for p in context.command.params if isinstance(p, click.Argument)]
    words = ["slicer", context.info_name or "", *(str(context.params[p.name or ""]) for p in arguments)]
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        if parameter in arguments or name not in given or name in unrecorded or value is None or value is False:
            continue
        if defaults or value != parameter.default:
            words += [parameter.opts[-1]] if value is True else [parameter.opts[-1], str(value)]
    return shlex.join(words)
