"""Plans and their records, in and out of JSON; what slicer 0.1 wrote is read for good."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cuts import cutting

from slicer.errors import ArchitectureError, PlanError
from slicer.plan.plan import Plan
from slicer.plan.records import (
    CorpusRecord,
    HealingRecord,
    Losses,
    MemoryRecord,
    MergeRecord,
    RankRecord,
    RunnerUp,
    SolvedMatrix,
    TextRecord,
    TrainingRecord,
)

OLD = Path(__file__).with_name("written_by_0.1")
TEXT = TextRecord("text.txt", 16, 128, sha256="9e6e450007470a1bfe78e050215e06e1ba56a887b82a48c8833ec20c9bbd6100")


def old(name: str) -> Plan:
    return Plan.load(OLD / f"{name}.json")


def repair(name: str) -> HealingRecord:
    record = old(name).healing
    assert record is not None
    return record


def full() -> Plan:
    """A plan in which every field has a value."""
    text = TextRecord("x", 4, 8, 2, 1, "body", "abc", (0, 3))
    corpus = CorpusRecord("x", 9, 2, "answers", "y", 12, 3, 1, 5, "body")
    training = TrainingRecord(
        "fold", {"learning_rate": 1.0}, {"learning_rate": 1.0, "lora_r": 2}, corpus, {0: 3.0, 5: 2.5}, "early", 1.5, 2,
        RankRecord("mmlu", 8, {"8": 0.5, "2": None}),
    )  # fmt: skip
    solved = SolvedMatrix(1, "mlp.down_proj", "direct", 0.1, 0.5, 0.2)
    fold = HealingRecord("fold", text, Losses(2.0, 3.0, 2.5), ("a", "b"), "resolve", solved=(solved,))
    healing = HealingRecord(
        "lora", text, Losses(2.0, 2.5, 2.4), ("a",), "resolve", None, 5, 5, "float32", (), training, fold, "slicer"
    )
    merge = MergeRecord("adapter", "abc", "base", True, ("a",), ("b",), "logits", 1e-6, 1e-3, "slicer merge")
    return Plan(
        8, (0, 1, 4, 6, 7), "similarity", "org/name", "main", "llama", 0.25, "cka", (RunnerUp("3-4", 0.3),), text, 3,
        "bfloat16", {"torch": "1"}, "slicer convert", Plan.dropping(9, [2]), healing, (merge, merge), (0,), (7,),
        ((1, 3),), "blockwise", MemoryRecord(10**9, None, True),
    )  # fmt: skip


def test_a_plan_survives_json_with_every_record() -> None:
    plan = full()
    assert Plan.from_json(plan.to_json()) == plan
    written = json.loads(plan.to_json())
    assert written["format"] == 3 and written["dropped"] == [2, 3, 5] and written["merged"][1]["renumber"]
    asked_nothing = HealingRecord(
        "lora", None, Losses(), training=TrainingRecord("cut", {}, {}, CorpusRecord("x", 0, 0))
    )
    plan = replace(Plan.dropping(4, [1]), healing=asked_nothing)
    assert Plan.from_json(plan.to_json()) == plan
    bare = Plan.dropping(4, [1])
    assert Plan.from_json(bare.to_json()) == bare and json.loads(bare.to_json())["healing"] is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"depth": 4}', '{"depth": 4, "kept": [9]}', '{"depth": 4, "kept": [1, 1]}',
     '{"depth": "4", "kept": [1]}', '{"depth": 4, "kept": [true]}', '{"depth": 4, "kept": [1], "joined": [[0]]}',
     '{"depth": 4, "kept": []}', '{"depth": 4, "kept": [0,1,2,3]}', '{"format": 99, "depth": 4, "kept": [1]}'],
)  # fmt: skip
def test_bad_plans_are_refused_by_name(text: str) -> None:
    with pytest.raises(PlanError, match="here.json"):
        Plan.from_json(text, "here.json")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": "3"}, "plan.seed"),
        ({"no_ffn": [None]}, r"plan.no_ffn\[0\]"),
        ({"calibration": {"source": "x", "samples": 1.5, "seq_len": 2}}, "plan.calibration.samples"),
        ({"runners_up": [{"block": "1-2"}]}, r"plan.runners_up\[0\].distance"),
        ({"healing": {"method": "fold", "loss": {"source": "low"}}}, "plan.healing.loss.source"),
        ({"healing": {"method": "fold"}}, "plan.healing.loss"),
        ({"healing": {"method": "bias", "calibration": [], "behind": 3, "loss": {}}}, "plan.healing"),
        ({"merged": [{"adapter": 3}]}, r"plan.merged\[0\].adapter"),
        ({"parent": {"depth": 3}}, "plan.parent.kept"),
        ({"versions": ["1"]}, "plan.versions"),
        ({"memory": {"host": "8GB", "device": None, "loaded": True}}, "plan.memory.host"),
    ],
)
def test_the_field_at_fault_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(PlanError, match=f"here.json: {field}"):
        Plan.from_json(json.dumps({"depth": 4, "kept": [0, 1]} | change), "here.json")


def test_what_is_dropped_is_enough() -> None:
    assert Plan.from_json('{"depth": 4, "dropped": [1]}').kept == (0, 2, 3)
    assert Plan.from_json('{"depth": 4, "dropped": [1], "of_tomorrow": 1}').kept == (0, 2, 3)


def test_sublayers_go_and_a_layer_without_both_is_dropped() -> None:
    plan = cutting(6, [1], attention=[2, 3], ffn=[3, 4])
    assert plan.dropped == (1, 3) and plan.no_attention == (2,) and plan.no_ffn == (4,)
    assert plan.without([4], []).dropped == (1, 3, 4)
    assert plan.gone == (frozenset({1, 2, 3}), frozenset({1, 3, 4})) and not plan.complete
    half = Plan(6, (0, 1, 4, 5), joined=((1, 3),))
    assert half.complete and half.below_layers and half.sublayers[1] == (1, 3)
    assert half.without([1], [3]).dropped == (1, 2, 3) and half.without([1], [3]).joined == ()
    for wrong in ({"layers": [2], "attention": [2]}, {"ffn": [6]}, {"layers": [-1]}):
        with pytest.raises(PlanError):
            cutting(6, **wrong)  # type: ignore[arg-type]


def test_the_form_follows_from_what_is_missing() -> None:
    missing, whole = cutting(6, attention=[2]), Plan.dropping(6, [2])
    assert missing.in_form(None).form == "blockwise" and whole.in_form(None).form == "native"
    assert missing.in_form("zeroed").form == "zeroed" and whole.in_form("zeroed").form == "native"
    with pytest.raises(ArchitectureError, match="--format native"):
        missing.in_form("native")


@pytest.mark.parametrize("name", [file.stem for file in sorted(OLD.glob("*.json"))])
def test_every_old_plan_is_read_and_written_anew(name: str) -> None:
    plan, before = old(name), json.loads((OLD / f"{name}.json").read_text("utf-8"))
    assert Plan.from_json(plan.to_json()) == plan
    for field in ("depth", "kept", "dropped", "strategy", "distance", "seed", "versions", "command", "source"):
        assert json.loads(plan.to_json())[field] == before[field], field
    assert plan.below_layers == (before["format"] == 2)


def test_an_old_fold() -> None:
    record = repair("whole")
    assert (record.method, record.solver, record.precision) == ("fold", "resolve", "float32")
    assert record.loss == Losses(3.188845, 3.573926, 3.581041) and not record.loss.falls
    assert record.text is not None and record.text.source == "self" and record.text.held_out == (8,)
    assert record.solved[0] == SolvedMatrix(3, "self_attn.o_proj", "newton", change=0.093681)
    assert len(record.tensors) == 12 and record.training is None and not record.adds_maps
    plan = old("whole")
    assert plan.runners_up[0].block == "4-6" and plan.calibration == replace(record.text, held_out=())


def test_old_folds_below_the_layer() -> None:
    half, attention = old("half-offset"), old("attention")
    assert half.joined == ((4, 6),) and half.calibration == TEXT and half.complete
    assert repair("half-offset").solved[0].module == "output of the attention"
    assert attention.no_attention == (6, 10) and attention.form == "blockwise"
    assert {entry.way for entry in repair("attention").solved} == {"direct", "newton"}


def test_old_maps_behind_sublayers_are_a_repair() -> None:
    linear, bias = repair("linear"), repair("bias")
    assert (linear.method, linear.rank, linear.steps, linear.best_step) == ("linear", 4, 4, 4)
    assert linear.loss == Losses(4.428993, 5.215691, 4.98414, 5.076153)
    assert linear.text == replace(TEXT, held_out=(8,))
    assert linear.solved[0] == SolvedMatrix(1, "attention", "linear", error_left=0.526238)
    assert bias.method == "bias" and bias.rank is None and bias.loss == Losses(4.428993, 4.678977, 4.674184)
    assert linear.adds_maps and not old("linear").complete and not old("bias").complete


def test_an_old_training_and_what_came_before_it() -> None:
    record = repair("trained-twice")
    assert record.training is not None and record.training.start == "lora" and record.method == "full"
    assert record.training.corpus.documents == 196 and record.training.asked["max_steps"] == 1
    lora = record.earlier
    assert lora is not None and lora.training is not None and lora.training.settings["lora_r"] == 2
    assert lora.training.held_out == {0: 4.252074, 1: 4.250752, 2: 4.250181} and lora.best_step == 2
    assert lora.earlier is not None and lora.earlier.method == "fold" and lora.earlier.solved
    swept = repair("rank-sweep")
    assert swept.training is not None and swept.training.rank_sweep is not None
    assert swept.training.rank_sweep.picked == 2 and swept.training.rank_sweep.metric == "loss"


def test_a_training_on_the_default_text_names_it() -> None:
    """0.1 noted the text as it was asked for: null, where nothing was."""
    record = json.loads((OLD / "rank-sweep.json").read_text("utf-8"))
    record["healing"]["calibration"]["source"] = None
    text = Plan.from_json(json.dumps(record)).healing
    assert text is not None and text.text is not None and text.text.source == "text.txt"


def test_old_merges_one_or_more() -> None:
    plan = old("merged-twice")
    assert [m.adapter for m in plan.merged] == ["adapter", "adapter2"] and plan.merged[0].verified == "logits"
    record = json.loads((OLD / "merged-twice.json").read_text("utf-8"))
    one = Plan.from_json(json.dumps({**record, "merged": record["merged"][0]}))
    assert one.merged == plan.merged[:1]


def test_an_old_plan_of_a_source_that_was_sliced() -> None:
    plan = old("sliced-again")
    assert plan.parent is not None and plan.parent.joined == ((4, 6),) and plan.parent.healing is not None


def test_losses_that_did_not_fit_in_memory_are_those_of_training() -> None:
    record = repair("rank-sweep")
    assert record.measured == record.loss
    unmeasured = replace(record, loss=Losses())
    assert unmeasured.measured == Losses(None, 4.282561, 4.281145) and unmeasured.measured.falls
