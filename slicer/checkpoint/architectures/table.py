"""The table of architectures: where each stores its layers, and which config fields refer to single layers.

Standard library only, so a plan can be checked before anything heavy is loaded. To add an architecture, add a row to
`ARCHITECTURES` (its model_type, and whatever differs from the defaults of `Architecture`; where nothing does, its name
in `_PLAIN`) and a tiny configuration to tests/tiny.py; a test checks the row.

With K the kept old layer indices in order, a field is rewritten (`slicer.checkpoint.config`) by one of:

    slice     [x[i] for i in K]                         a list with one entry per layer
    reindex   the new positions of the members kept     a list of layer indices
    count     #{i in K: i < x}                          a threshold: layers below x are of another kind
    rule      a function of `architectures.rules`       anything else
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slicer.checkpoint.architectures import rules, vllm
from slicer.checkpoint.architectures.rules import Fields, Rule
from slicer.checkpoint.architectures.vllm import Note
from slicer.errors import ArchitectureError

DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Architecture:
    """How one model type stores its layers.

    Attributes:
        depth_field: the config field of the depth; a list if the depth is its length.
        default_depth: the depth if the field is absent (wrappers write only values that differ from the default).
        prefixes: possible prefixes of the layers' tensor keys; the first match is used.
        text_config: the nested config of the decoder, if it is nested.
        slices, reindexes, counts: per-layer fields by the way they are rewritten (see the module docstring).
        rule: rewrites what those three cannot.
        mtp: has multi-token-prediction layers after the last; they are dropped and switched off.
        refuse: why no cut of it can be written.
        refuse_if: the config field that must be true for `refuse` to apply.
        note: what vLLM reads differently.
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


