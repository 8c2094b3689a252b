"""What the commands share: the command class, groups of options, old names, settings files, and requests from options.

Options of a group are visible, or `expert`: shown by --help-all only. Their defaults come from the values they fill.
"""

from __future__ import annotations

import difflib
import inspect
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from click.core import ParameterSource
from click.types import OptionHelpExtra

from slicer.checkpoint.tensors import DTYPES
from slicer.data.sources import TextSpec
from slicer.errors import UsageError
from slicer.heal.finetune.settings import COMPUTE, METHODS, SCHEDULERS, STARTS, Training
from slicer.jobs.request import VERIFICATIONS, Output, Text
from slicer.plan.amounts import parse_counts, parse_size
from slicer.runtime.compute import Compute

if TYPE_CHECKING:
    from slicer.sweep.ranks import RankSearch

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# Names of slicer 0.1, accepted until 0.3, and their present names: of several, the one that the command has. A command
# that has the old name itself keeps it. An empty entry: the option had one value; it is ignored.
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
    "output_dir", "output_file", "overwrite", "dry_run", "verify", "device", "memory", "save_adapter", "config", "grid",
    "as_json", "debug",
}  # fmt: skip
_OF_RANK = ("rank_metric", "rank_data", "rank_limit")
_TRAINS = "training_"  # what the names of the parameters of training begin with


# --- commands and options ---------------------------------------------------------------------------------------------


class Command(cloup.Command):
    """A command with groups of options; the old names of its options are accepted with a note."""

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
                click.echo(f"note: {old} is now {new}; the old name goes in slicer 0.3", err=True)
                found.append(new + equals + value)
            elif OLD_NAMES[old]:
                found.append(word)  # this command never had it
            else:
                click.echo(f"note: {old} is ignored: it had one value; it goes in slicer 0.3", err=True)
                if not equals:
                    next(words, None)
        return found + args[at:]


def command(name: str | None = None, cls: type[Command] = Command, **settings: Any) -> Callable[..., Command]:
    """A command with the options that all commands have."""
    last = [
        click.option("--debug", is_flag=True, hidden=True, help="Show the traceback of an error."),
        click.option("--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_help_all,
                     help="Show all options, also those for experts, and exit."),
    ]  # fmt: skip

    def decorate(function: Callable[..., Any]) -> Command:
        for add in reversed(last):
            function = _below(function, add)
        return cloup.command(name, cls=cls, **settings)(function)

    return decorate


def _below(function: Callable[..., Any], add: Decorator) -> Callable[..., Any]:
    """Add an option behind those that the function has; decorators add theirs before."""
    others = list(getattr(function, "__click_params__", []))
    function.__click_params__ = []  # type: ignore[attr-defined]
    add(function)
    function.__click_params__ = [*function.__click_params__, *others]  # type: ignore[attr-defined]
    return function


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
    """An option; a flag where its default is False."""
    if settings.get("default") is False:
        settings["is_flag"] = True
    if isinstance(settings.get("type"), click.IntRange) and settings.get("metavar") is None:
        settings["metavar"] = "N"
    return cloup.option(*names, cls=Option, **settings)


expert = partial(option, hidden=True)
group = cloup.option_group
DIRECTORY = {"type": click.Path(path_type=Path), "metavar": "DIR"}
FILE = {"type": click.Path(path_type=Path), "metavar": "FILE"}
POSITIVE = click.IntRange(min=1)
JSON = option("--json", "as_json", default=False, help="Print the result as JSON.")
TRUST = expert("--trust-remote-code", default=False, help="Run the checkpoint's own Python code.")
DEVICE = option(
    "--device", metavar="DEVICE", default=Compute.device, help="Where models run: auto, cpu, cuda, cuda:1."
)
OVERWRITE = option(
    "--overwrite", default=False, help="Replace what lies at the output, if slicer can tell that it made it."
)
VERIFY = expert(
    "--verify", type=click.Choice(VERIFICATIONS), default=Output.verify,
    help="Check before the output appears. load: every key and shape. logits: also the logits, against the source with "
    "the dropped layers bypassed. auto: logits if the model fits in memory.",
)  # fmt: skip
SHARDS = expert(
    "--max-shard-size",
    metavar="SIZE",
    default=f"{Output.max_shard_bytes // 10**9}GB",
    help="Largest weight file.",
)
MEMORY = expert(
    "--memory", metavar="SIZE", show_default="what is free",
    help="Memory for weights and states, e.g. 8GB. A larger model is read from disk layer by layer.",
)  # fmt: skip
DRAFTED = option(
    "--num-speculative-tokens", type=POSITIVE, metavar="N", default=3, help="Tokens to draft per step."
)


