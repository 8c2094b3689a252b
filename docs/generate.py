"""Writes docs/reference/: every page of it is generated from the code, so that none can be out of date.

    python docs/generate.py            write the pages (`make docs`)
    python docs/generate.py --check    exit 1 if a page is not what would be written (`make lint`)

The help texts come from real runs of the command in a subprocess, so cli.md shows what a user sees.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from click import Context

from slicer import errors
from slicer.checkpoint.architectures.table import ARCHITECTURES, Architecture
from slicer.checkpoint.architectures.vllm import unserved
from slicer.cli.groups import OLD_NAMES
from slicer.cli.main import main as main_command
from slicer.cli.training import attributes
from slicer.heal.finetune import memory, settings
from slicer.plan import records
from slicer.plan.plan import Plan

REFERENCE = Path(__file__).resolve().parent / "reference"
# argv[0] is what click prints as the program's name
RUN = ("-c", "import sys; sys.argv[0] = 'slicer'; from slicer.cli.main import main; main()")


def pages() -> dict[str, Callable[[], list[str]]]:
    """File name -> the function that makes its blocks, which an empty line separates."""
    return {
        "cli.md": cli,
        "architectures.md": architectures,
        "plan.md": plan,
        "errors.md": error_classes,
        "training.md": training,
    }


# --- cli.md -----------------------------------------------------------------------------------------------------------


def cli() -> list[str]:
    """The help of every command with all its options, those for experts too."""
    commands = [name for section in main_command.list_sections(Context(main_command)) for name in section.commands]
    return [
        "# Command line",
        generated("the `--help-all` of each command"),
        "`--help` shows the options that most people need, `--help-all` those for experts too.",
        *help_of(),
        *(block for name in commands for block in help_of(name, all_options=True)),
        "## Old names",
        "These names of slicer 0.1 are accepted until 0.3, with a note on stderr.",
        table(["old", "now"], [(f"`{old}`", " or ".join(f"`{name}`" for name in new) or "ignored")
                               for old, new in OLD_NAMES.items()]),
    ]  # fmt: skip


def help_of(*command: str, all_options: bool = False) -> list[str]:
    """The section of a command."""
    text = output(*RUN, *command, "--help-all" if all_options else "--help")
    return [f"## `{' '.join(('slicer', *command))}`", f"```text\n{text}\n```"]


def output(*arguments: str) -> str:
    """What Python prints with these arguments on a terminal 100 columns wide."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        cwd=REFERENCE.parent.parent,
    )
    if result.returncode:
        sys.exit(f"`python {' '.join(arguments)}` failed:\n{result.stderr}")
    return "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())


# --- architectures.md -------------------------------------------------------------------------------------------------


def architectures() -> list[str]:
    rows = dict(sorted(ARCHITECTURES.items()))
    refused = {name: row for name, row in rows.items() if row.refuse and row.refuse_if is None}
    sliced = {name: row for name, row in rows.items() if name not in refused}
    rules = {row.rule.__name__: row.rule for row in sliced.values() if row.rule}
    notes: dict[str, Any] = {note_name(row): row.note for row in sliced.values() if row.note}
    ways = [
        ("slice", "`[x[i] for i in K]`", "a list with one entry for each layer"),
        ("reindex", "the new positions of the members that stay", "a list of layer indices"),
        ("count", "the number of layers in K below x", "a threshold: layers below x are of another kind"),
        ("rule", "the function named, below", "anything else"),
    ]
    return [
        "# Architectures",
        generated(f"the table in `{source_of(Architecture)}`"),
        f"slicer can slice {len(sliced) - 1} model types of transformers, and `slicer_blockwise`, its own form for "
        f"layers without attention or feed-forward. It refuses {len(refused)} more. A model type that is not in the "
        "table is refused too, because its per-layer fields are unknown. [The architecture page]"
        "(../architecture.md#adding-an-architecture) explains how to add one.",
        "The depth field is always rewritten. Other fields that describe single layers are rewritten in one of these "
        "ways (K: the kept layers, in the numbering of the source):",
        table(["way", "new value of x", "used for"], ways),
        "## Model types that can be sliced",
        table(
            ["model type", "depth field", "layer keys start with", "rewritten", "vLLM"],
            [(f"`{name}`", depth(row), prefixes(row), rewritten(row), vllm(row)) for name, row in sliced.items()],
        ),
        *(f"`{name}` is refused if `{row.refuse_if}` is true: {row.refuse}." for name, row in sliced.items()
          if row.refuse),
        "## Model types that are refused",
        table(["model type", "reason"], [(f"`{name}`", row.refuse) for name, row in refused.items()]),
        "## Rules",
        *(f"### `{name}`\n\n{inspect.getdoc(rule)}" for name, rule in sorted(rules.items())),
        "## Differences in vLLM",
        "vLLM 0.32 reads some configs differently from transformers. If a cut is affected, `slicer convert` prints a "
        "warning with the reason and a remedy.",
        *(f"### `{name}`\n\n{inspect.getdoc(note)}" for name, note in sorted(notes.items())
          if note is not unserved),
    ]  # fmt: skip


def depth(row: Architecture) -> str:
    field = f"`{row.text_config}.{row.depth_field}`" if row.text_config else f"`{row.depth_field}`"
    return field if row.default_depth is None else f"{field} (if absent: {row.default_depth})"


def prefixes(row: Architecture) -> str:
    return ", ".join(f"`{prefix}`" for prefix in dict.fromkeys(row.prefixes))


