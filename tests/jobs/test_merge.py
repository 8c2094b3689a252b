"""Merging adapters that the real peft saved, into small checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import files
import pytest
import sources
import tiny
import torch
from commands import slicer, succeeds

from slicer.checkpoint.cut import open_cut
from slicer.checkpoint.tensors import TensorSpan
from slicer.jobs import merge as merge_job
from slicer.plan.plan import Plan

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


def change_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def save_pairs(path: Path, pairs: dict[str, dict[str, torch.Tensor]], **fields: Any) -> Path:
    """An adapter made by hand: module -> its A and B."""
    from safetensors.torch import save_file

    path.mkdir()
    named = {f"base_model.model.{m}.lora_{k}.weight": t for m, pair in pairs.items() for k, t in pair.items()}
    save_file(named, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    return path


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
    [{}, {"use_rslora": True}, {"rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"q_proj": 3}}],
)
def test_it_is_what_peft_makes_of_it(sliced: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = save_adapter(sliced, tmp_path / "adapter", **changes)
    result = slicer("merge", sliced, adapter, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert done["verified"] == "logits" and done["logits_error"] < 1e-5 and len(done["merged"][-1]["tensors"]) == 8
    expected, found = by_peft(sliced, adapter), tensors(tmp_path / "out")
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in found)
    old, new = files.read_tensors(sliced), files.read_tensors(tmp_path / "out")
    assert {key for key in old if old[key] != new[key]} == set(done["merged"][-1]["tensors"])
    assert (tmp_path / "out" / "config.json").read_bytes() == (sliced / "config.json").read_bytes()
    plan = json.loads((tmp_path / "out" / "slicer" / "plan.json").read_text())
    assert plan["dropped"] == [2, 3] and plan["merged"][0]["tensors"] == done["merged"][-1]["tensors"]
    assert slicer("inspect", tmp_path / "out").exit_code == 0


def test_an_adapter_of_the_whole_model_is_renumbered_when_asked(whole: Path, sliced: Path, tmp_path: Path) -> None:
    adapter = save_adapter(whole, tmp_path / "adapter")
    refused = slicer("merge", sliced, adapter, "-o", tmp_path / "out")
    assert refused.exit_code == 1 and "--renumber" in refused.output
    result = slicer("merge", sliced, adapter, "--renumber", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["merged"][-1]["left_out"]) == 4
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


def test_a_matrix_is_turned_as_its_own_class_has_it(tmp_path: Path) -> None:
    """An adapter trained on 4-bit GPT-2, whose layers are ordinary linear ones, says that nothing is to be turned."""
    base = tiny.save_tiny("gpt2", tmp_path / "gpt2")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_proj"], fan_in_fan_out=True)
    expected = by_peft(base, adapter)
    change_config(adapter, fan_in_fan_out=False)
    done = succeeds("merge", base, adapter, "-o", tmp_path / "out", "--json")
    assert json.loads(done.stdout)["logits_error"] < 1e-5
    found = tensors(tmp_path / "out")
    for part in ("attn", "mlp"):  # one of them square
        key = f"transformer.h.0.{part}.c_proj.weight"
        assert torch.allclose(found[key], expected[key], atol=1e-6)


def test_a_head_comes_with_the_matrix_that_it_was_trained_beside(sliced: Path, tmp_path: Path) -> None:
    """Which has to be the checkpoint's."""
    adapter = save_adapter(sliced, tmp_path / "adapter", target_modules=["lm_head"])
    succeeds("merge", sliced, adapter, "-o", tmp_path / "out")
    found, expected = tensors(tmp_path / "out"), by_peft(sliced, adapter)
    assert torch.allclose(found["lm_head.weight"], expected["lm_head.weight"], atol=1e-6)
    result = slicer("merge", tmp_path / "out", adapter, "-o", tmp_path / "again")
    assert result.exit_code == 1 and "the lm_head it was trained on" in result.output


