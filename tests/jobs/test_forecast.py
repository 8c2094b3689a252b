"""The forecast of a command: its FLOPs are those that torch counts, and what does not fit on the disk is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sources
import torch
from commands import slicer, succeeds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from slicer.checkpoint.hub import DEMO, Source, open_source
from slicer.heal.finetune.settings import Training
from slicer.jobs import costs, forecast
from slicer.jobs.convert import convert
from slicer.jobs.costs import Shape, Stage, Work, work_of
from slicer.jobs.forecast import Clock
from slicer.jobs.heal import expected_training
from slicer.jobs.recipe import Recipe
from slicer.jobs.request import ConvertRequest, HealRequest, Output, Text
from slicer.model.load import blueprint
from slicer.plan.amounts import DAY, Goal, parse_amount, spell_seconds
from slicer.progress import Progress
from slicer.runtime import rates
from slicer.runtime.compute import Compute
from slicer.runtime.rates import Rates

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "float16",
}  # fmt: skip
RATES = Rates({"float16": 4e14, "bfloat16": 4e14, "float32": 1e14, "float64": 5e13}, 1e9)


class Notes(Progress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Counted(TorchDispatchMode):
    """Counts the FLOPs of products by the stage in which they are done."""

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.flops = "", dict[str, float]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, amount = func(*args, **(kwargs or {})), 0.0
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            amount = formula(*args, **(kwargs or {}), out_val=found)
        elif "attention_for_cpu" in str(func):  # of queries and keys [batch, heads, seq, size]
            amount = 4.0 * args[0].numel() * args[1].shape[-2]
        self.flops[self.stage] = self.flops.get(self.stage, 0.0) + amount
        return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(sources.save_llama(tmp_path_factory.mktemp("models") / "tiny", layers=12)))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Llama-2-70B without its weights."""
    path = tmp_path_factory.mktemp("models") / "llama-2-70b"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA_70B))
    return Source(str(path), path, checkpoint=blueprint(path))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return sources.save_text(tmp_path / "text.jsonl", 400)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "measured", lambda *_: RATES)


def asked(source: Source, drop: str = "4", **given: Any) -> ConvertRequest:
    return ConvertRequest(source.name, Goal(drop=parse_amount(drop)), **given)


def test_the_flops_are_those_that_torch_counts(held_out_file: Path, tmp_path: Path) -> None:
    source, counted = open_source("demo"), Counted()

    class Stages(Progress):
        def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
            counted.stage = text

    request = asked(source, text=Text(str(held_out_file), samples=32, seq_len=96), output=Output(tmp_path / "out"))
    work = work_of(Recipe.of(request, source), source.checkpoint, tmp_path / "out", measures=True)
    with counted:
        convert(request, Stages())
    stages = [stage for stage in work.stages if stage.flops]
    assert [stage.name.partition(":")[0] for stage in stages] == [
        "Measuring layers", *2 * ["Healing the cut"], "Comparing with the source"
    ]  # fmt: skip
    for stage in stages:
        # solving is not counted: it is small here
        assert 1 / 1.5 < sum(stage.flops.values()) / counted.flops[stage.name] < 1.5, stage.name


def test_a_dry_run_shows_the_forecast_and_takes_nothing_for_it(source: Source, text: Path) -> None:
    result = succeeds("convert", source.path, "--drop", 4, "--calibration", text, "--samples", 8, "--dry-run", "--json")
    assert "this will take about" in result.stderr and "on 8 sequences of 256 tokens" in result.stderr
    found = json.loads(result.stdout)["forecast"]
    assert {"Measuring layers", "Healing the cut"} < found["seconds"].keys() and found["host_bytes"] > 1e8


