"""Every row of the table, proven on tiny random models of the real classes: drop layers, reload, compare logits.

The reference is the original model with those layers bypassed by hooks written here, apart from slicer's own. What a
config cannot express must be refused, and what vLLM would misread must be warned of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny

from slicer.checkpoint.export import export
from slicer.checkpoint.reader import Checkpoint
from slicer.plan import Plan

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
]
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
# What no config of these can say; everything else in CUTS must work.
INEXPRESSIBLE = {("jamba", "block"), ("jamba", "scattered"), ("jamba", "first"), ("jamba", "single")}


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

    with torch.no_grad():
        generated = sliced.generate(
            tokens[:1, :6],
            attention_mask=torch.ones(1, 6, dtype=torch.long),
            max_new_tokens=7,
            min_new_tokens=7,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    with bypassed(source.layers, dropped):
        reference = logits_of(source.model, generated.sequences[:, :-1])[:, 5:]
    assert relative_error(torch.stack(generated.logits, 1), reference) <= TOLERANCE


def cases() -> Iterator[Any]:
    for model_type in tiny.CONFIGS:
        for name in CUTS if model_type in REQUIRED else FEW:
            if (model_type, name) not in INEXPRESSIBLE and model_type != "llama4":
                yield pytest.param(model_type, CUTS[name], id=f"{model_type}-{name}")


@pytest.mark.parametrize(("model_type", "dropped"), list(cases()))
def test_sliced_is_bypassed(sources: Any, tmp_path: Path, model_type: str, dropped: tuple[int, ...]) -> None:
    check(sources(model_type), dropped, tmp_path / "out")
