"""The options of the commands: how many are shown, their old names, settings files, and the requests made of them."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import pytest
from commands import slicer, succeeds

from slicer.checkpoint.hub import DEMO
from slicer.cli import groups
from slicer.cli.main import main
from slicer.heal.finetune import model
from slicer.heal.finetune.settings import Training
from slicer.jobs.output import Written
from slicer.jobs.request import Compensation, ConvertRequest, HealRequest, MergeRequest, Output, Text
from slicer.plan.plan import Plan

MOST_SHOWN = {"convert": 24, "heal": 20, "sweep": 16}
COMMANDS = sorted(main.commands)


def options(command: str, shown: str = "--help") -> list[str]:
    """The options that a help text lists."""
    lines = succeeds(command, shown).stdout.splitlines()
    return [line for line in lines if line.startswith("  -")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_few_options_and_help_all_every_one(command: str) -> None:
    before = options(command)
    assert len(before) <= MOST_SHOWN.get(command, 30)
    context = click.Context(main.commands[command])
    assert len(options(command, "--help-all")) == len([
        p for p in main.commands[command].get_params(context) if isinstance(p, click.Option)
    ])  # fmt: skip
    assert options(command) == before, "--help-all leaves no trace in the process"


def test_every_summary_fits_a_line() -> None:
    text = succeeds("--help").stdout
    _, _, text = text.partition("...\n")  # of the usage
    assert "..." not in text and all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    params = [p for p in main.commands[command].params if isinstance(p, click.Option)]
    assert not [p.opts for p in params if not p.help]


def test_one_option_for_every_field_of_training() -> None:
    for command in ("convert", "heal", "sweep"):
        names = {p.name for p in main.commands[command].params}
        assert {"training_" + f.name for f in fields(Training)} - names == {"training_method", "training_seed"}


# --- old names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", groups.OLD_NAMES)
def test_old_names_reach_the_present_ones_with_a_note(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = 0
    for command in main.commands.values():
        assert isinstance(command, groups.Command)
        known = {name for parameter in command.params for name in parameter.opts}
        new = [name for name in groups.OLD_NAMES[old] if name in known]
        if old in known or not new:
            continue
        found += 1
        assert len(new) == 1, "one word, one meaning"
        for given, wanted in (([old, "x"], [new[0], "x"]), ([f"{old}=x", "--", old], [f"{new[0]}=x", "--", old])):
            context = click.Context(command)
            seen: list[str] = []
            click_parse = click.Command.parse_args
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(click.Command, "parse_args", lambda _s, _c, args, seen=seen: seen.extend(args) or [])
                command.parse_args(context, given)
            assert click.Command.parse_args is click_parse
            if command.name != "bench":  # what follows -- is vLLM's there
                assert seen == wanted
            assert f"{old} is now {new[0]}" in capsys.readouterr().err
    assert found or not groups.OLD_NAMES[old]


def test_an_option_that_had_one_value_is_ignored(tmp_path: Path) -> None:
    given = ["convert", "demo", "--drop", "2-3", "--preset", "paper", "--keep=3", "--dry-run"]
    result = slicer(*given)
    assert "--preset is ignored" in result.stderr and "--keep is now --keep-layers" in result.stderr
    assert result.exit_code == 2, "and the rest of the line is read: --drop and --keep-layers are two amounts"


def test_an_old_name_that_a_command_never_had_is_unknown() -> None:
    result = slicer("inspect", "demo", "--lr", "1")
    assert result.exit_code == 2 and "--lr" in result.stderr and "is now" not in result.stderr


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command line asks the jobs for."""
    seen: list[Any] = []

    def job(request: object, *_: object) -> None:
        seen.append(request)

    for name in ("convert", "heal", "merge"):
        monkeypatch.setattr(f"slicer.jobs.{name}.{name}", job)

    def run(*words: object) -> Any:
        seen.clear()
        succeeds(*words)
        return seen[-1]

    return run


def test_what_is_not_said_stays_open(asked: Any, tmp_path: Path) -> None:
    request = asked("convert", "org/model", "--drop", 3)
    assert isinstance(request, ConvertRequest) and request.goal is not None
    assert replace(request, goal=None, plan=Plan.whole(4), command=None) == ConvertRequest(
        "org/model", plan=Plan.whole(4)
    )
    request = asked("heal", "cut", "-o", tmp_path)
    assert request == HealRequest("cut", output=Output(tmp_path), command="slicer heal cut")
    request = asked("merge", "cut", "adapter", "-o", tmp_path)
    assert request == MergeRequest("cut", Path("adapter"), output=Output(tmp_path), command="slicer merge cut adapter")


