"""Rules that rewrite config fields of single layers where slice, reindex and count are not enough.

In this file, K is the kept old layer indices in order and N the old depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from slicer.errors import ArchitectureError

Fields = dict[str, Any]
# (config to rewrite, old config with all defaults, K, N)
Rule = Callable[[Fields, Mapping[str, Any], Sequence[int], int], None]


def sparse_step(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """Qwen MoE: a layer is dense if listed, or if (i + 1) % decoder_sparse_step; the result lists all dense layers."""
    step, listed = old.get("decoder_sparse_step") or 1, set(old.get("mlp_only_layers") or ())
    new["mlp_only_layers"] = [at for at, i in enumerate(kept) if i in listed or (i + 1) % step]
    new["decoder_sparse_step"] = 1


def llama4_moe(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """transformers reads `moe_layers`, vLLM the step: write the first, and the second if it can express the same."""
    new["moe_layers"] = moe = positions(old["moe_layers"], kept)
    step = old.get("interleave_moe_layer_step") or 1
    if (found := even_step(moe, range(len(kept)), step)) not in (step, None):
        new["interleave_moe_layer_step"] = found


def gpt_neo_attention(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """`attention_types` is a run-length code: [[["global", "local"], 2]] means four layers."""
    kinds = [kind for pattern, times in old["attention_types"] for _ in range(times) for kind in pattern]
    check_length("attention_types", kinds, depth)
    kinds = [kinds[i] for i in kept]
    period = next(p for p in range(1, len(kinds) + 1) if kinds[:p] * (len(kinds) // p) == kinds)
    new["attention_types"] = [[kinds[:period], len(kinds) // period]]


def ernie_moe(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """MoE layers have start <= i <= end and (i + 1) % interval == 0; the new set must have that form too."""
    start, end = old["moe_layer_start_index"], old["moe_layer_end_index"]
    step = old.get("moe_layer_interval") or 1
    end = depth - 1 if end == -1 else end
    moe = [at for at, i in enumerate(kept) if start <= i <= end and (i + 1) % step == 0]
    # An empty range starts past the last layer: an end of -1 would mean the last layer.
    first, last = (moe[0], moe[-1]) if moe else (len(kept), len(kept) - 1)
    if (found := even_step(moe, range(first, last + 1), step)) is None:
        raise ArchitectureError(
            "moe_layer_interval: the kept expert layers are not evenly spaced, which ernie4_5_moe cannot express; "
            f"drop multiples of {step} neighbouring layers"
        )
    new.update(moe_layer_start_index=first, moe_layer_end_index=last, moe_layer_interval=found)


def recurrent_blocks(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """`block_types` is a pattern repeated over the depth; the kept layers become one pattern of the new depth."""
    pattern = old["block_types"]
    new["block_types"] = [pattern[i % len(pattern)] for i in kept]


def scale_depth(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """MiniCPM3 scales each branch by scale_depth / sqrt(depth); null means a scale of 1."""
    scale = new.get("scale_depth", old.get("scale_depth"))
    if scale is not None:
        new["scale_depth"] = scale * math.sqrt(len(kept) / depth)


def periods(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """Jamba: attention layers, and expert layers, have i % period == offset."""
    for kind, word in (("attn", "attention"), ("expert", "expert")):
        p, o = old[f"{kind}_layer_period"], old[f"{kind}_layer_offset"]
        wanted = [at for at, i in enumerate(kept) if i % p == o]
        # A period beyond the new depth with an offset past the last layer means "none".
        fits = [(p, o), *((q, wanted[0] if wanted else q - 1) for q in range(1, len(kept) + 2))]
        for q, r in fits:
            if r < q and wanted == [i for i in range(len(kept)) if i % q == r]:
                new[f"{kind}_layer_period"], new[f"{kind}_layer_offset"] = q, r
                break
        else:
            common = math.lcm(old["attn_layer_period"], old["expert_layer_period"])
            raise ArchitectureError(
                f"{kind}_layer_period: the kept {word} layers are not evenly spaced, which jamba cannot express; "
                f"drop multiples of {common} neighbouring layers"
            )


def hybrid_pattern(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """Nemotron-H: one letter per layer in older configs, one name per layer in newer ones; rewrites those present."""
    pattern = new.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        check_length("hybrid_override_pattern", pattern, depth)
        new["hybrid_override_pattern"] = "".join(pattern[i] for i in kept)


def attention_first(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """The blockwise form: vLLM's class, and transformers' count of cached tokens, need attention in the first layer."""
    if new["block_configs"][0]["attention"]["no_op"]:
        raise ArchitectureError(
            f"layer {kept[0]} has no attention, which the first kept layer needs; keep an earlier layer"
        )


def positions(members: Iterable[int], kept: Sequence[int]) -> list[int]:
    """New positions of the kept ones among the old indices `members`."""
    stay = set(members)
    return [at for at, i in enumerate(kept) if i in stay]


def even_step(members: list[int], span: range, first: int) -> int | None:
    """The step s for which `members` are the i of `span` with (i + 1) % s == 0, `first` if it does; None: none does."""
    steps = (first, *range(1, span.stop + 2))
    return next((s for s in steps if members == [i for i in span if (i + 1) % s == 0]), None)


def check_length(name: str, values: Sequence[Any], depth: int) -> None:
    """Raise ArchitectureError if a per-layer field does not have one entry per layer."""
    if len(values) != depth:
        raise ArchitectureError(
            f"config.json: {name} has {len(values)} entries for {depth} layers; correct it in the source"
        )