def output_dir(help_text: str, **settings: Any) -> Decorator:
    """The option for the directory of the result."""
    return option("-o", "--output-dir", **DIRECTORY, help=help_text, **settings)


def output_file(help_text: str, **settings: Any) -> Decorator:
    """The option for the file of the result."""
    return option("-o", "--output-file", **FILE, help=help_text, **settings)


def dtype_option(help_text: str, **settings: Any) -> Decorator:
    """The option for the precision of weights."""
    return option("--dtype", type=click.Choice(list(DTYPES)), help=help_text, **settings)


def text_options(default: str = "allenai/c4, streamed; self for the demo model") -> Decorator:
    """Calibration text, of convert, analyze and heal."""
    spec = TextSpec()
    return group(
        "Text",
        option("--calibration", metavar="DATA", show_default=default,
               help="Text to measure and heal on: a Hub data set, a .jsonl, .txt or .parquet file, task:NAME for the "
               "prompts of an lm-eval task, or self: text sampled from the model. Separate several by commas."),
        option("--samples", type=POSITIVE, show_default=str(spec.samples), help="Number of sequences."),
        option("--seq-len", type=click.IntRange(min=2), show_default=str(spec.seq_len), help="Tokens per sequence."),
        option("--seed", type=click.IntRange(min=0), show_default=str(spec.seed),
               help="Seed of the choice of text and of training."),
        expert("--batch-size", type=POSITIVE, show_default=str(spec.batch_size), help="Sequences per forward pass."),
        expert("--column", metavar="NAME", show_default=spec.column, help="Column of the data that holds the text."),
    )  # fmt: skip


def attributes(cls: type[Any]) -> tuple[str, dict[str, str]]:
    """The docstring of a dataclass, in two parts: the text before "Attributes:", and field name -> meaning.

    An entry is "name: text", "name, name: text" or "name: text; name: text".
    """
    about, _, listed = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    names = {f.name for f in fields(cls)}
    entries = re.sub(r"\n {8,}", " ", listed)  # a line that is indented further continues the entry
    parts = [
        part for entry in entries.splitlines() for part in re.split(r"; (?=\w+(?:, \w+)*: )", entry.strip())
    ]
    found: dict[str, str] = {}
    last: list[str] = []
    for part in parts:
        head, colon, text = part.partition(": ")
        named = head.split(", ")
        if colon and names.issuperset(named):
            found.update(dict.fromkeys(named, text))
            last = named
        else:  # a semicolon within a text
            found.update({name: f"{found[name]}; {part}" for name in last if part})
    return " ".join(about.split()), found


_NAMES = {"start": "--train-from", "seq_len": "--train-seq-len", "batch_size": "--train-batch-size"}
_CHOICES = {"start": STARTS, "lr_scheduler_type": SCHEDULERS, "compute": COMPUTE}
_LEAST = {"seq_len": 2, "warmup_steps": 0, "patience": 0}
_METAVARS = {"validation": "DATA", "teacher": "SOURCE", "teacher_cache": "DIR", "report_to": "NAMES"}


