"""The options of training, made from its dataclass; YAML files with values for options; the requested training."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicer.cli.groups import DIRECTORY, FILE, POSITIVE, Decorator, expert, option
from slicer.errors import UsageError, unreadable
from slicer.heal.finetune.settings import COMPUTE, METHODS, SCHEDULERS, STARTS, Training
from slicer.plan.amounts import parse_counts

if TYPE_CHECKING:
    from slicer.sweep.ranks import RankSearch

_OF_RANK = ("rank_metric", "rank_data", "rank_limit")
_TRAINS = "training_"  # prefix of the parameters of training


def attributes(cls: type[Any]) -> tuple[str, dict[str, str]]:
    """The docstring of a dataclass, in two parts: the text before "Attributes:", and field name -> meaning.

    An entry is "name: text", "name, name: text" or "name: text; name: text".
    """
    about, _, listed = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    names = {f.name for f in fields(cls)}
    entries = re.sub(r"\n {8,}", " ", listed)  # a line that is indented further continues the entry
    parts = [part for entry in entries.splitlines() for part in re.split(r"; (?=\w+(?:, \w+)*: )", entry.strip())]
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
    """An option for every field of `Training` except `method` and `seed`, which have separate options.

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
        settings["metavar"] = _METAVARS.get(field.name, "X" if kind == "float" else None)
        settings |= {"hidden": field.name not in visible, "help": f"{text[:1].upper()}{text[1:]}."}
        name = _NAMES.get(field.name, "--" + field.name.replace("_", "-"))
        made.append(option(name, _TRAINS + field.name, **settings))
    return made


CONFIG = option(
    "--config", **FILE, is_eager=True, callback=lambda context, _, file: from_file(context, file, _fields_of_training),
    help="YAML file with settings of training by their names in docs/reference/training.md; options override it.",
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


def from_file(
    context: click.Context, file: Path | None, known: Callable[[click.Command], Mapping[str, click.Parameter]]
) -> Path | None:
    """Make the values of a YAML file the defaults of `known` options. Raises UsageError with the key and the line."""
    if file is None or context.resilient_parsing:
        return None
    import yaml

    try:
        node = yaml.compose(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read ({unreadable(error)})") from None
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


# --- the training asked for ------------------------------------------------------------------------------------------


def training_of(
    given: Mapping[str, Any], method: str | None, option: str, recorded: Training | None = None
) -> Training | None:
    """The requested training, over the `recorded` one of a replayed plan; None if `method` does not train.

    Raises UsageError if options of training are given and nothing is trained.
    """
    values: dict[str, Any] = {f.name: given.get(_TRAINS + f.name) for f in fields(Training)}
    values = {name: value for name, value in values.items() if value is not None and value is not False}
    if method not in METHODS:
        others = [name for name in ("save_adapter", "rank_sweep", *_OF_RANK) if given.get(name) is not None]
        for name in [*(_NAMES.get(n, n) for n in values), *others]:
            raise UsageError(f"--{name.lstrip('-').replace('_', '-')}: give it with {option} {', '.join(METHODS)}")
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
    return replace(recorded or Training(), **values, method=method)


def rank_search_of(given: Mapping[str, Any]) -> RankSearch | None:
    """How to pick the rank of the adapters; None if it is not asked for."""
    if given["rank_sweep"] is None:
        return None
    from slicer.sweep.ranks import RankSearch

    ranks = sorted(parse_counts(given["rank_sweep"], "--rank-sweep"), reverse=True)  # the largest first
    chosen = {name.removeprefix("rank_"): given[name] for name in _OF_RANK if given[name] is not None}
    return RankSearch(tuple(ranks), **chosen)