def test_what_is_said_is_asked_for(asked: Any, tmp_path: Path) -> None:
    request = asked(
        "convert", "org/model", "--keep-layers", 4, "--heal", "linear", "--rank", 8, "--heal-steps", 5, "--seed", 0,
        "--samples", 9, "--column", "body", "--dtype", "bfloat16", "--memory", "1GB", "--verify", "load",
        "--overwrite", "-o", tmp_path / "out",
    )  # fmt: skip
    assert request.compensation == Compensation("linear", None, 8, 5)
    assert request.text == Text(None, 9, None, None, 0, "body")
    assert request.output == Output(tmp_path / "out", overwrite=True, verify="load")
    assert (request.compute.dtype, request.compute.memory) == ("bfloat16", 10**9)
    assert request.command == (
        "slicer convert org/model --keep-layers 4 --samples 9 --seed 0 --column body --heal linear --rank 8 "
        "--heal-steps 5 --dtype bfloat16"
    ), "in the order of the help, without what does not change the result"


def test_the_demo_model_is_measured_on_its_own_text(asked: Any, tmp_path: Path) -> None:
    assert asked("convert", "demo", "--drop", 3).text.source == "self"
    assert asked("convert", "demo", "--drop", 3, "--calibration", "t.txt").text.source == "t.txt"
    (tmp_path / "plan.json").write_text(Plan.dropping(12, [2]).to_json())
    assert asked("convert", "demo", "--plan", tmp_path / "plan.json").text.source is None


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """(bare cut, training) that `convert` asks the jobs for, in a directory of its own."""
    seen: list[Any] = []

    def convert(request: ConvertRequest, *_: object) -> None:
        seen.append(request)
        (request.output.out / "slicer").mkdir(parents=True)
        (request.output.out / "slicer" / "plan.json").write_text(Plan.dropping(12, [2, 3]).to_json())

    def heal(request: HealRequest, *_: object) -> Written | None:
        seen.append(request)
        return None

    monkeypatch.setattr("slicer.jobs.convert.convert", convert)
    monkeypatch.setattr("slicer.jobs.heal.heal", heal)
    monkeypatch.setattr(model, "require", lambda method: None)
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[ConvertRequest, HealRequest]:
        seen.clear()
        succeeds(*words)
        cut, healing = seen
        return cut, healing

    return run