def training_options(visible: Collection[str] = ()) -> list[Decorator]:
    """An option for every field of `Training` but `method` and `seed`, which are options of their own.

    The help is the docstring of the field; the fields in `visible` are not for experts only.
    """
    made, meaning = [], attributes(Training)[1]
    for field in fields(Training):
        if field.name in ("method", "seed"):
            continue
        text, _, otherwise = meaning.get(field.name, "").rstrip(".").partition("; None: ")
        kind = str(field.type).removesuffix(" | None")
        types: dict[str, Any] = {"int": click.IntRange(min=_LEAST.get(field.name, 1)), "float": click.FLOAT}
        settings: dict[str, Any] = {
            "type": types.get(kind, click.STRING),
            "show_default": otherwise or ("by model" if field.default is None else str(field.default)),
        }
        if field.name in _CHOICES:
            settings["type"] = click.Choice(_CHOICES[field.name])
        if kind == "bool":
            settings = {"default": False}
        made.append(
            option(
                _NAMES.get(field.name, "--" + field.name.replace("_", "-")),
                _TRAINS + field.name,
                hidden=field.name not in visible,
                metavar=_METAVARS.get(field.name, "X" if kind == "float" else None),
                help=f"{text[:1].upper()}{text[1:]}.",
                **settings,
            )
        )
    return made


CONFIG = option(
    "--config", **FILE, is_eager=True, callback=lambda context, _, file: _from_file(context, file, _fields_of_training),
    help="YAML file with settings of training by their names in docs/reference/training.md; options override it.",
)  # fmt: skip
GRID = option(
    "--grid", **FILE, is_eager=True, callback=lambda context, _, file: _from_file(context, file, _options_by_name),
    help="YAML file with values for the options of this command, by name; options override it.",
)  # fmt: skip


def rank_options(visible: bool) -> list[Decorator]:
    """How to pick the rank of adapters, and whether to keep the adapter: of convert and heal."""
    return [
        option("--rank-sweep", metavar="RANKS", hidden=not visible,
               help="Pick the rank among these, such as 2,8,64, as the paper does: the largest, unless it is worse "
               "than no healing; then the best of all."),
        expert("--rank-metric", metavar="TASK", show_default="mmlu",
               help="What to pick the rank by: an lm-eval task, or loss."),
        expert("--rank-data", **DIRECTORY, help="Directory of local files of that task, as in eval."),
        expert("--rank-limit", type=POSITIVE, metavar="N", help="Use N items of that task."),
        option("--save-adapter", **DIRECTORY, hidden=not visible,
               help="Also save the adapter here and, if it was trained on a fold, the folded weights in DIR/base."),
    ]  # fmt: skip


# --- settings files ---------------------------------------------------------------------------------------------------


def _fields_of_training(command: click.Command) -> dict[str, click.Parameter]:
    by_name = {p.name: p for p in command.params}
    found = {f.name: by_name.get(_TRAINS + f.name) or by_name.get(f.name) for f in fields(Training)}
    found["method"] = by_name.get("method") or by_name["heal"]
    return {name: parameter for name, parameter in found.items() if parameter is not None}


def _options_by_name(command: click.Command) -> dict[str, click.Parameter]:
    return {
        p.opts[-1].lstrip("-").replace("-", "_"): p
        for p in command.params
        if isinstance(p, click.Option) and p.expose_value and not p.is_eager
    }


def _from_file(
    context: click.Context,
    file: Path | None,
    known: Callable[[click.Command], Mapping[str, click.Parameter]],
) -> Path | None:
    """Make the values of a YAML file the defaults of `known` options. Raises UsageError with the key and the line."""
    if file is None or context.resilient_parsing:
        return None
    import yaml

    try:
        node = yaml.compose(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"
        ) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{file} line {line}: not valid YAML ({error.problem})") from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{file} line 1: write one 'name: value' a line")
    parameters, values = known(context.command), dict(context.default_map or {})
    for key, value in node.value if node is not None else ():
        where, name = f"{file} line {key.start_mark.line + 1}", str(key.value).replace("-", "_")
        parameter = parameters.get(name)
        if parameter is None or isinstance(value, yaml.MappingNode):
            near = difflib.get_close_matches(name, parameters, 1)
            raise UsageError(
                f"{where}: {key.value} is not a setting" + (f"; did you mean {near[0]}?" if near else "")
                if parameter is None else f"{where}: {key.value} takes one value or a list"
            )  # fmt: skip
        if value.tag == "tag:yaml.org,2002:null":
            continue
        text = value.value if isinstance(value, yaml.ScalarNode) else ",".join(v.value for v in value.value)
        try:
            values[str(parameter.name)] = parameter.type.convert(text, parameter, context)
        except click.BadParameter as error:
            raise UsageError(f"{where}: {key.value}: {error.message.rstrip('.')}") from None
    context.default_map = values
    return file


