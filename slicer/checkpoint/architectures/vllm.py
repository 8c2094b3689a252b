"""Notes on architectures whose config vLLM 0.32 reads differently from transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slicer.checkpoint.architectures.rules import even_step, positions

# (old raw config, kept layers, old depth) -> how vLLM differs from transformers on the result, or None
Note = Callable[[Mapping[str, Any], Sequence[int], int], str | None]


def gpt_oss_parity(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    """gpt_oss: vLLM uses a sliding window on every even layer and ignores `layer_types`."""
    types = given(old, "layer_types", depth) or ["sliding_attention", "full_attention"] * depth
    if all((types[i] == "sliding_attention") == (at % 2 == 0) for at, i in enumerate(kept)):
        return None
    return (
        "vLLM gives gpt_oss a sliding window on every even layer and ignores layer_types, and this cut moves layers "
        "from even to odd positions: for vLLM, drop blocks of an even number of layers"
    )


def qwen_windows(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    """Qwen 2 and 3: vLLM refuses sliding and full attention layers in one model, or runs all in full."""
    first = old.get("max_window_layers", 28)
    windows = bool(old.get("use_sliding_window")) and old.get("sliding_window", 4096) is not None
    sliding = [kind == "sliding_attention" for kind in given(old, "layer_types", depth) or ()]
    sliding = sliding or [windows and i >= first for i in range(depth)]
    if len({sliding[i] for i in kept}) < 2:
        return None
    return (
        "vLLM refuses this model type with both sliding and full attention layers (or runs full attention "
        "everywhere): for vLLM, drop all layers of one of the two kinds"
    )


def llama4_step(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    """Llama 4: vLLM places expert layers by a step alone, and chunked attention where rotary positions are."""
    step = old.get("interleave_moe_layer_step") or 1
    moe = old.get("moe_layers")
    moe = [i for i in range(depth) if (i + 1) % step == 0] if moe is None else moe
    if even_step(positions(moe, kept), range(len(kept)), step) is None:
        return (
            "vLLM places llama4's expert layers by interleave_moe_layer_step and ignores moe_layers, and no step gives "
            f"the layers of this cut: for vLLM, drop blocks of a multiple of {step} layers"
        )
    rope = given(old, "no_rope_layers", depth)
    interval = old.get("no_rope_layer_interval") or 4
    rope = rope or [int((i + 1) % interval != 0) for i in range(depth)]
    types = given(old, "layer_types", depth)
    if types and any((types[i] == "chunked_attention") != bool(rope[i]) for i in kept):
        return (
            "vLLM takes llama4's chunked attention from no_rope_layers and ignores layer_types, and these differ "
            "here: for vLLM, drop the layers where they differ"
        )
    return None


def exaone4_rope(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    """EXAONE 4: vLLM uses rotary positions on every layer of a model without sliding layers."""
    if old.get("sliding_window", 4096) is None:
        return None
    pattern = old.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        pattern = len(pattern)
    types = given(old, "layer_types", depth)
    types = types or ["sliding_attention" if (i + 1) % (pattern or 1) else "full_attention" for i in range(depth)]
    if any(types[i] == "sliding_attention" for i in kept):
        return None
    return (
        "vLLM applies RoPE to every layer of an exaone4 without sliding layers, transformers to none, and this cut "
        "keeps none: for vLLM, keep at least one sliding layer"
    )


def moe_frequency(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    """DeepSeek and similar: vLLM reads `moe_layer_freq`, which transformers ignores."""
    if (old.get("moe_layer_freq") or 1) == 1:
        return None
    return (
        "vLLM reads moe_layer_freq, which transformers ignores: the two disagree on the expert layers of this model "
        "before and after the cut; for vLLM, use a checkpoint with moe_layer_freq 1"
    )


def unserved(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str:
    """Model types that vLLM does not serve, whatever the cut."""
    return f"vLLM 0.32 does not serve {old['model_type']}; run the result in transformers"


def given(config: Mapping[str, Any], name: str, depth: int) -> list[Any] | None:
    """A per-layer list that the raw config contains in full; None otherwise."""
    value = config.get(name)
    return value if isinstance(value, list) and len(value) == depth else None
