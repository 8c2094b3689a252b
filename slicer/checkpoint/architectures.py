"""The table of architectures: where each keeps its layers, and which config fields speak of single layers.

Nothing here needs more than the standard library, so a plan can be checked before anything heavy is loaded.
To add an architecture, add a row to `ARCHITECTURES` (its model_type, and whatever differs from the defaults of
`Architecture`) and a tiny configuration to tests/tiny.py; the test then proves the row.

In this file K is the kept old layer indices in order and N the old depth. A field is rewritten by one of

    slice     [x[i] for i in K]                         a list with one entry a layer
    reindex   the new positions of the members kept     a list of layer indices
    count     #{i in K: i < x}                          a threshold: the layers below x are of the other kind
    rule      a function of this file                   anything else
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slicer.errors import ArchitectureError

Fields = dict[str, Any]
# (config being rewritten, the old config with every default written out, K, N)
Rule = Callable[[Fields, Mapping[str, Any], Sequence[int], int], None]
# (old config as written, K, N) -> what vLLM makes of the result that transformers does not
Note = Callable[[Mapping[str, Any], Sequence[int], int], str | None]

_DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ALIASES = {"layer_types": "layers_block_type", "layers_block_type": "layer_types"}
_MTP_NAMES = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# Lists that never have one entry a layer, though their length may happen to equal the depth.
_NOT_PER_LAYER = {
    *("architectures", "attention_types", "block_types", "mlp_only_layers", "moe_layers"),
    *("mtp_layers_block_type", "mtp_layer_types", "time_step_limit"),
}
_BY_LAYER_KEYS = ("per_layer_config", "pruned_heads")


# --- rules: what no slice, reindex or count expresses ---------------------------------------------------------------


def _sparse_step(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """Qwen MoE: a layer is dense if listed, or if (i + 1) % decoder_sparse_step; afterwards all are listed."""
    step, listed = old.get("decoder_sparse_step") or 1, set(old.get("mlp_only_layers") or ())
    new["mlp_only_layers"] = [at for at, i in enumerate(kept) if i in listed or (i + 1) % step]
    new["decoder_sparse_step"] = 1


def _llama4_moe(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """transformers reads `moe_layers`, vLLM the step: write the first, and the second where one says the same."""
    new["moe_layers"] = moe = _positions(old["moe_layers"], kept)
    step = old.get("interleave_moe_layer_step") or 1
    for s in (step, *range(1, len(kept) + 2)):
        if moe == [i for i in range(len(kept)) if (i + 1) % s == 0]:
            if s != step:
                new["interleave_moe_layer_step"] = s
            return


def _gpt_neo_attention(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """`attention_types` is a run-length code: [[["global", "local"], 2]] stands for four layers."""
    kinds = [kind for pattern, times in old["attention_types"] for _ in range(times) for kind in pattern]
    _check_length("attention_types", kinds, depth)
    kinds = [kinds[i] for i in kept]
    period = next(p for p in range(1, len(kinds) + 1) if kinds[:p] * (len(kinds) // p) == kinds)
    new["attention_types"] = [[kinds[:period], len(kinds) // period]]


def _ernie_moe(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """MoE where start <= i <= end and (i + 1) % interval == 0; the new set must have that form again."""
    start, end = old["moe_layer_start_index"], old["moe_layer_end_index"]
    step = old.get("moe_layer_interval") or 1
    end = depth - 1 if end == -1 else end
    moe = [at for at, i in enumerate(kept) if start <= i <= end and (i + 1) % step == 0]
    # An empty range is one that starts past the last layer: an end of -1 would mean the last layer.
    first, last = (moe[0], moe[-1]) if moe else (len(kept), len(kept) - 1)
    for s in (step, *range(1, len(kept) + 1)):
        if moe == [i for i in range(first, last + 1) if (i + 1) % s == 0]:
            new.update(moe_layer_start_index=first, moe_layer_end_index=last, moe_layer_interval=s)
            return
    raise ArchitectureError(
        "moe_layer_interval: the expert layers that stay are not evenly spaced, which ernie4_5_moe cannot say; "
        f"drop whole multiples of {step} neighbouring layers"
    )


def _recurrent_blocks(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """`block_types` is a pattern repeated over the depth; the kept layers become one pattern of the new depth."""
    pattern = old["block_types"]
    new["block_types"] = [pattern[i % len(pattern)] for i in kept]


def _scale_depth(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """MiniCPM3 scales each branch by scale_depth / sqrt(depth); null means that quotient is 1."""
    scale = new.get("scale_depth", old.get("scale_depth"))
    if scale is not None:
        new["scale_depth"] = scale * math.sqrt(len(kept) / depth)


def _periods(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """Jamba: attention layers, and expert layers, are those with i % period == offset."""
    for kind, word in (("attn", "attention"), ("expert", "expert")):
        p, o = old[f"{kind}_layer_period"], old[f"{kind}_layer_offset"]
        wanted = [at for at, i in enumerate(kept) if i % p == o]
        # Any period beyond the new depth with the offset past the last layer stands for "none".
        fits = [(p, o), *((q, wanted[0] if wanted else q - 1) for q in range(1, len(kept) + 2))]
        for q, r in fits:
            if r < q and wanted == [i for i in range(len(kept)) if i % q == r]:
                new[f"{kind}_layer_period"], new[f"{kind}_layer_offset"] = q, r
                break
        else:
            raise ArchitectureError(
                f"{kind}_layer_period: the {word} layers that stay are not evenly spaced, which jamba cannot say; "
                f"drop whole periods, {_common_period(old)} neighbouring layers or a multiple of that"
            )


def _common_period(old: Mapping[str, Any]) -> int:
    return math.lcm(old["attn_layer_period"], old["expert_layer_period"])


def _hybrid_pattern(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """Nemotron-H: one letter a layer in older configs, one name a layer in newer ones; whichever are there."""
    pattern = new.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        _check_length("hybrid_override_pattern", pattern, depth)
        new["hybrid_override_pattern"] = "".join(pattern[i] for i in kept)


def _attention_first(new: Fields, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> None:
    """The blockwise form: vLLM's class, and transformers' count of cached tokens, need attention in the first layer."""
    if new["block_configs"][0]["attention"]["no_op"]:
        raise ArchitectureError(
            f"layer {kept[0]} has no attention and would become the first, which needs it; keep an earlier layer"
        )


# --- notes: where vLLM 0.32 reads the same config otherwise than transformers -----------------------------------------


def _gpt_oss_parity(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    types = _given(old, "layer_types", depth) or ["sliding_attention", "full_attention"] * depth
    if all((types[i] == "sliding_attention") == (at % 2 == 0) for at, i in enumerate(kept)):
        return None
    return (
        "vLLM gives gpt_oss a sliding window on every even layer whatever layer_types says, and this cut moves layers "
        "to the other parity: for vLLM, drop blocks of an even number of layers"
    )


def _qwen_windows(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    first = old.get("max_window_layers", 28)
    windows = bool(old.get("use_sliding_window")) and old.get("sliding_window", 4096) is not None
    sliding = [kind == "sliding_attention" for kind in _given(old, "layer_types", depth) or ()]
    sliding = sliding or [windows and i >= first for i in range(depth)]
    if len({sliding[i] for i in kept}) < 2:
        return None
    return (
        "vLLM refuses this model type with both sliding and full attention layers (or runs full attention "
        "everywhere): for vLLM, drop all layers of one of the two kinds"
    )


def _llama4_step(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    step = old.get("interleave_moe_layer_step") or 1
    moe = old.get("moe_layers")
    moe = [i for i in range(depth) if (i + 1) % step == 0] if moe is None else moe
    at = _positions(moe, kept)
    if not any(at == [i for i in range(len(kept)) if (i + 1) % s == 0] for s in range(1, len(kept) + 2)):
        return (
            "vLLM places llama4's expert layers by interleave_moe_layer_step and ignores moe_layers, and no step gives "
            f"the layers of this cut: for vLLM, drop blocks of a multiple of {step} layers"
        )
    rope = _given(old, "no_rope_layers", depth)
    interval = old.get("no_rope_layer_interval") or 4
    rope = rope or [int((i + 1) % interval != 0) for i in range(depth)]
    types = _given(old, "layer_types", depth)
    if types and any((types[i] == "chunked_attention") != bool(rope[i]) for i in kept):
        return (
            "vLLM takes llama4's chunked attention from no_rope_layers and ignores layer_types, and the two differ "
            "here: for vLLM, drop the layers where they do"
        )
    return None


def _exaone4_rope(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    if old.get("sliding_window", 4096) is None:
        return None
    pattern = old.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        pattern = len(pattern)
    types = _given(old, "layer_types", depth)
    types = types or [
        "sliding_attention" if (i + 1) % (pattern or 1) else "full_attention" for i in range(depth)
    ]
    if any(types[i] == "sliding_attention" for i in kept):
        return None
    return (
        "vLLM applies RoPE to every layer of an exaone4 without sliding layers, transformers to none, and this cut "
        "keeps none: for vLLM, keep at least one sliding layer"
    )


def _moe_frequency(old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str | None:
    if (old.get("moe_layer_freq") or 1) == 1:
        return None
    return (
        "vLLM reads moe_layer_freq, which transformers ignores: the two disagree on the expert layers of this model "
        "before and after the cut; for vLLM, use a checkpoint with moe_layer_freq 1"
    )


@dataclass(frozen=True)
class _Unserved:
    """A note that holds for every cut."""

    name: str

    def __call__(self, old: Mapping[str, Any], kept: Sequence[int], depth: int) -> str:
        return f"vLLM 0.32 does not serve {self.name}; run the result in transformers"


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """How one model type keeps its layers.

    Attributes:
        depth_field: the config field of the depth; a list where the depth is its length.
        default_depth: the depth meant when the field is absent (wrappers write only what differs).
        prefixes: what the keys of the layers' tensors may start with, first come first served.
        text_config: the nested config that describes the decoder, where it is nested.
        slices, reindexes, counts: per-layer fields by the way they are rewritten (see the module's docstring).
        rule: what those three cannot say.
        mtp: has multi-token-prediction layers after the last; they are dropped and switched off.
        refuse: why no cut of it can be written.
        refuse_if: the config field that must be true for that reason to hold.
        note: what vLLM reads otherwise.
    """

    depth_field: str = "num_hidden_layers"
    default_depth: int | None = None
    prefixes: tuple[str, ...] = ("model.layers.",)
    text_config: str | None = None
    slices: tuple[str, ...] = ()
    reindexes: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    rule: Rule | None = None
    mtp: bool = False
    refuse: str | None = None
    refuse_if: str | None = None
    note: Note | None = None


# Where a layer writes into the residual stream: the last linear map of its feed-forward part, or of its attention (or
# what stands for it), by module name within the layer. Over all architectures of the table these names are few and
# mean the same thing wherever they occur, so no row has to choose.
FEED_FORWARD_OUTPUTS = (
    *(
        "mlp.down_proj",
        "mlp.fc2",
        "mlp.c_proj",
        "mlp.fc_out",
        "mlp.dense_4h_to_h",
        "fc2",
        "mlp_block.down_proj",
    ),
    *("feed_forward.down_proj", "feed_forward.w2", "ffn.down_proj", "mixer.down_proj"),
    *("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj", "feed_forward.shared_expert.down_proj"),
    *("mixer.shared_experts.down_proj", "shared_mlp.output_linear"),
)
ATTENTION_OUTPUTS = (
    *("self_attn.o_proj", "self_attn.dense", "self_attn.out_proj", "self_attention.dense", "attention.dense"),
    *("attn.c_proj", "attn.out_proj", "attn.attention.out_proj", "norm_attn_norm.attn.out_proj"),
    *("mamba.out_proj", "mixer.out_proj", "mixer.o_proj", "linear_attn.out_proj", "conv.out_proj"),
    *("temporal_block.linear_out", "temporal_block.o_proj"),
)
# A mixture of experts: the module that adds its experts up, and the tensors, by their names on disk, that a linear map
# of that sum goes into (with the axis of the hidden size).
EXPERT_MODULES = ("mlp", "block_sparse_moe", "feed_forward", "mixer", "ffn")
EXPERT_OUTPUTS = (
    (r"(shared_)?experts?\.(\d+\.)?(down_proj|w2)\.weight", 0),
    (r"block_sparse_moe\.output_linear\.weight", 1),
    (r"experts\.(down_proj(_bias)?|mlp\.w2)", -1),
)

_H, _BACKBONE = ("transformer.h.",), ("backbone.layers.", "model.layers.")
_WRAPPED = ("model.language_model.layers.", "language_model.model.layers.", "model.layers.")
_TYPES = ("layer_types",)
_SHARED = "its layers share one attention block, which a shallower copy of the config cannot place"
_PLAIN = Architecture()
_LAYER_TYPES = Architecture(slices=_TYPES)
_QWEN = Architecture(slices=_TYPES, counts=("max_window_layers",), note=_qwen_windows)
_DENSE_FIRST = Architecture(counts=("first_k_dense_replace",), mtp=True, note=_moe_frequency)
_GEMMA3N = Architecture(
    refuse="its layers share keys and values and slice one embedding matrix among them; not supported yet"
)

ARCHITECTURES: dict[str, Architecture] = {
    # model_type: where its layers are, and the fields that speak of single layers
    "apertus": _PLAIN,
    "arcee": _PLAIN,
    "bamba": Architecture(reindexes=("attn_layer_indices",), note=_Unserved("bamba")),
    "biogpt": Architecture(prefixes=("biogpt.layers.",)),
    "bloom": Architecture("n_layer", prefixes=_H),
    "codegen": Architecture("n_layer", prefixes=_H, note=_Unserved("codegen")),
    "cohere": _PLAIN,
    "cohere2": _LAYER_TYPES,
    "cwm": _LAYER_TYPES,
    "dbrx": Architecture("n_layers", prefixes=("transformer.blocks.",)),
    "deepseek_v2": Architecture(counts=("first_k_dense_replace",), note=_moe_frequency),
    "deepseek_v3": _DENSE_FIRST,
    "diffllama": Architecture(
        refuse="each layer's attention is computed with its index, which no config field sets"
    ),
    "dots1": Architecture(slices=_TYPES, counts=("first_k_dense_replace", "max_window_layers")),
    "ernie4_5": _PLAIN,
    "ernie4_5_moe": Architecture(rule=_ernie_moe, mtp=True),
    "exaone4": Architecture(slices=_TYPES, note=_exaone4_rope),
    "falcon": Architecture(prefixes=_H),
    "falcon_h1": _PLAIN,
    "falcon_mamba": Architecture(prefixes=_BACKBONE),
    "flex_olmo": _PLAIN,
    "gemma": _PLAIN,
    "gemma2": _LAYER_TYPES,
    "gemma3": Architecture(default_depth=26, prefixes=_WRAPPED, text_config="text_config", slices=_TYPES),
    "gemma3_text": Architecture(slices=_TYPES, prefixes=("model.layers.", *_WRAPPED)),
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "gemma4": _GEMMA3N,
    "gemma4_text": _GEMMA3N,
    "glm": _PLAIN,
    "glm4": _PLAIN,
    "glm4_moe": _DENSE_FIRST,
    "gpt2": Architecture(
        "n_layer",
        prefixes=_H,
        refuse="scale_attn_by_inverse_layer_idx divides each layer's attention by its index, which no field sets",
        refuse_if="scale_attn_by_inverse_layer_idx",
    ),
    "gpt_bigcode": Architecture("n_layer", prefixes=_H),
    "gpt_neo": Architecture(
        "num_layers",
        prefixes=_H,
        slices=("attention_layers",),
        rule=_gpt_neo_attention,
        note=_Unserved("gpt_neo"),
    ),
    "gpt_neox": Architecture(prefixes=("gpt_neox.layers.",)),
    "gpt_oss": Architecture(slices=_TYPES, note=_gpt_oss_parity),
    "gptj": Architecture("n_layer", prefixes=_H),
    "granite": _PLAIN,
    "granitemoe": _PLAIN,
    "granitemoehybrid": _LAYER_TYPES,
    "granitemoeshared": _PLAIN,
    "helium": _PLAIN,
    "hunyuan_v1_dense": _PLAIN,
    "jamba": Architecture(rule=_periods),
    "lfm2": Architecture(slices=_TYPES, reindexes=("full_attn_idxs",)),
    "lfm2_moe": Architecture(slices=_TYPES, reindexes=("full_attn_idxs",), counts=("num_dense_layers",)),
    "llama": _PLAIN,
    "llama4": Architecture(
        default_depth=48,
        prefixes=("language_model.model.layers.", *_WRAPPED),
        text_config="text_config",
        slices=("no_rope_layers", "layer_types"),
        rule=_llama4_moe,
        note=_llama4_step,
    ),
    "llama4_text": Architecture(
        slices=("no_rope_layers", "layer_types"),
        prefixes=("model.layers.", "language_model.model.layers."),
        rule=_llama4_moe,
        note=_llama4_step,
    ),
    "mamba": Architecture(prefixes=_BACKBONE),
    "mamba2": Architecture(prefixes=_BACKBONE),
    "minicpm3": Architecture(rule=_scale_depth),
    "minimax": Architecture(
        refuse="its linear attention decays by layer index over depth, which no field sets"
    ),
    "ministral": _LAYER_TYPES,
    "ministral3": _PLAIN,
    "mistral": _PLAIN,
    "mixtral": _PLAIN,
    "mllama": Architecture(refuse="its cross-attention layers read another encoder; not supported yet"),
    "mpt": Architecture("n_layers", prefixes=("transformer.blocks.",), note=_Unserved("mpt")),
    "nemotron": _PLAIN,
    "nemotron_h": Architecture(
        "layers_block_type", prefixes=_BACKBONE, slices=("layers_block_type",), rule=_hybrid_pattern, mtp=True
    ),
    "olmo": _PLAIN,
    "olmo2": _PLAIN,
    "olmo3": _LAYER_TYPES,
    "olmoe": _PLAIN,
    "opt": Architecture(prefixes=("model.decoder.layers.",)),
    "persimmon": Architecture(note=_Unserved("persimmon")),
    "phi": _PLAIN,
    "phi3": _PLAIN,
    "phimoe": _PLAIN,
    "qwen2": _QWEN,
    "qwen2_moe": Architecture(slices=_TYPES, counts=("max_window_layers",), rule=_sparse_step),
    "qwen3": _QWEN,
    "qwen3_moe": Architecture(rule=_sparse_step),
    "qwen3_next": Architecture(slices=_TYPES, rule=_sparse_step),
    "recurrent_gemma": Architecture(rule=_recurrent_blocks, note=_Unserved("recurrent_gemma")),
    "seed_oss": _PLAIN,
    "slicer_blockwise": Architecture(slices=("layer_types", "block_configs"), rule=_attention_first),
    "smollm3": Architecture(slices=("no_rope_layers", "layer_types")),
    "stablelm": _PLAIN,
    "starcoder2": _PLAIN,
    "vaultgemma": _LAYER_TYPES,
    "xglm": Architecture("num_layers", note=_Unserved("xglm")),
    "zamba": Architecture(refuse=_SHARED),
    "zamba2": Architecture(refuse=_SHARED),
}


# --- the questions the rest of slicer asks ----------------------------------------------------------------------------


def _row(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    name = config.get("model_type")
    if not isinstance(name, str):
        raise ArchitectureError("config.json has no model_type; give a transformers checkpoint")
    if name not in ARCHITECTURES:
        raise ArchitectureError(
            f"model type {name!r} is not in slicer's table, so its per-layer fields are unknown; to add it, write a "
            "row in slicer/checkpoint/architectures.py (docs/architecture.md, 'Adding an architecture')"
        )
    return name, ARCHITECTURES[name]


def lookup(config: Mapping[str, Any]) -> Architecture:
    """The row for a raw config.json.

    Raises ArchitectureError for a model type that is not in the table, or that no cut can be written for.
    """
    name, row = _row(config)
    if row.refuse and (row.refuse_if is None or text_config(config).get(row.refuse_if)):
        raise ArchitectureError(f"{name} cannot be sliced: {row.refuse}; choose another model")
    return row


def text_config(config: Mapping[str, Any]) -> Fields:
    """The part of the config that describes the decoder: a nested one for multimodal wrappers (never a copy)."""
    row = ARCHITECTURES.get(str(config.get("model_type")))
    nested = config.get(row.text_config) if row and row.text_config else None
    part = nested if isinstance(nested, dict) else config
    assert isinstance(part, dict)
    return part


def depth(config: Mapping[str, Any]) -> int:
    """N, the number of decoder layers. Raises ArchitectureError when the config does not say."""
    name, row = _row(config)
    part = text_config(config)
    if row.depth_field == "layers_block_type":
        lists = (part.get(field) for field in ("layers_block_type", "layer_types", "hybrid_override_pattern"))
        value: Any = next((len(x) for x in lists if isinstance(x, list | str)), None)
    else:
        names = (row.depth_field, *_DEPTH_NAMES)
        value = next((part[field] for field in names if part.get(field) is not None), row.default_depth)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        where = f"{row.text_config}.{row.depth_field}" if part is not config else row.depth_field
        raise ArchitectureError(
            f"config.json: {where} of this {name} must be a number of layers, not {value!r}"
        )
    return value


def layer_prefix(architecture: Architecture, keys: Iterable[str]) -> str:
    """What the keys of the decoder layers start with in this checkpoint, such as "model.layers.".

    Checkpoints of the bare model lack the outermost name ("h.0." for "transformer.h.0."). Raises
    ArchitectureError when no key fits.
    """
    found = {match[1] for key in keys if (match := re.match(r"((?:[^.]+\.)*?)\d+\.", key))}
    for prefix in architecture.prefixes:
        if prefix in found:
            return prefix
    for prefix in architecture.prefixes:
        if (bare := prefix.partition(".")[2]) in found:
            return bare
    raise ArchitectureError(
        f"no tensor is named {architecture.prefixes[0]}<number>.*, as layers of this model type are; "
        "the weights do not belong to this config.json"
    )


def slice_key(key: str, prefix: str, kept: Sequence[int], depth: int) -> str | None:
    """The name of a tensor in the sliced checkpoint, or None if it goes.

    Tensors of dropped layers go, and those that predict further tokens (MTP): layers past the last one, and
    anything named `mtp`, since what they were trained to follow is no longer there.
    """
    if key.startswith(prefix):
        number, dot, rest = key[len(prefix) :].partition(".")
        if number.isdecimal() and dot:
            at = bisect_left(kept, int(number))
            stays = at < len(kept) and kept[at] == int(number)
            return f"{prefix}{at}.{rest}" if stays else None
    return None if re.search(r"(^|\.)mtp(_|\.|$)", key) else key


def rewrite_config(config: Mapping[str, Any], expanded: Mapping[str, Any], kept: Sequence[int]) -> Fields:
    """The config.json of the sliced checkpoint.

    `config` is the raw one, `expanded` what transformers makes of it (`AutoConfig(...).to_dict()`), `kept` the
    layers that stay. Depth and per-layer fields are rewritten, per-layer lists that were only implied are
    written out, all else stays as and where it was. Raises ArchitectureError naming the field that cannot
    express the cut, or that does not fit the depth to begin with.
    """
    row, old_depth = lookup(config), depth(config)
    new: Fields = _copy(config)
    part, old = text_config(new), text_config(expanded)
    read = _expanded_depth(row, old)
    if read is not None and read != old_depth:
        raise ArchitectureError(
            f"config.json: transformers reads {read} layers where {row.depth_field} says {old_depth}; make them agree"
        )
    for where in (new, part) if part is not new else (part,):
        for name in _DEPTH_NAMES:
            if where.get(name) == old_depth:
                where[name] = len(kept)
        for name in _MTP_NAMES:
            if where.get(name):
                where[name] = 0
    if row.depth_field in _DEPTH_NAMES:
        part.setdefault(row.depth_field, len(kept))
    if row.mtp and not any(name in part for name in _MTP_NAMES):
        part["num_nextn_predict_layers"] = 0
    _slice_lists(part, old, row, kept, old_depth)
    for name in row.reindexes:
        members = part.get(name) if part.get(name) is not None else old.get(name)
        if members is not None:
            part[name] = _positions(members, kept)
    for name in row.counts:
        bound = part.get(name) if part.get(name) is not None else old.get(name)
        if bound is not None:
            part[name] = bisect_left(kept, bound)
    for name in _BY_LAYER_KEYS:
        if isinstance(part.get(name), dict):
            by_layer = {int(i): value for i, value in part[name].items()}
            part[name] = {str(at): by_layer[i] for at, i in enumerate(kept) if i in by_layer}
    if row.rule:
        row.rule(part, old, kept, old_depth)
    return new


def is_explicit(config: Mapping[str, Any]) -> bool:
    """Whether a raw config.json says all that its rewriting needs: the depth, and no other field for single layers.

    Then no default of transformers is asked for: `rewrite_config(config, config, kept)` is the whole story.
    """
    row = lookup(config)
    rewritten = row.slices or row.reindexes or row.counts or row.rule or row.mtp or row.text_config
    lists = [
        k for k, v in config.items() if isinstance(v, list) and k != "architectures" and "token" not in k
    ]
    return not rewritten and row.depth_field in config and not lists and "per_layer_config" not in config


def unserved(config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot serve a checkpoint of this model type at all, or None."""
    row = ARCHITECTURES.get(str(config.get("model_type")))
    return row.note({}, (), 0) if row is not None and isinstance(row.note, _Unserved) else None


def check_rewritten(expanded: Mapping[str, Any], again: Mapping[str, Any], kept: Sequence[int]) -> None:
    """Compare what transformers makes of the rewritten config (`again`) with what it made of the old one.

    Raises ArchitectureError naming the field when a layer would not be what it was, as where a config class
    overrules its own file.
    """
    row, old, new = lookup(expanded), text_config(expanded), text_config(again)
    old_depth, new_depth = _expanded_depth(row, old), _expanded_depth(row, new)
    if new_depth != len(kept) and new_depth is not None:
        raise ArchitectureError(
            f"{row.depth_field}: transformers reads {new_depth} layers where {len(kept)} were kept"
        )
    for name in _per_layer(old, row, old_depth or 0):
        if list(new.get(name) or ()) != [old[name][i] for i in kept]:
            raise ArchitectureError(
                f"{name}: transformers would read {new.get(name)} for the layers that stay; choose another cut"
            )


def warnings(config: Mapping[str, Any], kept: Sequence[int], rewritten: Mapping[str, Any]) -> list[str]:
    """Where the sliced checkpoint will load but not serve as one would think, and what to choose instead.

    `config` is the raw config.json of the source, `rewritten` what `rewrite_config` made of it.
    """
    row = lookup(config)
    found = [_unattended(config, kept, rewritten)]
    if row.note:
        found.append(row.note(text_config(config), kept, depth(config)))
    return [note for note in found if note]


def _unattended(config: Mapping[str, Any], kept: Sequence[int], rewritten: Mapping[str, Any]) -> str | None:
    """transformers counts a hybrid's cached tokens in an attention layer: without one it cannot generate."""
    part = text_config(rewritten)
    if isinstance(part.get("attn_layer_indices"), list):
        attention = bool(part["attn_layer_indices"])
    else:
        fields = ("layers_block_type", "layer_types", "hybrid_override_pattern")
        kinds = next((part[name] for name in fields if part.get(name)), None)
        if kinds is None:
            return None
        attention = any(kind == "*" or ("attention" in kind and kind != "linear_attention") for kind in kinds)
    if attention:
        return None
    return (
        "no attention layer stays, and transformers cannot generate from such a hybrid with a cache: "
        "keep at least one attention layer"
    )


# --- helpers ----------------------------------------------------------------------------------------------------------


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _positions(members: Iterable[int], kept: Sequence[int]) -> list[int]:
    """New positions of those old indices that are kept."""
    stay = set(members)
    return [at for at, i in enumerate(kept) if i in stay]


def _given(config: Mapping[str, Any], name: str, depth: int) -> list[Any] | None:
    """A per-layer list that the raw config writes out in full."""
    value = config.get(name)
    return value if isinstance(value, list) and len(value) == depth else None


def _check_length(name: str, values: Sequence[Any], depth: int) -> None:
    if len(values) != depth:
        raise ArchitectureError(
            f"config.json: {name} has {len(values)} entries for {depth} layers; correct it in the source"
        )


def _expanded_depth(row: Architecture, old: Mapping[str, Any]) -> int | None:
    value = old.get(row.depth_field)
    return len(value) if isinstance(value, list) else value


def _slice_lists(
    part: Fields, old: Mapping[str, Any], row: Architecture, kept: Sequence[int], depth: int
) -> None:
    for name in row.slices:
        names = [n for n in (name, _ALIASES.get(name, name)) if part.get(n)]
        for given in names:
            _check_length(given, part[given], depth)
        implied = old.get(name) or old.get(_ALIASES.get(name, name))
        if not names and implied and not isinstance(part.get("hybrid_override_pattern"), str):
            _check_length(name, implied, depth)
            part[name] = list(implied)
    for name in _per_layer(part, row, depth):
        part[name] = [part[name][i] for i in kept]


def _per_layer(config: Mapping[str, Any], row: Architecture, depth: int) -> list[str]:
    """Fields that hold one entry a layer: those known to, and any other list of that length."""
    other = {*_NOT_PER_LAYER, *row.reindexes}
    return [
        name
        for name, value in config.items()
        if isinstance(value, list | tuple)
        and len(value) == depth
        and name not in other
        and "token" not in name
    ]