def test_other_towers_keep_their_numbers(tmp_path: Path) -> None:
    """q_proj is a name of vision layers too, which are neither counted anew nor too many for a shallow decoder."""
    from transformers import AutoModelForImageTextToText

    whole, cut = tiny.save_tiny("gemma3", tmp_path / "whole"), tmp_path / "cut"
    succeeds("convert", whole, "--drop", "0,2-5", "--heal", "none", "--verify", "none", "-o", cut)
    adapter = save_adapter(whole, tmp_path / "adapter", target_modules=["q_proj"])
    done = json.loads(succeeds("merge", cut, adapter, "--renumber", "-o", tmp_path / "a", "--json").stdout)
    assert (
        done["verified"] == "logits"
        and len(done["merged"][-1]["left_out"]) == 5
        and len(done["merged"][-1]["tensors"]) == 2 + 3
    )
    expected = by_peft(whole, adapter)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "a").state_dict()
    kept = {str(old): str(new) for new, old in enumerate((1, 6))}
    compared = 0
    for name, tensor in expected.items():
        place = re.match(r"(.*language_model\.layers\.)(\d+)(\..*)", name)
        if place is None or place[2] in kept:
            name = name if place is None else place[1] + kept[place[2]] + place[3]
            assert torch.allclose(found[name], tensor, atol=1e-6), name
            compared += name.endswith("q_proj.weight")
    assert compared == 5
    own = save_adapter(cut, tmp_path / "own", target_modules=["q_proj"])
    done = json.loads(succeeds("merge", cut, own, "-o", tmp_path / "b", "--json").stdout)
    assert done["verified"] == "logits" and len(done["merged"][-1]["tensors"]) == 5


def test_how_it_was_made_does_not_matter_where_it_is_plain(whole: Path, sliced: Path, tmp_path: Path) -> None:
    """Layers excluded from training are others after renumbering; a start that leaves the weights alone is past."""
    adapter = save_adapter(whole, tmp_path / "a", exclude_modules=r".*layers\.2\..*", init_lora_weights="orthogonal")
    done = json.loads(succeeds("merge", sliced, adapter, "--renumber", "-o", tmp_path / "out", "--json").stdout)
    assert (
        done["verified"] == "logits"
        and len(done["merged"][-1]["tensors"]) == 8
        and len(done["merged"][-1]["left_out"]) == 2
    )


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_a_start_that_changes_the_weights_is_refused(sliced: Path, tmp_path: Path, start: str) -> None:
    adapter = save_adapter(sliced, tmp_path / "adapter")
    change_config(adapter, init_lora_weights=start)
    result = slicer("merge", sliced, adapter, "-o", tmp_path / "out")
    assert result.exit_code == 1 and f"init_lora_weights: {start}" in result.output
    assert ("path_initial_model_for_weight_conversion" in result.output) == (start != "loftq")


