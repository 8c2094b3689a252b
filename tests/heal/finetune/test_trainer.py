"""Healing by training, end to end on small models: what is written, what is resumed, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import files
import pytest
import sources
import torch
from commands import slicer, succeeds
from processes import TRAINING, ForkServer

from slicer.plan.plan import Plan

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

FEW: list[object] = [
    "--max-steps",
    12,
    "--train-batch-size",
    4,
    "--train-seq-len",
    32,
    "--lora-r",
    4,
    "--learning-rate",
    3e-3,
]
FEW += ["--eval-every", 3, "--validation-samples", 4]
QUICK: list[object] = ["--train-from", "cut", "--verify", "none"]


def record_of(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((path / "slicer" / "plan.json").read_text())["healing"]
    return record


def history_of(path: Path) -> dict[str, Any]:
    history: dict[str, Any] = json.loads((path / "slicer" / "training.json").read_text())
    return history


@pytest.fixture(scope="module")
def text(held_out_file: Path) -> list[object]:
    """The data options: text that the embedded model was not trained on."""
    return ["--calibration", held_out_file, "--samples", 64, "--seq-len", 32]


@pytest.fixture(scope="module")
def trained(sliced: Path, text: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qlora whose adapter is kept in `adapter` beside it."""
    out = tmp_path_factory.mktemp("trained") / "out"
    adapter = out.parent / "adapter"
    succeeds("heal", sliced, "--method", "qlora", *text, *FEW, "--save-adapter", adapter, "-o", out)
    return out


def test_it_is_recorded_and_the_loss_falls(sliced: Path, trained: Path) -> None:
    record, history = record_of(trained), history_of(trained)
    assert (
        record["method"] == "qlora"
        and record["training"]["start"] == "fold"
        and record["earlier"]["solver"] == "resolve"
    )
    assert (
        record["training"]["settings"]["lora_r"] == 4
        and record["training"]["settings"]["lora_alpha"] == 4
        and record["training"]["settings"]["seed"] == 0
    )
    assert record["loss"]["after"] < record["loss"]["before"] and record["best_step"] > 0
    assert list(history["train"]) == [str(step) for step in range(1, 13)]
    assert "0" in history["held_out"] and "12" in history["held_out"]
    card = (trained / "README.md").read_text()
    assert f"{record['loss']['after']:.4f}" in card and "rank 4, alpha 4" in card
    assert (trained / "slicer" / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert os.listdir(trained.parent).count("out") == 1 and "out.training" not in os.listdir(trained.parent)
    assert "qlora" in succeeds("inspect", trained).output
    assert json.loads((sliced / "config.json").read_text()) == json.loads((trained / "config.json").read_text())


def test_merged_is_the_base_with_the_adapter(sliced: Path, trained: Path, tmp_path: Path) -> None:
    """The merged weights give the logits of the unquantized folded weights with the adapter put on by peft. The adapter
    is merged by hand into those, and not into the bare cut, which has the same names and shapes."""
    from transformers import AutoModelForCausalLM

    kept = trained.parent / "adapter"
    old, new = files.read_tensors(kept / "base"), files.read_tensors(trained)
    tokens = torch.randint(4096, (2, 32), generator=torch.Generator().manual_seed(1))
    merged = AutoModelForCausalLM.from_pretrained(trained)(tokens).logits
    place = json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), kept).eval()
    apart = (adapter(tokens).logits - merged).abs().max() / merged.abs().max()
    assert apart < 1e-5
    named = {name.removeprefix("base_model.model.") for name, m in adapter.named_modules() if hasattr(m, "lora_A")}
    assert {f"{name}.weight" for name in named} == {key for key in old if old[key] != new[key]}
    assert len(named) == 3 * 4
    result = slicer("merge", sliced, kept, "-o", tmp_path / "wrong")
    assert result.exit_code == 1 and str(kept / "base") in result.output
    succeeds("merge", place, kept, "-o", tmp_path / "right")
    assert files.read_tensors(tmp_path / "right") == new and os.listdir(tmp_path) == ["right"]


