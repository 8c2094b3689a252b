"""The blockwise form: layers without attention or without feed-forward sublayer, served by vLLM's DeciLMForCausalLM.

That class (vLLM 0.32, `nemotron_nas.py`) supports Llama's layer, with or without biases, silu, any rotary embedding, no
norm of queries and keys, and needs attention in the first layer. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ArchitectureError
from slicer.plan.plan import Plan

MODEL_TYPE = "slicer_blockwise"  # of config.json; `slicer` registers it with transformers
FAMILIES = ("llama", "mistral", "qwen2")
STOCK_CLASS, OWN_CLASS = "DeciLMForCausalLM", "SlicerBlockwiseForCausalLM"
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "tie_word_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "attention_dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "head_dim", "dtype", "torch_dtype", "layer_types"),
    *("sliding_window", "transformers_version"),
)
_ZEROED = "use --format zeroed, which loads everywhere but saves no memory"


def check(checkpoint: Checkpoint, config: Mapping[str, Any], plan: Plan) -> None:
    """Raise ArchitectureError if the blockwise form cannot express what `plan` keeps of `checkpoint`.

    `config` is config.json with transformers' defaults written out.
    """
    name = str(config.get("model_type"))
    if name == MODEL_TYPE:
        raise ArchitectureError(
            f"{checkpoint.path}: already in the blockwise form; drop everything at once from the original"
        )
    reason = None
    if any(".q_norm." in key or ".q_layernorm." in key for key in checkpoint.tensors):
        reason = "does not support normed queries and keys (QK-norm)"
    elif name not in FAMILIES:
        reason = f"supports only {', '.join(FAMILIES[:-1])} and {FAMILIES[-1]}"
    elif config.get("hidden_act", "silu") != "silu":
        reason = f"supports only silu, not {config['hidden_act']!r}"
    if reason:
        raise ArchitectureError(f"{name}: the blockwise form {reason}; {_ZEROED}")
    if plan.sublayers[0][0] in plan.no_attention:
        raise ArchitectureError(
            f"the attention of layer {plan.sublayers[0][0]} cannot be dropped: in the blockwise form the first layer "
            f"needs its attention; choose others ({_ZEROED})"
        )
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if heads % (kv_heads or heads):
        raise ArchitectureError(f"{name}: {heads} heads are not a multiple of {kv_heads} key-value heads; {_ZEROED}")


def config_of(rewritten: Mapping[str, Any], expanded: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """config.json of the blockwise form; `rewritten`: of the kept layers, `expanded`: of the source, with defaults."""
    merged = {**expanded, **rewritten}
    name, heads = merged["model_type"], merged["num_attention_heads"]
    biased = name == "llama" and bool(merged.get("attention_bias"))
    group = heads // (merged.get("num_key_value_heads") or heads)
    config: dict[str, Any] = {"architectures": [STOCK_CLASS], "model_type": MODEL_TYPE}
    config |= {field: merged[field] for field in _FIELDS if field in merged}
    if config.get("head_dim") is None:
        config["head_dim"] = merged["hidden_size"] // heads
    config |= {
        "attention_bias": biased,
        "qkv_bias": name == "qwen2" or biased,
        "mlp_bias": name == "llama" and bool(merged.get("mlp_bias")),
    }
    if not config.get("layer_types"):
        windowed = name == "mistral" and config.get("sliding_window") is not None
        config["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * len(plan.kept)
    if "sliding_attention" not in config["layer_types"]:
        config["sliding_window"] = None
    blocks = []
    for i, j in plan.sublayers:
        attention = {"no_op": i in plan.no_attention, "n_heads_in_group": group}
        ffn = {"no_op": j in plan.no_ffn, "intermediate_size": merged["intermediate_size"]}
        blocks.append({"attention": attention, "ffn": ffn})
    config["block_configs"] = blocks
    return config