def test_a_dry_run_needs_no_weights(source: Source, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((source.path / "config.json").read_text())
    result = succeeds("convert", tmp_path, "--drop", 4, "--dry-run", "--json")
    found = json.loads(result.stdout)
    assert "this will take about" in result.stderr and found["after"]["depth"] == 8
    assert found["forecast"]["seconds"] and "the weights are not here" in found["warnings"][-1]
    refused = slicer("convert", tmp_path, "--drop-attention", 4, "--dry-run")
    assert refused.exit_code == 1 and "weights are not here" in refused.stderr
    assert slicer("convert", tmp_path, "--drop", "4-7").exit_code == 1


def disk_of(free: int) -> Callable[[Any], SimpleNamespace]:
    return lambda place: SimpleNamespace(total=10**15, used=0, free=free)


def test_too_little_disk_is_refused_before_any_work(
    source: Source, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut"
    succeeds("convert", source.path, "--drop", "4-7", "-o", cut)
    monkeypatch.setattr(shutil, "disk_usage", disk_of(10_000))
    for number, command in enumerate([
        ["convert", source.path, "--drop", 4, "--calibration", text],
        ["heal", cut, "--calibration", text],
        ["heal", cut, "--calibration", text, "--method", "lora", "--max-steps", 10],
        ["convert", source.path, "--drop", 4, "--calibration", text, "--heal", "lora", "--max-steps", 10],
    ]):  # fmt: skip
        before = set(tmp_path.iterdir())
        failed = slicer(*command, "-o", tmp_path / f"out-{number}")
        assert failed.exit_code == 1 and set(tmp_path.iterdir()) == before
        assert f"out-{number}" in failed.stderr.splitlines()[-1] and "needs" in failed.stderr, failed.stderr
        assert "10KB free" in failed.stderr.splitlines()[-1]


def test_what_a_stopped_run_left_counts_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slicer.errors import DiskFull
    from slicer.runtime.files import check_disk

    work = tmp_path / "out.work"
    work.mkdir()
    (work / "stage").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(shutil, "disk_usage", disk_of(1 << 20))
    check_disk({work: 2 << 20})
    with pytest.raises(DiskFull, match="out.work"):
        check_disk({work: 2 << 20, tmp_path / "out": 1 << 10})
    (work / "config.json").touch()  # a checkpoint, which stays until the new one is complete
    with pytest.raises(DiskFull):
        check_disk({work: 2 << 20})


def test_the_files_of_the_paper_for_70b(large: Source, tmp_path: Path) -> None:
    """Source, cut, base and result of 387 GB, beside the work; the teacher's outputs of 5.5 TB."""
    distils = {"mismatch_weight": 1.0, "kl_weight": 1.0, "teacher_cache": str(tmp_path / "teacher")}
    healing = HealRequest("", training=Training(max_steps=5000, seq_len=4096, **distils))
    out = tmp_path / "out"
    work = expected_training(asked(large, "32"), healing, large, out)
    three = 2 * work.disk[out] + work.disk[tmp_path / "out.cut"]
    assert (large.checkpoint.total_bytes + three) / 1e9 == pytest.approx(387, rel=0.01)
    assert work.disk[tmp_path / "out.training"] > work.disk[out]
    assert work.disk[tmp_path / "teacher"] / 1e12 == pytest.approx(5.5, rel=0.01)


def test_a_training_of_more_than_a_day_names_what_to_cut(large: Source, tmp_path: Path, measured: None) -> None:
    healing = HealRequest("", training=Training(max_steps=5000, seq_len=4096, lora_r=64))
    work = expected_training(asked(large, "32"), healing, large, tmp_path / "out")
    notes = Notes()
    found = Clock(notes).expect(work, Compute("cpu"), disk=False)
    assert found.seconds["Training"] == pytest.approx(6.8 * DAY, rel=0.05)  # at 100 TFLOP/s
    first, then = notes.notes
    assert "5000 steps of 16 sequences of 4096 tokens" in first and "more than a day" in then
    assert then.endswith(
        "--max-steps 729: 24 h; --train-seq-len 512: 19 h; --train-batch-size 2: 21 h; --lora-r 32: 6.8 days"
    )
    assert work.cheaper is not None
    shares = dict(work.cheaper(0.5))
    assert shares.keys() >= {"--max-steps 2500", "--train-seq-len 2048", "--train-batch-size 8"}
    assert all(share <= 0.55 for option, share in shares.items() if "lora" not in option)


# --- the clock ------------------------------------------------------------------------------------------------------


SHAPE = Shape(12, 64, 100, 1000.0, (96, 64), ((64, 64),), 4000, 100, 50000, "float32")


def work(flops: dict[str, float], **changes: Any) -> Work:
    stages = tuple(Stage(name, {"float32": 1e14 * seconds}) for name, seconds in flops.items())
    return replace(Work(stages, 10**9, 0, {}, SHAPE, 256, None), **changes)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch, measured: None) -> list[float]:
    """The time, in its one element."""
    time = [0.0]
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


def test_short_work_is_not_announced(now: list[float]) -> None:
    notes = Notes()
    assert Clock(notes).expect(work({"one": 20, "two": 30}), Compute("cpu")).total == 50 and not notes.notes
    Clock(notes).expect(work({"one": 20, "two": 60}), Compute("cpu"))
    assert notes.notes == ["this will take about 80 s (one 20 s, two 60 s), 1GB of memory"]


@pytest.mark.parametrize(("took", "said"), [(25, None), (80, "more time than forecast: about 6.7 min are left")])
def test_the_first_long_stage_corrects_the_rest(now: list[float], took: float, said: str | None) -> None:
    notes = Notes()
    clock = Clock(notes)
    before = work({"one": 20, "two": 100})
    clock.expect(replace(before, stages=(Stage("Loading", reads=1e10), *before.stages)), Compute("cpu"))
    clock.stage("Loading")  # says nothing about how fast this machine computes
    now[0] += 100
    clock.stage("one")
    now[0] += took
    clock.stage("two")
    now[0] += 100
    clock.expect(work({"two": 100}), Compute("cpu"))  # the plan is chosen: nothing new
    forecast, done = clock.finish(None)
    assert forecast.seconds == {"Loading": 10, "one": 20, "two": 100}
    assert done.seconds == {"Loading": 100, "one": took, "two": 100}
    assert len(notes.notes) == 1 + (said is not None) and (said is None or said in notes.notes[1])


def test_the_first_steps_correct_a_training(now: list[float]) -> None:
    notes = Notes()
    clock = Clock(notes)
    both = {"Healing the cut": 50, "Training": 1000}
    clock.expect(work(both, cheaper=lambda share: [("--max-steps 1", share)]), Compute("cpu"))
    clock.stage("Healing the cut", 12, "layers")
    for _ in range(10):
        now[0] += 5
        clock.advance()
    clock.stage("Training", 1000, "steps")
    for _ in range(10):
        now[0] += 200
        clock.advance()
    assert "by its first steps the training takes about 2.3 days" in notes.notes[1]
    assert notes.notes[2] == "that is more than a day; to cut it: --max-steps 1: 24 h" and len(notes.notes) == 3


def test_a_long_run_leaves_both_beside_its_plan_and_the_next_one_does_not_take_them(
    source: Source, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: list[object] = ["--calibration", text, "--samples", 16, "--seq-len", 32, "-o"]
    file = Path("slicer") / "forecast.json"
    succeeds("convert", source.path, "--drop", 4, *few, tmp_path / "short")
    assert not (tmp_path / "short" / file).exists()
    with monkeypatch.context() as patch:
        patch.setattr(forecast, "LONG", 0.0)
        result = succeeds("convert", source.path, "--drop", 4, *few, tmp_path / "long")
    found = json.loads((tmp_path / "long" / file).read_text())
    assert found["forecast"]["seconds"].keys() <= {*found["took"]["seconds"], "Writing"}
    assert found["took"]["host_bytes"] > 1e8 and "this will take" in result.stderr
    succeeds("heal", tmp_path / "long", *few, tmp_path / "healed")
    assert not (tmp_path / "healed" / file).exists() and (tmp_path / "healed" / "slicer" / "plan.json").exists()


def test_times_in_words() -> None:
    found = [spell_seconds(s) for s in (0.4, 89, 91, 3600, 6 * 3600, 40 * 3600, 4.2 * DAY, 1.51 * 365 * DAY)]
    assert found == ["0 s", "89 s", "1.5 min", "60 min", "6 h", "1.7 days", "4.2 days", "1.5 years"]


def test_the_rates_of_this_machine(tmp_path: Path) -> None:
    work = {"float32": 1e9, "float64": 1e8, "bfloat16": 0.0}
    weights = DEMO / "model.safetensors"
    found = rates.measured(work, [(64, 64), (96, 64)], 64, Compute("cpu"), weights)
    assert found.flops.keys() == {"float32", "float64"} and min(found.flops.values()) > 1e6
    large = tmp_path / "large"
    large.write_bytes(bytes(40 << 20))
    reads = rates.measured({}, [], 1, Compute("cpu"), large).reads
    assert reads is not None and reads > 1e6


def test_analysis_is_announced_too(source: Source, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "LONG", 0.0)
    result = succeeds(
        "analyze", source.path, "--calibration", text, "--samples", 8, "--seq-len", 16, "--losses", 2, "--greedy", 1,
        "--shapley", 30, "--sublayers", "-o", tmp_path / "out",
    )  # fmt: skip
    assert "this will take about" in result.stderr and "loss without each block of 2" in result.stderr


def test_a_sweep_is_announced_without_its_evaluations(
    held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "LONG", 0.0)
    result = succeeds(
        "sweep", "demo", "--drop", "0,4", "--strategies", "similarity", "--heal", "none,fold", "--tasks", "c4",
        "--text", held_out_file, "--limit", 2, "--calibration", held_out_file, "--samples", 16, "--seq-len", 32,
        "-o", tmp_path / "sweep",
    )  # fmt: skip
    assert "folding 1 cells" in result.stderr and "beside the evaluation of each cell" in result.stderr


def test_a_budget_is_foreseen_by_the_mean_layer(source: Source) -> None:
    layer = (source.checkpoint.parameters - 2 * 258 * 64 - 64) // 12
    goal = Goal(max_params=source.checkpoint.parameters - 3 * layer)
    assert costs.dropped_by(goal, source.checkpoint, None) in (3, 4)
    assert torch.get_default_dtype() == torch.float32