# --- from options to requests -----------------------------------------------------------------------------------------


def text_of(given: Mapping[str, Any], source: str | None = None) -> Text:
    """The text asked for. The demo model gets text of its own where none is named: it needs no network."""
    names = ("samples", "seq_len", "batch_size", "seed", "column")
    return Text(
        given["calibration"] or ("self" if source == "demo" else None), **{k: given[k] for k in names}
    )


def output_of(given: Mapping[str, Any]) -> Output:
    """Where the result goes, and how it is checked."""
    return Output(
        given["output_dir"], given["overwrite"], given["verify"],
        parse_size(given["max_shard_size"], "--max-shard-size"), given.get("dry_run", False),
    )  # fmt: skip


def compute_of(given: Mapping[str, Any]) -> Compute:
    """Where models run; options that a command does not have are at their defaults."""
    memory = given.get("memory")
    return Compute(
        given["device"], given.get("dtype"), None if memory is None else parse_size(memory, "--memory"),
        given["trust_remote_code"],
    )  # fmt: skip


def training_of(
    given: Mapping[str, Any], method: str | None, option: str, recorded: Training | None = None
) -> Training | None:
    """The training asked for, over the `recorded` one of a plan that is replayed; None if `method` does not train.

    Raises UsageError where options of training are given and nothing is trained.
    """
    values: dict[str, Any] = {f.name: given.get(_TRAINS + f.name) for f in fields(Training)}
    values = {name: value for name, value in values.items() if value is not None and value is not False}
    if method not in METHODS:
        others = [name for name in ("save_adapter", "rank_sweep", *_OF_RANK) if given.get(name) is not None]
        for name in [*(_NAMES.get(n, n) for n in values), *others]:
            raise UsageError(
                f"--{name.lstrip('-').replace('_', '-')}: give it with {option} {', '.join(METHODS)}"
            )
        return None
    if given.get("rank_sweep") is None:
        for name in _OF_RANK:
            if given.get(name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}: give it with --rank-sweep")
    elif "lora_r" in values:
        raise UsageError("--lora-r: give it or --rank-sweep, not both")
    elif given["save_adapter"] is not None:
        raise UsageError("--save-adapter: not with --rank-sweep; heal again with the rank that it picks")
    if given["seed"] is not None:
        values["seed"] = given["seed"]
    if recorded is None:
        return Training(**{**values, "method": method})
    return replace(recorded, **{**values, "method": method})


def rank_search_of(given: Mapping[str, Any]) -> RankSearch | None:
    """How to pick the rank of the adapters; None where it is not asked for."""
    if given["rank_sweep"] is None:
        return None
    from slicer.sweep.ranks import RankSearch

    ranks = sorted(parse_counts(given["rank_sweep"], "--rank-sweep"), reverse=True)  # the largest first
    chosen = {name.removeprefix("rank_"): given[name] for name in _OF_RANK if given[name] is not None}
    return RankSearch(tuple(ranks), **chosen)


def said() -> set[str]:
    """The parameters that the command line, or a settings file, gives."""
    context, sources = click.get_current_context(), (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    return {name for name in context.params if context.get_parameter_source(name) in sources}


def recorded_command(unrecorded: Iterable[str] = UNRECORDED, *, defaults: bool = False) -> str:
    """The current command line, in the order of the help, without `unrecorded` options.

    `defaults`: also options that were given with their default value.
    """
    context, given = click.get_current_context(), said()
    arguments = [p for p in context.command.params if isinstance(p, click.Argument)]
    words = ["slicer", context.info_name or "", *(str(context.params[p.name or ""]) for p in arguments)]
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        if (
            parameter in arguments
            or name not in given
            or name in unrecorded
            or value is None
            or value is False
        ):
            continue
        if defaults or value != parameter.default:
            words += [parameter.opts[-1]] if value is True else [parameter.opts[-1], str(value)]
    return shlex.join(words)
