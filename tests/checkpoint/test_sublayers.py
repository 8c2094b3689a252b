"""Below the layer: every form's logits are those of the original with those parts silenced, and no byte is changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import files
import pytest
import tiny
import torch
from cuts import cutting, export

from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sublayers import part_of
from slicer.errors import ArchitectureError, PlanError
from slicer.model.layers import logits_of
from slicer.model.load import load_model
from slicer.model.sublayers import bypass_sublayers
from slicer.model.verify import check_load, probe_tokens
from slicer.plan.plan import Plan

BLOCKWISE = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
}
SEQUENTIAL = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "glm4", "gpt2", "opt", "mixtral", "lfm2"]
PARALLEL = ["phi", "gptj", "gpt_neox", "cohere"]


def difference(out: Path, source: Path, plan: Plan) -> float:
    """Largest difference of the logits, relative to the largest, of `out` and `source` less what `plan` drops."""
    model = load_model(source, dtype="float32", device="cpu")
    tokens = probe_tokens(tiny.VOCAB)
    with bypass_sublayers(model, *plan.gone):
        wanted = logits_of(model, tokens)
    found = logits_of(load_model(out, dtype="float32", device="cpu"), tokens)
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", BLOCKWISE)
def test_blockwise_is_the_original_without_those_parts(name: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(name.split("-")[0], tmp_path / "source", **BLOCKWISE[name])
    plan = cutting(tiny.DEPTH, layers=[2], attention=[1, 4], ffn=[0, 5], form="blockwise")
    out = export(Checkpoint.open(source), plan, tmp_path / "out")
    check_load(out)
    assert difference(out, source, plan) < 1e-5
    old, new = files.read_tensors(source), files.read_tensors(out)
    assert {new[key] for key in new} <= {old[key] for key in old}
    positions = {0: 0, 1: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    for key in (f"self_attn.q_proj.{part}" for part in ("weight",)):
        held = {i for i, at in positions.items() if f"model.layers.{at}.{key}" in new}
        assert held == {0, 3, 5, 6}
        assert all(new[f"model.layers.{positions[i]}.{key}"] == old[f"model.layers.{i}.{key}"] for i in held)


def test_a_layer_without_attention_keeps_no_keys_and_values(tmp_path: Path) -> None:
    source = tiny.save_tiny("qwen2", tmp_path / "source")
    plan = cutting(tiny.DEPTH, attention=[2, 3], form="blockwise")
    model = load_model(export(Checkpoint.open(source), plan, tmp_path / "out"), device="cpu")
    tokens = probe_tokens(tiny.VOCAB)[:1, :9]
    cache = model(tokens, use_cache=True).past_key_values
    assert [layer.is_initialized for layer in cache.layers] == [i not in (2, 3) for i in range(tiny.DEPTH)]
    arguments = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tokens, **arguments), model.generate(tokens, use_cache=False, **arguments))


@pytest.mark.parametrize("order", ["import slicer; import transformers", "import transformers; import slicer"])
def test_transformers_loads_it_after_import_slicer(order: str, tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    out = export(Checkpoint.open(source), cutting(tiny.DEPTH, attention=[3], form="blockwise"), tmp_path / "out")
    code = (
        f"{order}\n"
        "import sys\n"
        "assert order_is_light or 'torch' not in sys.modules\n"
        "from transformers import LlamaConfig, AutoConfig, AutoModelForCausalLM\n"
        f"model, info = AutoModelForCausalLM.from_pretrained({str(out)!r}, output_loading_info=True)\n"
        "assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "assert not hasattr(model.model.layers[3], 'self_attn')\n"
    ).replace("order_is_light", str(order.startswith("import transformers")))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("model_type", SEQUENTIAL)
def test_a_half_offset_cut_is_an_ordinary_checkpoint(model_type: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(model_type, tmp_path / "source")
    checkpoint = Checkpoint.open(source)
    found = None
    for i, j in ((3, 5), (1, 4), (4, 5), (4, 6), (0, 1)):  # the first that leaves a config its class can express
        plan = Plan(tiny.DEPTH, tuple(k for k in range(tiny.DEPTH) if not i < k <= j), joined=((i, j),))
        try:
            out = export(checkpoint, plan, tmp_path / f"{i}-{j}")
        except ArchitectureError:
            continue
        found = (i, j)
        check_load(out)
        assert difference(out, source, plan) < 1e-5
        old, new = files.read_tensors(source), files.read_tensors(out)
        assert set(new.values()) <= set(old.values())
        break
    assert found is not None


@pytest.mark.parametrize("model_type", PARALLEL)
def test_parts_that_run_side_by_side_cannot_be_joined(model_type: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.save_tiny(model_type, tmp_path / "source"))
    plan = Plan(tiny.DEPTH, (0, 1, 4, 5, 6), joined=((1, 3),))
    with pytest.raises(ArchitectureError, match="parallel"):
        export(checkpoint, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_feed_forward_parts_of_two_kinds_do_not_change_places(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.save_tiny("glm4_moe", tmp_path / "source"))  # two dense layers, then experts
    plan = Plan(tiny.DEPTH, (0, 1, 4, 5, 6), joined=((1, 3),))
    with pytest.raises(ArchitectureError, match="different kinds"):
        export(checkpoint, plan, tmp_path / "out")


@pytest.mark.parametrize("model_type", ["gemma3_text", "phi", "gpt2", "opt", "mixtral", "qwen3", "falcon"])
def test_zeroed_loads_as_ever_and_adds_nothing(model_type: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(model_type, tmp_path / "source")
    plan = cutting(tiny.DEPTH, attention=[0, 3], ffn=[2], form="zeroed")
    out = export(Checkpoint.open(source), plan, tmp_path / "out")
    check_load(out)
    assert difference(out, source, plan) < 1e-5
    assert (out / "config.json").read_text() == (source / "config.json").read_text()


@pytest.mark.parametrize(
    ("model_type", "plan", "reason"),
    [
        ("llama", {"attention": [0]}, "layer 0"),
        ("llama", {"layers": [0], "attention": [1]}, "layer 1"),
        ("qwen3", {"attention": [3]}, "QK-norm"),
        ("gemma", {"attention": [3]}, "zeroed"),
    ],
)
def test_what_the_blockwise_form_cannot_say(
    model_type: str, plan: dict[str, list[int]], reason: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny.save_tiny(model_type, tmp_path / "source"))
    with pytest.raises(ArchitectureError, match=reason):
        export(checkpoint, cutting(tiny.DEPTH, **plan, form="blockwise"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_blockwise_checkpoint_can_lose_layers_but_not_its_first_attention(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    plan = cutting(tiny.DEPTH, attention=[1, 4], form="blockwise")
    first = Checkpoint.open(export(Checkpoint.open(source), plan, tmp_path / "first"))
    again = export(first, Plan.dropping(tiny.DEPTH, [3, 5]), tmp_path / "again")
    whole = cutting(tiny.DEPTH, layers=[3, 5], attention=[1, 4])
    check_load(again)
    assert difference(again, source, whole) < 1e-5
    with pytest.raises(ArchitectureError, match="has no attention"):
        export(first, Plan.dropping(tiny.DEPTH, [0]), tmp_path / "never")
    with pytest.raises(PlanError, match="no attention to drop"):
        export(first, cutting(tiny.DEPTH, attention=[4], form="blockwise"), tmp_path / "never")


def test_where_post_attention_layernorm_stands() -> None:
    assert part_of("post_attention_layernorm", {"input_layernorm"}) == "feed-forward"
    gemma = {"input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    assert part_of("post_attention_layernorm", gemma) == "attention"
    assert part_of("post_attention_layernorm", {"post_feedforward_layernorm"}) == "attention"
    assert part_of("something_new", set()) is None