# A feed-forward sublayer, or its last map where it has no module of its own, by name within the layer; the first one is
# what adds to the residual stream in a layer with several.
FEED_FORWARDS = ("mlp", "feed_forward", "ffn", "mlp_block", "block_sparse_moe", "fc2", "shared_mlp")
# The last linear map of the feed-forward sublayer, or of the attention (or its equivalent), by module name within the
# layer: it writes into the residual stream. The names mean the same in all rows of the table, so rows do not list them.
FEED_FORWARD_OUTPUTS = (
    *("mlp.down_proj", "mlp.fc2", "mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h", "fc2", "mlp_block.down_proj"),
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
# Mixtures of experts: the module that sums the experts, and the tensor names on disk that a linear map of that sum is
# folded into (with the axis of the hidden size).
EXPERT_MODULES = ("mlp", "block_sparse_moe", "feed_forward", "mixer", "ffn")
EXPERT_OUTPUTS = (
    (r"(shared_)?experts?\.(\d+\.)?(down_proj|w2)\.weight", 0),
    (r"block_sparse_moe\.output_linear\.weight", 1),
    (r"experts\.(down_proj(_bias)?|mlp\.w2)", -1),
)
_H, _BACKBONE = ("transformer.h.",), ("backbone.layers.", "model.layers.")
_WRAPPED = ("model.language_model.layers.", "language_model.model.layers.", "model.layers.")
_TYPES = ("layer_types",)
_SHARED = "its layers share one attention block, which a config with fewer layers cannot express"
# Model types that the defaults of `Architecture` describe.
_PLAIN = (
    "apertus", "arcee", "cohere", "ernie4_5", "falcon_h1", "flex_olmo", "gemma", "glm", "glm4", "granite",
    "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "llama", "ministral3", "mistral",
    "mixtral", "nemotron", "olmo", "olmo2", "olmoe", "phi", "phi3", "phimoe", "seed_oss", "stablelm",
    "starcoder2",
)  # fmt: skip
_LAYER_TYPES = ("cohere2", "cwm", "gemma2", "granitemoehybrid", "ministral", "olmo3", "vaultgemma")
_DENSE_FIRST = Architecture(counts=("first_k_dense_replace",), mtp=True, note=vllm.moe_frequency)
_QWEN = Architecture(slices=_TYPES, counts=("max_window_layers",), note=vllm.qwen_windows)
_GEMMA3N = Architecture(
    refuse="its layers share keys and values and slice one embedding matrix among them; not supported yet"
)
ARCHITECTURES: dict[str, Architecture] = {
    # model_type: where its layers are, and the fields that refer to single layers
    **dict.fromkeys(_PLAIN, Architecture()),
    **dict.fromkeys(_LAYER_TYPES, Architecture(slices=_TYPES)),
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), _GEMMA3N),
    **dict.fromkeys(("deepseek_v3", "glm4_moe"), _DENSE_FIRST),
    **dict.fromkeys(("qwen2", "qwen3"), _QWEN),
    "bamba": Architecture(reindexes=("attn_layer_indices",), note=vllm.unserved),
    "biogpt": Architecture(prefixes=("biogpt.layers.",)),
    "bloom": Architecture("n_layer", prefixes=_H),
    "codegen": Architecture("n_layer", prefixes=_H, note=vllm.unserved),
    "dbrx": Architecture("n_layers", prefixes=("transformer.blocks.",)),
    "deepseek_v2": Architecture(counts=("first_k_dense_replace",), note=vllm.moe_frequency),
    "diffllama": Architecture(refuse="each layer's attention is computed with its index, which no config field sets"),
    "dots1": Architecture(slices=_TYPES, counts=("first_k_dense_replace", "max_window_layers")),
    "ernie4_5_moe": Architecture(rule=rules.ernie_moe, mtp=True),
    "exaone4": Architecture(slices=_TYPES, note=vllm.exaone4_rope),
    "falcon": Architecture(prefixes=_H),
    "falcon_mamba": Architecture(prefixes=_BACKBONE),
    "gemma3": Architecture(default_depth=26, prefixes=_WRAPPED, text_config="text_config", slices=_TYPES),
    "gemma3_text": Architecture(slices=_TYPES, prefixes=("model.layers.", *_WRAPPED)),
    "gpt2": Architecture(
        "n_layer",
        prefixes=_H,
        refuse="scale_attn_by_inverse_layer_idx divides each layer's attention by its index, which no field sets",
        refuse_if="scale_attn_by_inverse_layer_idx",
    ),
    "gpt_bigcode": Architecture("n_layer", prefixes=_H),
    "gpt_neo": Architecture(
        "num_layers", prefixes=_H, slices=("attention_layers",), rule=rules.gpt_neo_attention, note=vllm.unserved
    ),
    "gpt_neox": Architecture(prefixes=("gpt_neox.layers.",)),
    "gpt_oss": Architecture(slices=_TYPES, note=vllm.gpt_oss_parity),
    "gptj": Architecture("n_layer", prefixes=_H),
    "jamba": Architecture(rule=rules.periods),
    "lfm2": Architecture(slices=_TYPES, reindexes=("full_attn_idxs",)),
    "lfm2_moe": Architecture(slices=_TYPES, reindexes=("full_attn_idxs",), counts=("num_dense_layers",)),
    "llama4": Architecture(
        default_depth=48,
        prefixes=("language_model.model.layers.", *_WRAPPED),
        text_config="text_config",
        slices=("no_rope_layers", "layer_types"),
        rule=rules.llama4_moe,
        note=vllm.llama4_step,
    ),
    "llama4_text": Architecture(
        slices=("no_rope_layers", "layer_types"),
        prefixes=("model.layers.", "language_model.model.layers."),
        rule=rules.llama4_moe,
        note=vllm.llama4_step,
    ),
    "mamba": Architecture(prefixes=_BACKBONE),
    "mamba2": Architecture(prefixes=_BACKBONE),
    "minicpm3": Architecture(rule=rules.scale_depth),
    "minimax": Architecture(refuse="its linear attention decays by layer index over depth, which no field sets"),
    "mllama": Architecture(refuse="its cross-attention layers read another encoder; not supported yet"),
    "mpt": Architecture("n_layers", prefixes=("transformer.blocks.",), note=vllm.unserved),
    "nemotron_h": Architecture(
        "layers_block_type", prefixes=_BACKBONE, slices=("layers_block_type",), rule=rules.hybrid_pattern, mtp=True
    ),
    "opt": Architecture(prefixes=("model.decoder.layers.",)),
    "persimmon": Architecture(note=vllm.unserved),
    "qwen2_moe": Architecture(slices=_TYPES, counts=("max_window_layers",), rule=rules.sparse_step),
    "qwen3_moe": Architecture(rule=rules.sparse_step),
    "qwen3_next": Architecture(slices=_TYPES, rule=rules.sparse_step),
    "recurrent_gemma": Architecture(rule=rules.recurrent_blocks, note=vllm.unserved),
    "slicer_blockwise": Architecture(slices=("layer_types", "block_configs"), rule=rules.attention_first),
    "smollm3": Architecture(slices=("no_rope_layers", "layer_types")),
    "xglm": Architecture("num_layers", note=vllm.unserved),
    "zamba": Architecture(refuse=_SHARED),
    "zamba2": Architecture(refuse=_SHARED),
}


