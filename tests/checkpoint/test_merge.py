"""Merging adapters that the real peft saved, into small checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import files
import pytest
import sources
import tiny
import torch
from commands import slicer

from slicer.plan import Plan

peft = pytest.importorskip("peft")


def save_adapter(base: Path, path: Path, **changes: Any) -> Path:
    """A random LoRA for the model at `base`, as peft writes it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["down_proj", "q_proj"], "init_lora_weights": False}
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(**{**fields, **changes})).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def sliced(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "sliced"
    assert slicer("convert", whole, "--drop", "2-3", "--heal", "none", "-o", out).exit_code == 0
    return out


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    return dict(merged.state_dict())


def tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: t for file in path.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ],
)
def test_it_is_what_peft_makes_of_it(sliced: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = save_adapter(sliced, tmp_path / "adapter", **changes)
    result = slicer("merge", sliced, adapter, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert done["verified"] == "logits" and done["logits_error"] < 1e-5 and len(done["tensors"]) == 8
    expected, found = by_peft(sliced, adapter), tensors(tmp_path / "out")
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in found)
    old, new = files.read_tensors(sliced), files.read_tensors(tmp_path / "out")
    assert {key for key in old if old[key] != new[key]} == set(done["tensors"])
    assert (tmp_path / "out" / "config.json").read_bytes() == (sliced / "config.json").read_bytes()
    plan = json.loads((tmp_path / "out" / "slicer" / "plan.json").read_text())
    assert plan["dropped"] == [2, 3] and plan["merged"]["tensors"] == done["tensors"]
    assert slicer("inspect", tmp_path / "out").exit_code == 0


def test_an_adapter_of_the_whole_model_is_renumbered_when_asked(
    whole: Path, sliced: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(whole, tmp_path / "adapter")
    refused = slicer("merge", sliced, adapter, "-o", tmp_path / "out")
    assert refused.exit_code == 1 and "--renumber" in refused.output
    result = slicer("merge", sliced, adapter, "--renumber", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["left_out"] == 4
    expected, found = by_peft(whole, adapter), tensors(tmp_path / "out")
    for new, old in enumerate([0, 1, 4, 5]):
        key = "model.layers.{}.mlp.down_proj.weight"
        assert torch.allclose(found[key.format(new)], expected[key.format(old)], atol=1e-6)


def test_of_a_half_offset_cut_the_parts_of_two_layers_are_renumbered(whole: Path, tmp_path: Path) -> None:
    plan = Plan(6, (0, 1, 4, 5), joined=((1, 3),))
    (tmp_path / "plan.json").write_text(plan.to_json())
    cut = tmp_path / "cut"
    assert slicer("convert", whole, "--plan", tmp_path / "plan.json", "-o", cut).exit_code == 0
    adapter = save_adapter(whole, tmp_path / "adapter")
    result = slicer("merge", cut, adapter, "--renumber", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    expected, found = by_peft(whole, adapter), tensors(tmp_path / "out")
    for part, layers in (("self_attn.q_proj", (0, 1, 4, 5)), ("mlp.down_proj", (0, 3, 4, 5))):
        for new, old in enumerate(layers):
            key = f"model.layers.{{}}.{part}.weight"
            assert torch.allclose(found[key.format(new)], expected[key.format(old)], atol=1e-6)


def test_gpt2_stores_its_matrices_transposed(tmp_path: Path) -> None:
    base = tiny.save_tiny("gpt2", tmp_path / "gpt2")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_proj"], fan_in_fan_out=True)
    result = slicer("merge", base, adapter, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["logits_error"] < 1e-5


def test_bfloat16_is_rounded_once(whole: Path, tmp_path: Path) -> None:
    assert (
        slicer(
            "convert", whole, "--drop", "1", "--strategy", "tail", "--dtype", "bfloat16", "-o", tmp_path / "b"
        ).exit_code
        == 0
    )
    adapter = save_adapter(tmp_path / "b", tmp_path / "adapter")
    result = slicer("merge", tmp_path / "b", adapter, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_what_does_not_fit_is_one_line_and_leaves_nothing(whole: Path, sliced: Path, tmp_path: Path) -> None:
    wide = sources.save_llama(tmp_path / "wide", intermediate_size=128)
    dora = save_adapter(sliced, tmp_path / "dora", use_dora=True)
    other = save_adapter(wide, tmp_path / "other")
    norms = save_adapter(sliced, tmp_path / "saved", modules_to_save=["lm_head"])
    gpt2 = save_adapter(
        tiny.save_tiny("gpt2", tmp_path / "g"),
        tmp_path / "gpt2",
        target_modules=["c_proj"],
        fan_in_fan_out=True,
    )
    cases: list[tuple[list[object], str]] = [
        ([sliced, dora], "DoRA"),
        ([sliced, other], "another model"),
        ([sliced, norms], "modules_to_save"),
        ([sliced, gpt2], "wrong model"),
        ([sliced, whole], "adapter_config.json"),
        ([whole, other, "--renumber"], "plan"),
    ]
    out = tmp_path / "out"
    for given, word in cases:
        result = slicer("merge", *given, "-o", out)
        assert result.exit_code == 1 and word in result.output, (given, result.output)
        assert len(result.stderr.strip().splitlines()) == 1 and not out.exists()


def test_a_wrong_merge_never_appears(
    whole: Path, sliced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the weights are stored in bfloat16, whose rounding must not hide it."""
    import slicer.checkpoint.merge as merging

    rounded = tmp_path / "rounded"
    given = ["convert", whole, "--drop", "2-3", "--heal", "none", "--dtype", "bfloat16", "-o", rounded]
    assert slicer(*given).exit_code == 0
    honest: Any = merging._merged
    monkeypatch.setattr(merging, "_merged", lambda *given: (1.01 * (t := honest(*given))).to(t.dtype))
    for number, base in enumerate((sliced, rounded)):
        adapter = save_adapter(base, tmp_path / f"adapter{number}")
        result = slicer("merge", base, adapter, "-o", tmp_path / "out")
        assert result.exit_code == 1 and "logits" in result.output and not (tmp_path / "out").exists()
