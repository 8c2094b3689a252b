"""Every row of the table, proven on tiny random models of the real classes: drop layers, reload, compare logits.

The reference is the original model with those layers bypassed by hooks written here, apart from slicer's own. What a
config cannot express must be refused, and what vLLM would misread must be warned of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from cuts import export

from slicer.checkpoint import config as configs
from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ArchitectureError
from slicer.plan.plan import Plan

TOLERANCE = 1e-5
REQUIRED = [
    "llama",
    "mistral",
    "mixtral",
    "ministral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi",
    "phi3",
    "gpt2",
    "gptj",
    "gpt_neo",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "stablelm",
    "starcoder2",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "granitemoe",
    "cohere",
    "cohere2",
    "smollm3",
    "glm",
    "glm4",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "exaone4",
    "nemotron",
    "llama4_text",
    "lfm2",
    "ernie4_5",
    "seed_oss",
    "mamba2",
    "bamba",
    "granitemoehybrid",
    "nemotron_h",
    "minicpm3",
]  # noqa: SIM905
# Unaligned block, scattered, first, last, one in the middle, all but one: the layers that go, of 7.
CUTS = {
    "block": (2, 3, 4),
    "scattered": (0, 3, 5),
    "first": (0,),
    "last": (6,),
    "single": (3,),
    "all_but_one": (0, 1, 2, 3, 5, 6),
    "all_but_first": (1, 2, 3, 4, 5, 6),
}
FEW = ("block", "scattered")
HYBRIDS = ("Qwen3Next", "Lfm2", "Bamba", "GraniteMoeHybrid", "NemotronH")
# What no config of these can say; everything else in CUTS must work.
INEXPRESSIBLE = {("jamba", "block"), ("jamba", "single")}

# Hybrids left without an attention layer: transformers itself cannot generate from them, and slicer warns.
UNATTENDED = {
    *((f"{name}ForCausalLM", CUTS["all_but_first"]) for name in HYBRIDS),
    ("Qwen3NextForCausalLM", CUTS["all_but_one"]),
    ("NemotronHForCausalLM", CUTS["all_but_one"]),
}


@dataclass(frozen=True)
class Source:
    """A saved tiny model, and the same model in memory."""

    path: Path
    model: Any
    layers: Any


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(model_type: str) -> Source:
        model = tiny.tiny_model(model_type)
        path = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(path)
        return Source(path, model, decoder_layers(model))

    return make


def decoder_layers(model: Any) -> Any:
    """The one list of DEPTH modules: the vision towers here are of another depth."""
    import torch

    found = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == tiny.DEPTH]
    assert len(found) == 1
    return found[0]


@contextmanager
def bypassed(layers: Any, dropped: tuple[int, ...]) -> Iterator[None]:
    """Within, each dropped layer gives out the hidden states it was given."""

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    handles = [layers[i].register_forward_hook(hook, with_kwargs=True) for i in dropped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(model: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits  # [batch, seq, vocabulary]


def relative_error(ours: Any, reference: Any) -> float:
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max())


def cut(source: Path, dropped: tuple[int, ...], out: Path) -> Path:
    checkpoint = Checkpoint.open(source)
    return export(checkpoint, Plan.dropping(checkpoint.depth, dropped), out)


def reload(path: Path, auto: Any = None) -> Any:
    """The model, loaded strictly: every key it expects is there, and no other."""
    import torch
    from transformers import AutoModelForCausalLM

    auto = auto or AutoModelForCausalLM
    model, info = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    assert not problems
    return model.eval()


def prompt(batch: int = 2, length: int = 12) -> Any:
    import torch

    return torch.randint(3, 140, (batch, length), generator=torch.Generator().manual_seed(7))


def check(source: Source, dropped: tuple[int, ...], out: Path, auto: Any = None) -> None:
    """The sliced checkpoint gives the logits of the bypassed original, in prefill and in cached decoding."""
    import torch

    sliced = reload(cut(source.path, dropped, out), auto)
    tokens = prompt()
    with bypassed(source.layers, dropped):
        reference = logits_of(source.model, tokens)
    assert reference.isfinite().all()
    assert relative_error(logits_of(source.model, tokens), reference) > 1e-3, "the dropped layers do nothing"
    assert relative_error(logits_of(sliced, tokens), reference) <= TOLERANCE

    if (type(source.model).__name__, dropped) not in UNATTENDED:
        ours = generate(sliced, tokens[:1, :6])
        with bypassed(source.layers, dropped):
            theirs = generate(source.model, tokens[:1, :6])
        assert torch.equal(ours.sequences, theirs.sequences)
        assert relative_error(torch.stack(ours.logits, 1), torch.stack(theirs.logits, 1)) <= TOLERANCE


def generate(model: Any, tokens: Any) -> Any:
    """Seven tokens of greedy decoding with a cache, and the logits of each."""
    import torch

    with torch.no_grad():
        return model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=7,
            min_new_tokens=7,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )


def cases() -> Iterator[Any]:
    for model_type in tiny.CONFIGS:
        for name in CUTS if model_type in REQUIRED else FEW:
            if (model_type, name) not in INEXPRESSIBLE and model_type != "llama4":
                yield pytest.param(model_type, CUTS[name], id=f"{model_type}-{name}")


@pytest.mark.parametrize(("model_type", "dropped"), list(cases()))
def test_sliced_is_bypassed(sources: Any, tmp_path: Path, model_type: str, dropped: tuple[int, ...]) -> None:
    check(sources(model_type), dropped, tmp_path / "out")


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "bamba", "granitemoehybrid", "nemotron_h"])
def test_a_hybrid_without_attention_is_warned_of(sources: Any, tmp_path: Path, model_type: str) -> None:
    source = sources(model_type)
    out = cut(source.path, CUTS["all_but_first"], tmp_path / "out")
    assert any("attention layer" in text for text in notes(source.path, (0,), out))
    whole = cut(source.path, (0,), tmp_path / "whole")
    assert not any("no attention layer" in text for text in notes(source.path, (1, 2, 3, 4, 5, 6), whole))


def notes(source: Path, kept: tuple[int, ...], out: Path) -> list[str]:
    config, rewritten = (json.loads((path / "config.json").read_text()) for path in (source, out))
    return configs.warnings(config, kept, rewritten)


def test_every_required_architecture_is_proven() -> None:
    assert set(REQUIRED) <= set(tiny.CONFIGS) & set(architectures.ARCHITECTURES)


def test_the_wrapper_is_proven_as_what_it_is(sources: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    check(sources("llama4"), (2, 3, 4), tmp_path / "out", AutoModelForImageTextToText)


@pytest.mark.parametrize("dropped", [CUTS["block"], CUTS["single"]])
def test_jamba_off_its_period_is_refused(sources: Any, tmp_path: Path, dropped: tuple[int, ...]) -> None:
    with pytest.raises(ArchitectureError, match="period"):
        cut(sources("jamba").path, dropped, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2", "n_layer": 4, "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
        ({"model_type": "zamba", "num_hidden_layers": 4}, "share one attention block"),
        ({"model_type": "brand_new", "num_hidden_layers": 4}, "brand_new.*add a row"),
        ({"num_hidden_layers": 4}, "no model_type"),
    ],
)
def test_what_cannot_be_sliced_is_refused_with_the_reason(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ArchitectureError, match=words):
        architectures.lookup(config)


@pytest.mark.parametrize(
    ("config", "kept", "warned"),
    [
        ({"model_type": "gpt_oss", "num_hidden_layers": 6}, (0, 2, 3, 4, 5), True),  # the parity changes
        ({"model_type": "gpt_oss", "num_hidden_layers": 6}, (0, 3, 4, 5), False),
        (
            {"model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2},
            (0, 1, 3),
            True,
        ),
        (
            {"model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2},
            (0, 1),
            False,
        ),
        ({"model_type": "llama", "num_hidden_layers": 4}, (0, 1), False),
    ],
)
def test_where_vllm_would_read_it_otherwise_is_warned_of(
    config: dict[str, Any], kept: tuple[int, ...], warned: bool
) -> None:
    assert bool(configs.warnings(config, kept, config)) == warned