def test_merging_the_kept_adapter_by_hand_gives_the_same_bytes(
    sliced: Path, text: list[object], tmp_path: Path
) -> None:
    given = ["--method", "lora", "--train-from", "cut", *text, *FEW, "--save-adapter", tmp_path / "adapter", "--json"]
    done = json.loads(succeeds("heal", sliced, *given, "-o", tmp_path / "a").stdout)
    assert done["verified"] == "logits" and done["logits_error"] < 1e-5 and done["rounding_error"] < 1e-5
    succeeds("merge", sliced, tmp_path / "adapter", "-o", tmp_path / "b")
    assert files.read_tensors(tmp_path / "a") == files.read_tensors(tmp_path / "b")
    assert record_of(tmp_path / "a")["training"]["start"] == "cut"
    # What was merged can be trained on, from the weights as they are.
    more = ["--method", "lora", *text, *FEW, "--max-steps", 2, "--verify", "none"]
    succeeds("heal", tmp_path / "b", *more, "-o", tmp_path / "further")
    assert record_of(tmp_path / "further")["loss"]["before"] == pytest.approx(done["healing"]["loss"]["after"])
    assert len(Plan.load(tmp_path / "further").merged) == 1
    assert "LoRA adapters merged into it: 1" in (tmp_path / "further" / "README.md").read_text()