def test_a_trained_cut_is_two_jobs(composed: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut, healing = composed(
        "convert", "demo", "--drop", 2, "--heal", "lora", "--max-steps", 7, "--solver", "transform", "--seed", 3,
        "--calibration", "t.txt", "-o", out,
    )  # fmt: skip
    assert cut.compensation == Compensation("none") and cut.selection.offset == "whole" and cut.command is None
    assert cut.output.out == tmp_path / "out.cut" / "cut" and str(cut.output.out) == healing.cut
    assert healing.training == Training("lora", max_steps=7, seed=3) and healing.output.out == out
    assert healing.compensation == Compensation("fold", "transform") and healing.text.source == "t.txt"
    assert "--heal lora --solver transform --max-steps 7" in str(healing.command)
    assert not list(tmp_path.iterdir()), "the cut goes when its training is done"


def test_a_result_without_a_name_is_named_after_its_cut(composed: Any) -> None:
    _, healing = composed("convert", "demo", "--drop", 2, "--heal", "lora")
    assert healing.output.out == Path("checkpoint-10L" if DEMO.name == "demo" else "demo-10L")


def test_the_old_rank_of_adapters_is_accepted(composed: Any, tmp_path: Path) -> None:
    _, healing = composed("convert", "demo", "--drop", 2, "--heal", "lora", "--rank", 4, "-o", tmp_path / "out")
    assert healing.training.lora_r == 4


def trained_plan(tmp_path: Path) -> Path:
    """A plan whose cut was trained, with seed 5 and on 32 sequences of a file."""
    file = tmp_path / "trained.json"
    record = {
        "method": "lora", "solver": "transform", "loss": {"before": 3.0, "after": 2.0}, "steps": 9,
        "text": {"source": "old.txt", "samples": 32, "seq_len": 64, "seed": 5},
        "training": {"start": "fold", "asked": {"method": "lora", "max_steps": 9, "seed": 5}, "settings": {},
                     "corpus": {"source": "old.txt", "train_sequences": 1, "held_out_sequences": 1}},
    }  # fmt: skip
    file.write_text(json.dumps(json.loads(Plan.dropping(12, [2, 3]).to_json()) | {"healing": record}))
    return file


@pytest.mark.parametrize(
    "said, training, text",
    [
        ([], {}, {}),
        (["--seed", 0], {"seed": 0}, {"seed": 0}),
        (["--max-steps", 4, "--samples", 8], {"max_steps": 4}, {"samples": 8}),
        (["--calibration", "new.txt"], {}, {"source": "new.txt"}),
    ],
)
def test_a_trained_plan_is_trained_again_as_it_was_but_for_what_is_said(
    composed: Any, tmp_path: Path, said: list[object], training: dict[str, Any], text: dict[str, Any]
) -> None:
    _, healing = composed("convert", "demo", "--plan", trained_plan(tmp_path), *said, "-o", tmp_path / "out")
    assert healing.training == replace(Training("lora", max_steps=9, seed=5), **training)
    assert healing.text == replace(Text("old.txt", 32, 64, 4, 5, "text"), **text)
    assert healing.compensation.solver == "transform"


def test_a_trained_plan_with_another_way_to_heal_is_not_trained(asked: Any, tmp_path: Path) -> None:
    request = asked("convert", "demo", "--plan", trained_plan(tmp_path), "--heal", "none")
    assert isinstance(request, ConvertRequest) and request.compensation.method == "none"


@pytest.mark.parametrize(
    "given, word",
    [
        (["--max-steps", 3], "--max-steps"),
        (["--train-seq-len", 32], "--train-seq-len"),
        (["--rank-metric", "loss"], "--rank-metric"),
        (["--heal", "lora", "--rank-limit", 3], "--rank-sweep"),
        (["--heal", "lora", "--rank-sweep", "2,4", "--lora-r", 2], "not both"),
        (["--heal", "lora", "--rank-sweep", "2,4", "--save-adapter", "a"], "--save-adapter"),
    ],
)
def test_options_of_training_are_refused_where_they_do_nothing(given: list[object], word: str) -> None:
    result = slicer("convert", "demo", "--drop", 2, *given)
    assert result.exit_code == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1


# --- settings files ---------------------------------------------------------------------------------------------------


def test_a_settings_file_gives_the_training_and_options_override_it(composed: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("method: lora\npatience: 0\nmax_steps: 4\nlearning_rate: 1e-3\nseq-len: 32\nteacher: null\n")
    out = tmp_path / "out"
    cut, healing = composed("convert", "demo", "--drop", 2, "--config", file, "--max-steps", 5, "-o", out)
    assert healing.training == Training("lora", max_steps=5, learning_rate=1e-3, seq_len=32, patience=0)
    assert cut.text.seq_len is None, "the sequences of the calibration text are another thing"
    assert "--config" not in healing.command and "--train-seq-len 32" in healing.command


def test_a_grid_file_gives_the_options_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        main.commands["sweep"], "callback",
        lambda source, **given: seen.append(given | {"command": groups.recorded_command(defaults=True)}),
    )  # fmt: skip
    (tmp_path / "g.yaml").write_text("drop: 0:6:2\nheal: [none, fold]\nnum-fewshot: 2\nmax_steps: 9\n")
    succeeds("sweep", "demo", "--grid", tmp_path / "g.yaml", "--drop", "0,1")
    (given,) = seen
    assert (given["drop"], given["heals"], given["num_fewshot"]) == ("0,1", "none,fold", 2)
    assert given["training_max_steps"] == 9
    assert given["command"] == "slicer sweep demo --drop 0,1 --heal none,fold --num-fewshot 2 --max-steps 9"


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_steps: 4\nlora_rr: 3\n", ["line 2", "lora_rr", "lora_r?"]),
        ("lora_r: -3\n", ["line 1", "lora_r", "-3"]),
        ("\nlr_scheduler_type: steep\n", ["line 2", "lr_scheduler_type", "cosine"]),
        ("max_steps: {a: 1}\n", ["line 1", "max_steps"]),
        ("max_steps: [4\nlora_r: 3\n", ["line 2", "YAML"]),
        ("- 4\n", ["line 1", "name: value"]),
        (None, ["cannot be read"]),
    ],
)
def test_a_settings_file_that_is_wrong_is_one_line_with_the_place(
    tmp_path: Path, text: str | None, words: list[str]
) -> None:
    file = tmp_path / "t.yaml"
    if text is not None:
        file.write_text(text)
    result = slicer("heal", "cut", "--method", "lora", "--config", file, "-o", tmp_path / "out")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert str(file) in result.stderr and all(word in result.stderr for word in words), result.stderr