def rewritten(row: Architecture) -> str:
    ways = {"slice": row.slices, "reindex": row.reindexes, "count": row.counts}
    words = [f"{way} {', '.join(f'`{name}`' for name in names)}" for way, names in ways.items() if names]
    words += [f"rule [`{row.rule.__name__}`](#{row.rule.__name__})"] if row.rule else []
    words += ["multi-token-prediction layers are dropped"] if row.mtp else []
    return "; ".join(words)


def note_name(row: Architecture) -> str:
    return str(getattr(row.note, "__name__", type(row.note).__name__))


def vllm(row: Architecture) -> str:
    if row.note is None:
        return ""
    return "not served" if row.note is unserved else f"[`{note_name(row)}`](#{note_name(row)})"


# --- plan.md ----------------------------------------------------------------------------------------------------------


def plan() -> list[str]:
    parts = [
        value
        for value in vars(records).values()
        if is_dataclass(value) and isinstance(value, type) and value.__module__ == records.__name__
    ]
    return [
        "# plan.json",
        generated(f"`{source_of(Plan)}` and `{source_of(parts[0])}`"),
        "`slicer plan` writes a plan file, and every result of `slicer convert`, `slicer heal` and `slicer merge` has "
        "one in `slicer/plan.json`. It records which layers stay, why, and everything that was done to them since. "
        "Beside the fields below, the file has `format`, its version, and `dropped`, the layers that are not in "
        "`kept`. If `kept` is missing, it is derived from `dropped`. slicer reads every older format.",
        "All layer numbers count from 0 in the numbering of the source.",
        *described(Plan),
        *(block for part in parts for block in described(part)),
    ]


def described(cls: type[Any]) -> list[str]:
    """A section on a frozen dataclass: what it is, then each field with its type, default and meaning."""
    about, meaning = attributes(cls)
    rows = [(f"`{f.name}`", f"`{f.type}`", default(f), meaning.get(f.name, "").rstrip(".")) for f in fields(cls)]
    return [f"## {cls.__name__}", about, table(["field", "type", "default", "meaning"], rows)]


def default(field: Any) -> str:
    if field.default is not MISSING:
        return f"`{field.default!r}`"
    return "required" if field.default_factory is MISSING else f"`{field.default_factory()!r}`"


# --- errors.md --------------------------------------------------------------------------------------------------------


def error_classes() -> list[str]:
    def below(cls: type[errors.SlicerError], level: int = 0) -> list[tuple[str, ...]]:
        row = ("&emsp;" * level + f"`{cls.__name__}`", str(cls.exit_code), inspect.getdoc(cls) or "")
        own = [child for child in cls.__subclasses__() if child.__module__ == errors.__name__]
        return [row, *(found for child in own for found in below(child, level + 1))]

    codes = [
        ("0", "success"),
        ("1", "an error of the classes below, or an unexpected one: run the command again with `--debug`"),
        ("2", "the command line is wrong: an unknown option, a value that no model could satisfy"),
        ("130", "stopped by Ctrl-C"),
        ("143", "stopped by SIGTERM"),
    ]
    return [
        "# Errors and exit codes",
        generated(f"`{source_of(errors.SlicerError)}`"),
        "A command that fails prints one line on stderr, `slicer: ` and the message, and exits with a code other than "
        "0. `--debug` prints the traceback as well. From Python, every expected error is a subclass of "
        "`slicer.SlicerError`.",
        "## Exit codes",
        table(["code", "meaning"], codes),
        "## Error classes",
        "Indented classes are subclasses of the class above them.",
        table(["class", "exit code", "raised when"], below(errors.SlicerError)),
    ]


# --- training.md ------------------------------------------------------------------------------------------------------


def training() -> list[str]:
    shown = {"name": "model", "lora_r": "rank", "learning_rate": "peak learning rate",
             "seq_len": "tokens in a sequence"}  # fmt: skip
    rows = [
        [f"{value:g}" if isinstance(value := getattr(row, name), float) else str(value) for name in shown]
        for row in settings.PAPER
    ]
    return [
        "# Settings of training",
        generated(f"`{source_of(settings.Training)}` and `{source_of(memory.ModelShape)}`"),
        "The settings of training for `slicer heal`, with their defaults. `None` means: the value of the table below.",
        *described(settings.Training),
        "## Defaults by model",
        "The values of the paper (Gromov et al., appendix A.1). A model that is not listed gets the row of the model "
        "closest in size, and a note is printed. `full` uses a tenth of the learning rate.",
        table(list(shown.values()), rows),
        f"For every model: {settings.WARMUP} warm-up steps (at most a tenth of the steps) and alpha equal to the rank, "
        "beside the defaults above.",
        "## Memory by formula",
        "GB for each GPU, by the formula in [Train on several devices]"
        "(../guide/scaling.md#how-much-memory-training-takes), with the values of the paper, one sequence in a pass "
        "and gradient checkpointing. Printed by "
        f"`python -m {memory.__name__}`.",
        output("-m", memory.__name__),
    ]


# --- all pages --------------------------------------------------------------------------------------------------------


def generated(source: str) -> str:
    return f"Generated by `make docs` from {source}: edit the code, not this page."


def source_of(item: Any) -> str:
    return Path(inspect.getsourcefile(item) or "").resolve().relative_to(REFERENCE.parent.parent).as_posix()


def table(head: list[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(f"usage: {sys.argv[0]} [--check]")
    REFERENCE.mkdir(exist_ok=True)
    for name, make in pages().items():
        page, text = REFERENCE / name, "\n\n".join(make()) + "\n"
        if not sys.argv[1:]:
            page.write_text(text, encoding="utf-8")
        elif not page.exists() or page.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/reference/{name} differs from the code: run `make docs` and commit it")


if __name__ == "__main__":
    main()
