"""What a command does is decided once, from its request: the repair, the text, the checks, the memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sources

from slicer.checkpoint.hub import Source, open_source
from slicer.data.sources import TextSpec
from slicer.errors import ArchitectureError, OutOfMemory, OutputError, PlanError, UsageError
from slicer.jobs import recipe
from slicer.jobs.convert import convert
from slicer.jobs.recipe import Recipe
from slicer.jobs.request import Compensation, ConvertRequest, Output, Selection, Text
from slicer.plan.amounts import Goal, parse_amount
from slicer.plan.plan import Plan
from slicer.plan.records import CorpusRecord, HealingRecord, Losses, MemoryRecord, TextRecord, TrainingRecord
from slicer.runtime import memory
from slicer.runtime.compute import Compute

RECORDED = TextRecord("old.txt", 24, 48, 3, 5, "body")
FOLD = HealingRecord("fold", RECORDED, Losses(3, 2, 1), solver="transform")
LINEAR = HealingRecord("linear", RECORDED, Losses(3, 2, 1), rank=4, steps=2)
TRAINED = HealingRecord(
    "qlora", RECORDED, Losses(3, 2, 1), training=TrainingRecord("fold", {}, {}, CorpusRecord("t", 1, 1))
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(sources.save_llama(tmp_path_factory.mktemp("models") / "tiny")))


def plan(healing: HealingRecord | None = None, **changes: Any) -> Plan:
    return replace(Plan.dropping(6, [2, 3]), healing=healing, **changes)


def made(source: Source, **given: Any) -> Recipe:
    if "plan" not in given:
        given.setdefault("goal", Goal(drop=parse_amount("2")))
    return Recipe.of(ConvertRequest(source.name, **given), source)


def goal(**amounts: str) -> Goal:
    return Goal(**{name: parse_amount(text) for name, text in amounts.items()})


# --- text -----------------------------------------------------------------------------------------------------------


def test_a_replay_reads_the_recorded_text(source: Source) -> None:
    assert made(source, plan=plan(FOLD)).text == TextSpec.of_record(RECORDED)


@pytest.mark.parametrize("said", [{"seed": 0}, {"samples": 7}, {"seq_len": 9}, {"source": "new.txt"}])
def test_what_is_said_on_a_replay_replaces_what_was_recorded(source: Source, said: dict[str, Any]) -> None:
    """Also a seed of 0, and also without a text: neither is taken as not said."""
    found = made(source, plan=plan(FOLD), text=Text(**said)).text
    assert found == replace(TextSpec.of_record(RECORDED), **said)


@pytest.mark.parametrize(
    ("said", "option"), [({"samples": 7}, "--samples"), ({"seed": 0}, "--seed"), ({"seq_len": 9}, "--seq-len")]
)
@pytest.mark.parametrize("healing", [None, TRAINED])
def test_what_is_said_about_a_text_that_no_replay_reads_is_refused(
    source: Source, said: dict[str, Any], option: str, healing: HealingRecord | None
) -> None:
    with pytest.raises(UsageError, match=f"{option}: "):
        made(source, plan=plan(healing), text=Text(**said))


@pytest.mark.parametrize(("wide", "samples"), [(4864, 64), (11008, 129), (28672, 336)])
def test_a_wide_matrix_is_solved_on_more_text_by_default(
    source: Source, monkeypatch: pytest.MonkeyPatch, wide: int, samples: int
) -> None:
    monkeypatch.setattr(recipe, "widest_output", lambda checkpoint: wide)
    bare, recorded = Compensation("none"), plan(FOLD)
    for given, expected in (
        ({}, samples),
        ({"text": Text(seq_len=512)}, max(64, -(-samples // 2))),
        ({"text": Text(samples=7)}, 7),
        ({"compensation": bare}, 64),
        ({"plan": recorded}, RECORDED.samples),
    ):
        assert (found := made(source, **given).text) is not None and found.samples == expected


def test_no_text_is_read_where_none_is_needed(source: Source) -> None:
    assert made(source, goal=goal(drop="2-3")).text is None
    assert made(source, goal=goal(drop="2"), compensation=Compensation("none")).text is not None
    dry = made(source, goal=goal(drop="2-3"), compensation=Compensation("fold"), output=Output(dry_run=True))
    assert dry.text is None and not dry.needs_model and dry.repair.method == "fold"


# --- the repair -----------------------------------------------------------------------------------------------------

TEXT = Text("text.txt")
RULE: list[tuple[str, dict[str, Any], str, bool]] = [
    ("asked for", {"compensation": Compensation("bias")}, "bias", True),
    ("asked for on a replay", {"plan": plan(FOLD), "compensation": Compensation("none")}, "none", True),
    ("as the plan had it", {"plan": plan(FOLD)}, "fold", True),
    ("as the plan had it, on other text", {"plan": plan(LINEAR), "text": TEXT}, "linear", True),
    ("a plan without a repair", {"plan": plan()}, "none", True),
    ("a plan without a repair, and text", {"plan": plan(), "text": TEXT}, "fold", False),
    ("a plan that was trained", {"plan": plan(TRAINED)}, "none", True),
    ("measured", {}, "fold", False),
    ("measured, half-offset", {"selection": Selection(offset="half")}, "fold", False),
    ("named layers", {"goal": goal(drop="2-3")}, "none", True),
    ("named layers and text", {"goal": goal(drop="2-3"), "text": TEXT}, "fold", False),
    ("nothing measured", {"selection": Selection("deepest")}, "none", True),
    ("parts of layers", {"goal": goal(drop_attention="2")}, "none", True),
    ("parts of layers, auto", {"goal": goal(drop_ffn="2"), "compensation": Compensation("auto")}, "fold", False),
    ("no text, auto", {"goal": goal(drop="2-3"), "compensation": Compensation("auto")}, "none", True),
]


@pytest.mark.parametrize(("given", "method", "asked"), [row[1:] for row in RULE], ids=[row[0] for row in RULE])
def test_the_rule_of_unasked_healing(source: Source, given: dict[str, Any], method: str, asked: bool) -> None:
    found = made(source, **given)
    assert (found.repair.method, found.asked) == (method, asked)


def test_a_replay_keeps_solver_rank_and_steps(source: Source) -> None:
    assert made(source, plan=plan(FOLD)).repair.solver == "transform"
    linear = made(source, plan=plan(LINEAR)).repair
    assert (linear.rank, linear.steps) == (4, 2)


def test_where_nothing_is_healed_the_reason_is_given(source: Source) -> None:
    for given, word in (
        ({"goal": goal(drop="2-3")}, "--calibration"),
        ({"goal": goal(drop_attention="2")}, "--heal fold"),
        ({"plan": plan(TRAINED)}, "qlora"),
        ({"plan": plan()}, "the plan has no healing, and there is no calibration text; --calibration"),
    ):
        assert word in (made(source, **given).unhealed or ""), given
    bare = Compensation("none")
    for given in ({"plan": plan(), "compensation": bare}, {"goal": goal(drop="2-3"), "compensation": bare}, {}):
        assert made(source, **given).unhealed is None


@pytest.mark.parametrize(
    ("given", "halves"),
    [
        ({}, None),
        ({"selection": Selection(offset="whole")}, False),
        ({"selection": Selection(offset="half")}, True),
        ({"goal": goal(drop_ffn="2"), "selection": Selection(offset="whole")}, True),
        ({"compensation": Compensation("fold", "transform")}, False),
        ({"compensation": Compensation("none")}, None),
    ],
)
def test_it_is_measured_within_the_layers_where_that_can_be_used(
    source: Source, given: dict[str, Any], halves: bool | None
) -> None:
    assert made(source, **given).halves is halves


# --- memory and checks ----------------------------------------------------------------------------------------------


SMALL = Compute("cpu", memory=300_000)  # two layers of the source, whose weights take 880 kB


@pytest.mark.parametrize(
    ("asked", "drop", "loads", "checked"),
    [
        *(("auto", "2", True, "logits"), ("auto", "2", False, "logits"), ("auto", "2-3", False, "load")),
        *(("auto", "2-3", True, "logits"), ("logits", "2-3", False, "logits"), ("none", "2", True, "none")),
    ],
)
def test_logits_are_compared_where_the_model_fits_or_is_run_anyway(
    source: Source, asked: str, drop: str, loads: bool, checked: str
) -> None:
    compute = Compute("cpu") if loads else SMALL
    found = made(source, goal=goal(drop=drop), output=Output(verify=asked), compute=compute)
    assert found.verify == checked and found.loads is loads
    assert any("memory" in note for note in found.notes) is not loads


def test_it_is_decided_once(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that was loaded is verified by its logits, and nobody asks a second time."""
    asked: list[int] = []
    monkeypatch.setattr(memory, "fits", lambda nbytes, *_, **__: not asked and not asked.append(nbytes))  # type: ignore[func-returns-value]
    request = ConvertRequest(source.name, goal(drop="2-3"), output=Output(tmp_path / "out"))
    assert convert(request).verified == "logits" and len(asked) == 1