def _row(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    name = config.get("model_type")
    if not isinstance(name, str):
        raise ArchitectureError("config.json has no model_type; pass a transformers checkpoint")
    if name not in ARCHITECTURES:
        raise ArchitectureError(
            f"model type {name!r} is not in slicer's table, so its per-layer fields are unknown; add a row in "
            "slicer/checkpoint/architectures/table.py (docs/architecture.md, 'Adding an architecture')"
        )
    return name, ARCHITECTURES[name]


def lookup(config: Mapping[str, Any]) -> Architecture:
    """The row for a raw config.json. Raises ArchitectureError if it is missing, or no cut can be written."""
    name, row = _row(config)
    if row.refuse and (row.refuse_if is None or text_config(config).get(row.refuse_if)):
        raise ArchitectureError(f"{name} cannot be sliced: {row.refuse}; choose another model")
    return row


def text_config(config: Mapping[str, Any]) -> Fields:
    """The part of the config that describes the decoder, nested in multimodal wrappers; not a copy."""
    row = ARCHITECTURES.get(str(config.get("model_type")))
    nested = config.get(row.text_config) if row and row.text_config else None
    part = nested if isinstance(nested, dict) else config
    assert isinstance(part, dict)
    return part


def depth(config: Mapping[str, Any]) -> int:
    """L, the number of decoder layers. Raises ArchitectureError if the config does not contain it."""
    name, row = _row(config)
    part = text_config(config)
    if row.depth_field == "layers_block_type":
        lists = (part.get(field) for field in ("layers_block_type", "layer_types", "hybrid_override_pattern"))
        value: Any = next((len(x) for x in lists if isinstance(x, list | str)), None)
    else:
        names = (row.depth_field, *DEPTH_NAMES)
        value = next((part[field] for field in names if part.get(field) is not None), row.default_depth)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        where = f"{row.text_config}.{row.depth_field}" if part is not config else row.depth_field
        raise ArchitectureError(f"config.json: {where} of this {name} must be a number of layers, not {value!r}")
    return value


def layer_prefix(architecture: Architecture, keys: Iterable[str]) -> str:
    """The key prefix of the decoder layers in this checkpoint, such as "model.layers.".

    Checkpoints of the bare model lack the outermost name ("h.0." for "transformer.h.0."). Raises ArchitectureError if
    no key matches.
    """
    found = {match[1] for key in keys if (match := re.match(r"((?:[^.]+\.)*?)\d+\.", key))}
    for prefix in architecture.prefixes:
        if prefix in found:
            return prefix
    for prefix in architecture.prefixes:
        if (bare := prefix.partition(".")[2]) in found:
            return bare
    raise ArchitectureError(
        f"no tensor is named {architecture.prefixes[0]}<number>.*, as the layers of this model type are; "
        "pass weights that belong to this config.json"
    )


def slice_key(key: str, prefix: str, kept: Sequence[int], depth: int) -> str | None:
    """The name of a tensor in the sliced checkpoint, or None if it is dropped.

    Drops the tensors of dropped layers, and of multi-token prediction (layers past the last one, and names with `mtp`),
    because the layers that it was trained on are changed.
    """
    if key.startswith(prefix):
        number, dot, rest = key[len(prefix) :].partition(".")
        if number.isdecimal() and dot:
            at = bisect_left(kept, int(number))
            stays = at < len(kept) and kept[at] == int(number)
            return f"{prefix}{at}.{rest}" if stays else None
    return None if re.search(r"(^|\.)mtp(_|\.|$)", key) else key


def unserved(config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot serve this model type, or None."""
    row = ARCHITECTURES.get(str(config.get("model_type")))
    return vllm.unserved(config, (), 0) if row is not None and row.note is vllm.unserved else None