def test_one_that_peft_made_plain_is_merged(sliced: Path, tmp_path: Path) -> None:
    """PiSSA, converted as peft documents it."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(sliced)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    succeeds("merge", sliced, tmp_path / "plain", "-o", tmp_path / "out")
    trained = model.merge_and_unload(safe_merge=True).state_dict()
    found = tensors(tmp_path / "out")
    key = "model.layers.2.self_attn.q_proj.weight"
    assert torch.allclose(found[key], trained[key], atol=1e-5)


def test_experts_that_are_loaded_as_one_tensor_are_merged_one_by_one(tmp_path: Path) -> None:
    """Adapters of single experts, as older transformers have them: peft cannot put them on, so the check is of keys."""
    base = tiny.save_tiny("mixtral", tmp_path / "base")
    name = "model.layers.1.block_sparse_moe.experts.2.w1"
    old = tensors(base)[f"{name}.weight"]
    rows, columns = old.shape
    pair = {"A": torch.randn(2, columns), "B": torch.randn(rows, 2)}
    adapter = save_pairs(tmp_path / "adapter", {name: pair}, r=2, lora_alpha=4)
    done = json.loads(succeeds("merge", base, adapter, "-o", tmp_path / "out", "--json").stdout)
    assert done["verified"] == "load" and done["merged"][-1]["tensors"] == [f"{name}.weight"]
    found = tensors(tmp_path / "out")[f"{name}.weight"]
    assert torch.allclose(found, old + 2 * pair["B"] @ pair["A"], atol=1e-5)
    result = slicer("merge", base, adapter, "--verify", "logits", "-o", tmp_path / "again")
    assert result.exit_code == 1 and "--verify load" in result.output and not (tmp_path / "again").exists()
    for half, other in ("AB", "BA"):
        broken = save_pairs(tmp_path / half, {name: pair, f"{name}x": {half: pair[half].clone()}}, r=2)
        result = slicer("merge", base, broken, "-o", tmp_path / "again")
        assert result.exit_code == 1 and f"{name}x has {half} but not {other}" in result.output


def test_without_peft_logits_are_not_compared(sliced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(sliced, tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    done = json.loads(succeeds("merge", sliced, adapter, "-o", tmp_path / "out", "--json").stdout)
    assert done["verified"] == "load"
    result = slicer("merge", sliced, adapter, "--verify", "logits", "-o", tmp_path / "again")
    assert result.exit_code == 1 and "needs peft" in result.output and "--verify load" in result.output


def test_every_merge_is_recorded_and_only_where_it_was_done(whole: Path, sliced: Path, tmp_path: Path) -> None:
    of_whole, own = save_adapter(whole, tmp_path / "of_whole"), save_adapter(sliced, tmp_path / "own")
    once, twice = tmp_path / "once", tmp_path / "twice"
    succeeds("merge", sliced, of_whole, "--renumber", "-o", once)
    done = json.loads(succeeds("merge", once, own, "-o", twice, "--json").stdout)
    first, second = Plan.load(twice).merged
    assert first.renumber and not second.renumber
    assert [first.adapter, second.adapter] == [str(of_whole), str(own)]
    digest = hashlib.sha256((own / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert second.sha256 == digest != first.sha256 and second.command == f"slicer merge {once} {own}"
    assert first.command == f"slicer merge {sliced} {of_whole} --renumber"
    assert list(second.tensors) == done["merged"][-1]["tensors"] and second.logits_error == done["logits_error"]
    # As written when there was one record.
    file = twice / "slicer" / "plan.json"
    plan = json.loads(file.read_text())
    assert Plan.from_json(json.dumps({**plan, "merged": plan["merged"][0]})).merged == (first,)
    # The plan cuts the source again, without the adapters.
    again = succeeds("convert", whole, "--plan", file, "-o", tmp_path / "again")
    assert Plan.load(tmp_path / "again").merged == () and "slicer merge" in again.output
    assert files.read_tensors(tmp_path / "again") == files.read_tensors(sliced)
    # The source is known by what was not merged; a fold, which is solved on the source, would not see the adapter.
    open_cut(str(twice), str(whole))  # but for what was merged, the cut is the source's
    result = slicer("heal", twice, "-o", tmp_path / "healed")
    assert result.exit_code == 1 and "an adapter was merged into it" in result.output


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
        tiny.save_tiny("gpt2", tmp_path / "g"), tmp_path / "gpt2", target_modules=["c_proj"], fan_in_fan_out=True
    )
    tied = sources.save_llama(tmp_path / "tied", tie_word_embeddings=True)
    head = save_adapter(tied, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    cases: list[tuple[list[object], str]] = [
        ([tied, head], "lm_head shares its matrix with the embeddings"),
        ([sliced, dora], "DoRA"),
        ([sliced, other], "its base model"),
        ([sliced, norms], "modules_to_save"),
        ([sliced, gpt2], "its base model"),
        ([sliced, whole], "adapter_config.json"),
        ([whole, other, "--renumber"], "plan"),
    ]
    out = tmp_path / "out"
    for given, word in cases:
        result = slicer("merge", *given, "-o", out)
        assert result.exit_code == 1 and word in result.output, (given, result.output)
        assert len(result.stderr.strip().splitlines()) == 1 and not out.exists()


def _scaled(span: TensorSpan) -> torch.Tensor:
    assert span.make is not None
    tensor = span.make()
    return (1.01 * tensor).to(tensor.dtype)


def test_a_wrong_merge_never_appears(
    whole: Path, sliced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the weights are stored in bfloat16, whose rounding must not hide it."""
    rounded = tmp_path / "rounded"
    given = ["convert", whole, "--drop", "2-3", "--heal", "none", "--dtype", "bfloat16", "-o", rounded]
    assert slicer(*given).exit_code == 0
    honest = merge_job.merged_spans

    def scaled(*given: Any) -> dict[str, TensorSpan]:
        spans = honest(*given)
        return {key: replace(span, make=partial(_scaled, span))
                for key, span in spans.items()}  # fmt: skip

    monkeypatch.setattr(merge_job, "merged_spans", scaled)
    for number, base in enumerate((sliced, rounded)):
        adapter = save_adapter(base, tmp_path / f"adapter{number}")
        result = slicer("merge", base, adapter, "-o", tmp_path / "out")
        assert result.exit_code == 1 and "logits" in result.output and not (tmp_path / "out").exists()