def test_gradient_checkpointing_changes_no_loss(
    sliced: Path, text: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    turned_on: list[str] = []
    honest, name = PreTrainedModel.gradient_checkpointing_enable, "a"
    monkeypatch.setattr(
        PreTrainedModel, "gradient_checkpointing_enable",
        lambda *given, **more: turned_on.append(name) or honest(*given, **more),
    )  # fmt: skip
    given = ["heal", sliced, "--method", "lora", *QUICK, *text, *FEW, "--max-steps", 4, "--micro-batch", 2]
    given += ["--validation-samples", 1]  # fewer than a pass takes
    succeeds(*given, "-o", tmp_path / "a")
    name = "b"
    succeeds(*given, "--gradient-checkpointing", "-o", tmp_path / "b")
    assert set(turned_on) == {"b"}
    a, b = history_of(tmp_path / "a"), history_of(tmp_path / "b")
    assert all(abs(a["train"][k] - b["train"][k]) < 1e-5 for k in a["train"])
    result = slicer(*given, "--report-to", "no-such-tracker", "-o", tmp_path / "c")
    assert result.exit_code == 1 and "--report-to no-such-tracker" in result.output
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_bfloat16_weights_are_rounded_once(text: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model is stored in bfloat16: what is left between its logits and the adapter's is rounding. And a
    conversion that is stopped while it trains goes on from there."""
    from slicer.heal.finetune import run
    from slicer.heal.finetune.callbacks import TrainingCallback
    from slicer.jobs import heal as job

    honest = TrainingCallback.on_save

    def stopped(*given: Any, **more: Any) -> None:
        honest(*given, **more)
        raise KeyboardInterrupt

    def stopped_writing(*_: Any) -> None:
        raise KeyboardInterrupt

    given = [
        "convert",
        "demo",
        "--drop",
        "4-6",
        "--heal",
        "lora",
        *text,
        *FEW,
        "--learning-rate",
        1e-3,
        "-o",
        tmp_path / "out",
    ]
    monkeypatch.setattr(TrainingCallback, "on_save", stopped)
    assert slicer(*given).exit_code == 130 and sorted(os.listdir(tmp_path)) == ["out.cut", "out.training"]
    monkeypatch.setattr(TrainingCallback, "on_save", honest)
    writing: Any = job.write_verified
    monkeypatch.setattr(job, "write_verified", stopped_writing)
    assert slicer(*given).exit_code == 130  # trained to its end, and not written
    monkeypatch.setattr(job, "write_verified", writing)
    monkeypatch.setattr(run, "train", None)
    done = json.loads(succeeds(*given, "--json").stdout)
    assert done["verified"] == "logits" and done["logits_error"] < 1e-5 and 0 < done["rounding_error"] < 1e-2
    assert done["healing"]["loss"]["after"] < done["healing"]["loss"]["before"]
    assert done["dropped"] == [4, 5, 6] and done["healing"]["training"]["start"] == "fold"
    assert os.listdir(tmp_path) == ["out"]


def test_all_weights_can_be_trained(sliced: Path, text: list[object], tmp_path: Path) -> None:
    few = [*FEW]
    del few[few.index("--lora-r") : few.index("--lora-r") + 2]
    given = ["--method", "full", "--train-from", "cut", *text, *few, "--learning-rate", 1e-3]
    done = json.loads(succeeds("heal", sliced, *given, "-o", tmp_path / "out", "--json").stdout)
    assert done["logits_error"] < 1e-5 and done["healing"]["loss"]["after"] < done["healing"]["loss"]["before"]
    old, new = files.read_tensors(sliced), files.read_tensors(tmp_path / "out")
    assert old.keys() == new.keys() and old["model.norm.weight"] != new["model.norm.weight"]
    assert "lora_r" not in done["healing"]["training"]["settings"]
    # It can be trained further, and healed again from the source's own bytes.
    more = ["--method", "lora", *text, *FEW, "--max-steps", 2, "--verify", "none", "--json"]
    further = json.loads(succeeds("heal", tmp_path / "out", *more, "-o", tmp_path / "further").stdout)["healing"]
    assert further["training"]["start"] == "full" and further["loss"]["before"] == done["healing"]["loss"]["after"]
    succeeds("heal", tmp_path / "out", "--method", "fold", *text, "-o", tmp_path / "folded")
    succeeds("heal", sliced, "--method", "fold", *text, "-o", tmp_path / "expected")
    assert files.read_tensors(tmp_path / "folded") == files.read_tensors(tmp_path / "expected")


def test_a_killed_run_goes_on_with_the_same_losses(
    forks: ForkServer, sliced: Path, text: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    passes: list[str] = []
    honest = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *given: passes.append(name) or honest(*given))
    name = "undisturbed"
    given = ["heal", sliced, "--method", "lora", *QUICK, *text, *FEW, "--max-steps", 24, "--eval-every", 4]
    given += ["--patience", 0, "--lora-dropout", 0.1]
    succeeds(*given, "-o", tmp_path / "undisturbed")
    work = tmp_path / "killed.training"
    run = forks.start(*given, "-o", tmp_path / "killed", modules=TRAINING)
    run.kill_when(lambda: any(work.glob("run/checkpoint-*/complete")))
    assert not (tmp_path / "killed").exists() and work.is_dir()
    other = slicer(*given, "--learning-rate", 1e-4, "-o", tmp_path / "killed")
    assert other.exit_code == 1 and "unfinished training" in other.output
    name = "resumed"
    succeeds(*given, "-o", tmp_path / "killed")
    assert passes.count("resumed") <= passes.count("undisturbed") * 20 / 24
    assert history_of(tmp_path / "killed") == history_of(tmp_path / "undisturbed")
    assert files.read_tensors(tmp_path / "killed") == files.read_tensors(tmp_path / "undisturbed")
    assert not work.exists()


def test_two_processes_train_as_one(forks: ForkServer, sliced: Path, text: list[object], tmp_path: Path) -> None:
    given = ["heal", sliced, "--method", "lora", "--train-from", "cut", "--verify", "none", *text, *FEW]
    given += ["--lora-dropout", 0, "--micro-batch", 2]
    succeeds(*given, "-o", tmp_path / "one")
    for run in forks.start_group(2, *given, "-o", tmp_path / "two", modules=TRAINING):
        run.succeeds()
    one, two = history_of(tmp_path / "one"), history_of(tmp_path / "two")
    for kind in ("train", "held_out"):
        assert one[kind].keys() == two[kind].keys()
        assert all(abs(one[kind][k] - two[kind][k]) < 1e-4 for k in one[kind]), (one[kind], two[kind])
    assert record_of(tmp_path / "two")["training"]["processes"] == 2


def test_a_plan_that_was_trained_is_trained_again(trained: Path, tmp_path: Path) -> None:
    plan = trained / "slicer" / "plan.json"
    succeeds("convert", "demo", "--plan", plan, "--dtype", "float32", "-o", tmp_path / "again")
    assert record_of(tmp_path / "again")["training"]["held_out"] == record_of(trained)["training"]["held_out"]
    assert files.read_tensors(tmp_path / "again") == files.read_tensors(trained)


def test_a_half_offset_cut_that_was_trained_is_trained_again_on_the_same_text_or_another(
    text: list[object], tmp_path: Path
) -> None:
    few = ["--max-steps", 2, "--train-batch-size", 4, "--train-seq-len", 32, "--lora-r", 4, "--seed", 3, *QUICK]
    succeeds("convert", "demo", "--drop", 3, *text, "--heal", "none", "-o", tmp_path / "cut")
    succeeds("heal", tmp_path / "cut", "--method", "lora", *text, *few, "-o", tmp_path / "trained")
    assert Plan.load(tmp_path / "trained").joined
    plan = ["convert", "demo", "--plan", tmp_path / "trained", "--verify", "load"]
    succeeds(*plan, "-o", tmp_path / "again")
    assert files.read_tensors(tmp_path / "again") == files.read_tensors(tmp_path / "trained")
    other = sources.save_text(tmp_path / "other.jsonl", 60)
    succeeds(*plan, "--calibration", other, "-o", tmp_path / "other")
    first, then = record_of(tmp_path / "trained"), record_of(tmp_path / "other")
    assert then["method"] == "lora" and then["training"]["settings"] == first["training"]["settings"]
    sources_of = [record["training"]["corpus"]["source"] for record in (first, then)]
    assert sources_of[1] == str(other) != sources_of[0]


def test_early_stop_and_a_loss_that_is_not_finite_keep_the_best(
    sliced: Path, text: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slicer.heal.finetune import trainer as train

    honest = train.cross_entropy
    given = [
        "heal",
        sliced,
        "--method",
        "lora",
        "--train-from",
        "cut",
        *text,
        *FEW,
        "--eval-every",
        2,
        "--verify",
        "none",
    ]

    def spoilt(after: int) -> Any:
        calls = [0]

        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            calls[0] += logits.requires_grad
            return honest(logits, labels) * (float("nan") if calls[0] > after else 1.0)

        return loss

    monkeypatch.setattr(train, "cross_entropy", spoilt(5))
    done = json.loads(succeeds(*given, "-o", tmp_path / "nan", "--json").stdout)["healing"]
    assert done["training"]["ended"] == "diverged" and done["best_step"] == 4 and done["loss"]["before"] is not None
    monkeypatch.setattr(train, "cross_entropy", spoilt(0))
    result = slicer(*given, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "not finite" in result.output and "--learning-rate" in result.output
    monkeypatch.setattr(train, "cross_entropy", honest)
    given += ["--learning-rate", 3, "--warmup-steps", 0, "--patience", 2, "--save-adapter", tmp_path / "adapter"]
    result = succeeds(*given, "-o", tmp_path / "early", "--json")
    done = json.loads(result.stdout)["healing"]
    assert "no adapter saved" in result.stderr
    assert done["training"]["ended"] == "early" and done["best_step"] == 0 and done["steps"] == 4
    assert files.read_tensors(tmp_path / "early") == files.read_tensors(sliced)  # nothing was better
    assert sorted(os.listdir(tmp_path)) == ["early", "nan"]


def test_out_of_memory_says_what_helps(
    sliced: Path, text: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slicer.heal.finetune import trainer as train

    def fails(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(train, "cross_entropy", fails)
    result = slicer("heal", sliced, "--method", "lora", *text, *FEW, "-o", tmp_path / "out")
    assert result.exit_code == 1 and not os.listdir(tmp_path)
    for option in ("--micro-batch 1", "--gradient-checkpointing", "--method qlora", "--train-seq-len 16"):
        assert option in result.stderr


def test_the_block_is_one_of_whole_layers(text: list[object], tmp_path: Path) -> None:
    """By similarity, where a half-offset block lies closer on the embedded model."""
    given = ["convert", "demo", "--drop", 3, *text]
    nearest = json.loads(succeeds(*given, "--heal", "none", "--dry-run", "--json").stdout)
    assert nearest["joined"], "a half-offset block is no longer the closest here: choose another number of layers"
    few = ["--max-steps", 2, "--train-batch-size", 4, "--train-seq-len", 32, "--lora-r", 4, "--validation-samples", 4]
    out = tmp_path / "out"
    done = json.loads(succeeds(*given, "--heal", "lora", *few, *QUICK, "-o", out, "--json").stdout)
    assert len(done["dropped"]) == 3 and not Plan.load(out).joined


@pytest.mark.parametrize(
    "asked", [["--drop-attention", "3"], ["--drop-ffn", "4-5"], ["--drop", "3", "--offset", "half"]]
)
def test_parts_of_layers_are_not_trained(asked: list[str], text: list[object], tmp_path: Path) -> None:
    result = slicer("convert", "demo", *asked, *text, "--heal", "lora", "--max-steps", 2, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "--heal fold, bias or linear" in result.output
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["everywhere", "packed"])
def test_training_that_would_move_nothing_stops(
    text: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A graph cut before the adapters; and bitsandbytes' packing itself, where the processor does it."""
    from slicer.heal.finetune import callbacks, run
    from slicer.heal.finetune import model as adapters

    if where == "packed":
        from bitsandbytes.functional import has_avx512bf16

        if not has_avx512bf16():
            pytest.skip("needs a processor with AVX512-BF16")
        monkeypatch.setattr(adapters, "unpack", lambda model: None)
        monkeypatch.setattr(callbacks, "unpack", lambda model: None)
    else:
        honest = adapters.load

        def cut(*args: Any, **given: Any) -> Any:
            model = honest(*args, **given)
            model.get_submodule("base_model.model.model.norm").register_forward_hook(
                lambda module, inputs, output: output.detach()
            )
            return model

        monkeypatch.setattr(run, "load", cut)
    whole = sources.save_llama(tmp_path / "whole", hidden_size=128, intermediate_size=256)
    sliced = tmp_path / "sliced"
    succeeds("convert", whole, "--drop", "2-3", "--heal", "none", "-o", sliced)
    compute = ["--compute", "bfloat16"] if where == "packed" else []
    given = [*text, *FEW, "--eval-every", 3, "--train-from", "cut", *compute]
    result = slicer("heal", sliced, "--method", "qlora", *given, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "no gradient reaches" in result.output, result.output


def test_bad_input_is_one_line_and_leaves_nothing(
    sliced: Path, text: list[object], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    other = sources.save_llama(tmp_path_factory.mktemp("other") / "other")
    short = tmp_path_factory.mktemp("short") / "short.txt"
    short.write_text("Too little.")
    cases: list[tuple[list[object], str, int]] = [
        ([sliced, "--base-model", other, *text, *FEW], "12", 1),
        ([other, *text, *FEW], "plan", 1),
        ([sliced, "--calibration", short, *FEW], "too short", 1),
        ([sliced, *text, *FEW, "--validation", short], "held out", 1),
        ([sliced, *text, *FEW, "--train-seq-len", 100_000], "512 tokens", 2),
        ([sliced, *text, *FEW, "--micro-batch", 3], "--micro-batch 3", 2),
        ([sliced, *text, *FEW, "--teacher", other], "--kl-weight", 2),
        ([sliced, *text, *FEW, "--learning-rate", -1], "--learning-rate", 2),
    ]
    for given, word, code in cases:
        result = slicer("heal", *given, "--method", "lora", "-o", tmp_path / "out")
        assert result.exit_code == code and word in result.output, (given, result.output)
        lines = [line for line in result.stderr.strip().splitlines() if line.startswith("slicer:")]
        assert len(lines) == 1 and not os.listdir(tmp_path)
    result = slicer("heal", sliced, *text, "--max-steps", 3, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "--max-steps" in result.output and "--method" in result.output