def test_the_plan_records_the_memory_and_a_replay_decides_the_same(source: Source, tmp_path: Path) -> None:
    def memory_of(**given: Any) -> MemoryRecord | None:
        return made(source, **given).memory

    small = MemoryRecord(300_000, None, loaded=False)
    assert memory_of(compute=SMALL) == small
    assert memory_of(goal=goal(drop="2-3"), compute=SMALL) is None, "the model is not run"
    replayed = {"plan": plan(FOLD, memory=small), "text": Text("t.txt")}
    assert memory_of(**replayed) == small
    found = memory_of(**replayed, compute=Compute("cpu", memory=10**9))
    assert found == MemoryRecord(10**9, None, loaded=True), "what is given wins"
    written = convert(ConvertRequest(source.name, goal(drop="2-3"), output=Output(tmp_path / "out"), compute=SMALL))
    assert written.plan.memory is None
    logits = Output(tmp_path / "logits", verify="logits")
    written = convert(ConvertRequest(source.name, goal(drop="2-3"), output=logits, compute=SMALL))
    assert written.plan.memory == small == Plan.load(tmp_path / "logits").memory


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (Compute("cpu", memory=10_000), "--memory 10KB: too little for one layer of .*; give at least 124KB$"),
        (Compute("cuda"), "--device cuda: not available here .*; use auto or cpu$"),
    ],
)
def test_memory_for_less_than_a_layer_and_a_device_that_is_not_there(
    source: Source, compute: Compute, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        made(source, compute=compute, output=Output(verify="logits"))


def test_too_little_free_memory_is_an_error_and_not_another_way(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_UNNOTICED", 1000)
    monkeypatch.setattr(memory, "available", lambda: 300_000)
    with pytest.raises(OutOfMemory, match="too little memory is free: [0-9.]+MB are needed, .* give --heal none$"):
        made(source)
    bare = Compensation("none")
    with pytest.raises(OutOfMemory, match="too little memory is free: 1.14MB are needed, .* or .* --memory 300KB$"):
        made(source, compensation=bare)
    assert not made(
        source, compensation=bare, compute=Compute("cpu", memory=300_000), output=Output(verify="logits")
    ).loads
    assert made(source, goal=goal(drop="2-3"), output=Output(verify="none")).memory is None, "the model is not run"


# --- what is refused before anything is loaded ------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_is_measured(source: Source, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("x")
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (PlanError, "out of reach", {"goal": Goal(max_params=1000)}),
        (PlanError, "already", {"goal": Goal(max_bytes=10**12)}),
        (PlanError, "keep between", {"goal": Goal(keep=6)}),
        (PlanError, "has 6", {"plan": Plan.dropping(9, [1])}),
        (OutputError, "not empty", {"output": Output(taken)}),
        (OutputError, "no config.json", {"output": Output(taken, overwrite=True)}),
        (ArchitectureError, "native", {"plan": Plan.whole(6).without([2], []), "selection": Selection(form="native")}),
    ]
    for kind, words, given in cases:
        with pytest.raises(kind, match=words):
            made(source, **given)


def test_values_of_a_request_that_contradict_each_other() -> None:
    for made in (
        lambda: Compensation(None, rank=8),
        lambda: Compensation("fold", rank=8),
        lambda: Compensation("linear"),
        lambda: Compensation("fold", steps=3),
        lambda: Compensation("fold", solver="magic"),
        lambda: Selection("deepest", offset="half"),
        lambda: Output(verify="perhaps"),
        lambda: ConvertRequest("demo"),
        lambda: ConvertRequest("demo", goal(drop="2"), plan()),
    ):
        with pytest.raises(UsageError):
            made()
