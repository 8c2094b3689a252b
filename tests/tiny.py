"""Tiny random checkpoints of every architecture, made from the real classes: `save_tiny("llama", path)`.

Everything is small (hidden size 64, head size 32 where it is free, vocabulary 160, mostly 7 layers) and nothing is
trivial: per-layer patterns are mixed and unaligned with any period, windows are shorter than the test's sequences, and
every parameter is random, norms and biases too, so that a layer lost, doubled or misread shows in the logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEPTH = 7
VOCAB = 160
WINDOW = 5  # tokens a sliding-attention layer sees

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD32 = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
_WINDOW = {"sliding_window": WINDOW}
_S, _F, _L, _M, _C = "sliding_attention", "full_attention", "linear_attention", "mamba", "conv"
_MIXED = [_S, _F, _S, _S, _F, _F, _S]
_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": DEPTH,
    "n_head": 2,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": DEPTH, "state_size": 8}
_BAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_GEMMA = {**_LLAMA, **_HEAD32, "query_pre_attn_scalar": 32}
_LLAMA4 = {
    **_LLAMA,
    **_HEAD32,
    "intermediate_size_mlp": 80,
    "num_local_experts": 3,
    "attention_chunk_size": 6,
    "no_rope_layers": [1, 0, 1, 1, 0, 1, 1],
    "moe_layers": [1, 2, 5],
    "floor_scale": 4,
}

# model_type -> fields of its tiny configuration
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, **_HEAD32},
    "mistral": {**_LLAMA, **_HEAD32, **_WINDOW},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {**_LLAMA, **_HEAD32, **_WINDOW, "layer_types": _MIXED},
    "qwen2": {**_LLAMA, **_WINDOW, "use_sliding_window": True, "max_window_layers": 3},
    "qwen3": {**_LLAMA, **_HEAD32, **_WINDOW, "use_sliding_window": True, "max_window_layers": 4},
    "qwen2_moe": {
        **_LLAMA,
        **_MOE,
        **_WINDOW,
        "num_experts": 4,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "use_sliding_window": True,
        "max_window_layers": 5,
    },
    "qwen3_moe": {
        **_LLAMA,
        **_HEAD32,
        **_MOE,
        "num_experts": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [5],
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        **_LLAMA,
        **_HEAD32,
        **_MOE,
        **_DELTA,
        "num_experts": 4,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [2],
        "decoder_sparse_step": 1,
        "layer_types": [_L, _L, _F, _L, _L, _F, _L],
    },
    "gemma": {**_LLAMA, **_HEAD32},
    "gemma2": {**_GEMMA, **_WINDOW},
    "gemma3_text": {**_GEMMA, **_WINDOW, "sliding_window_pattern": 3},
    "gemma3": {
        "text_config": {**_GEMMA, **_WINDOW, "layer_types": _MIXED, "vocab_size": VOCAB},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "boi_token_index": 150,
        "eoi_token_index": 151,
        "image_token_index": 152,
    },
    "phi": {**_LLAMA, "partial_rotary_factor": 0.5},
    "phi3": {**_LLAMA, **_WINDOW},
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 16},
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_layers": DEPTH,
        "num_heads": 2,
        "max_position_embeddings": 128,
        "window_size": WINDOW,
        "attention_types": [[["global", "local"], 2], [["local"], 2], [["global"], 1]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {**_LLAMA, "num_attention_heads": 2},
    "opt": {**_LLAMA, "num_attention_heads": 2, "ffn_dim": 96, "word_embed_proj_dim": 48},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": DEPTH, "n_head": 2},
    "falcon": {**_LLAMA, "num_kv_heads": 2, "new_decoder_architecture": True},
    "stablelm": {**_LLAMA, "qk_layernorm": True, "use_qkv_bias": True},
    "starcoder2": {**_LLAMA, **_WINDOW},
    "olmo": {**_LLAMA, "clip_qkv": 2.0},
    "olmo2": _LLAMA,
    "olmo3": {**_LLAMA, **_WINDOW},
    "granite": {**_LLAMA, "residual_multiplier": 0.7, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "granitemoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.7},
    "cohere": {**_LLAMA, "use_qk_norm": True},
    "cohere2": {**_LLAMA, **_WINDOW, "sliding_window_pattern": 3},
    "smollm3": {**_LLAMA, **_WINDOW, "use_sliding_window": True, "no_rope_layer_interval": 3},
    "glm": {**_LLAMA, **_HEAD32},
    "glm4": {**_LLAMA, **_HEAD32},
    "gpt_oss": {**_LLAMA, **_HEAD32, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LLAMA, **_MLA, **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 3},
    "deepseek_v3": {
        **_LLAMA,
        **_MLA,
        **_MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 3,
    },
    "exaone4": {**_LLAMA, **_WINDOW, "sliding_window_pattern": 3},
    "nemotron": {**_LLAMA, **_HEAD32},
    "llama4_text": _LLAMA4,
    "llama4": {
        "text_config": _LLAMA4,
        "vision_config": {**_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        "boi_token_index": 150,
        "eoi_token_index": 151,
        "image_token_index": 152,
    },
    "lfm2": {**_LLAMA, "full_attn_idxs": [1, 4, 5], "block_auto_adjust_ff_dim": False},
    "ernie4_5": {**_LLAMA, **_HEAD32},
    "seed_oss": {**_LLAMA, **_HEAD32},
    "mamba2": {**_MAMBA, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 8},
    "bamba": {**_LLAMA, **_BAMBA, "attn_layer_indices": [1, 4, 5]},
    "granitemoehybrid": {
        **_LLAMA,
        **_BAMBA,
        "layer_types": [_L, _F, _L, _L, _F, _F, _L],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 40,
        "position_embedding_type": "rope",
    },
    "nemotron_h": {
        **{k: v for k, v in _LLAMA.items() if k != "num_hidden_layers"},
        **_HEAD32,
        **_MOE,
        "hybrid_override_pattern": "M*-EM-*",
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 40,
    },
    "minicpm3": {**_LLAMA, **_MLA, "dim_model_base": 32, "scale_emb": 2},
    # beyond the required ones
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "gpt_bigcode": _GPT2,
    "codegen": {**_GPT2, "n_embd": 128, "n_head": 4, "rotary_dim": 16},
    "xglm": {
        "vocab_size": VOCAB,
        "d_model": 64,
        "ffn_dim": 96,
        "num_layers": DEPTH,
        "attention_heads": 2,
        "max_position_embeddings": 128,
    },
    "biogpt": {**_LLAMA, "num_attention_heads": 2},
    "mpt": {"vocab_size": VOCAB, "d_model": 64, "n_layers": DEPTH, "n_heads": 2, "max_seq_len": 128},
    "dbrx": {
        "vocab_size": VOCAB,
        "d_model": 64,
        "n_layers": DEPTH,
        "n_heads": 4,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "persimmon": {**_LLAMA, "num_attention_heads": 2},
    "glm4_moe": {**_LLAMA, **_MOE, "head_dim": 16, "n_routed_experts": 4, "first_k_dense_replace": 2},
    "dots1": {
        **_LLAMA,
        **_MOE,
        **_WINDOW,
        "n_routed_experts": 4,
        "first_k_dense_replace": 2,
        "max_window_layers": 4,
        "n_shared_experts": 1,
    },
    "ernie4_5_moe": {
        **_LLAMA,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 2,
        "moe_layer_end_index": 5,
        "moe_num_shared_experts": 1,
    },
    "recurrent_gemma": {
        **_LLAMA,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "lru_width": 64,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "jamba": {
        **_LLAMA,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "cwm": {**_LLAMA, **_HEAD32, **_WINDOW},
    "vaultgemma": {**_GEMMA, **_WINDOW},
    "olmoe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "arcee": {**_LLAMA, **_HEAD32},
    "apertus": {**_LLAMA, **_HEAD32},
    "helium": {**_LLAMA, **_HEAD32},
    "granitemoeshared": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 40},
    "falcon_h1": {**_LLAMA, **_BAMBA, "mamba_d_ssm": 128, "head_dim": 32},
    "hunyuan_v1_dense": {**_LLAMA, **_HEAD32},
    "ministral3": {**_LLAMA, **_HEAD32},
    "lfm2_moe": {
        **_LLAMA,
        **_MOE,
        "num_experts": 4,
        "num_dense_layers": 3,
        "layer_types": [_C, _F, _C, _C, _F, _F, _C],
    },
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The tiny PretrainedConfig of a model type; `overrides` change or add fields, None as a value included."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **overrides})


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model in eval mode of that configuration, the same for the same arguments."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    # As a causal LM, transformers makes of llama4 the decoder without its wrapper.
    auto = AutoModelForImageTextToText if model_type == "llama4" else AutoModelForCausalLM
    model = auto.from_config(tiny_config(model_type, **overrides)).float().eval()
    _randomize(model, seed)
    return model


def save_tiny(model_type: str, path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny random float32 checkpoint as `save_pretrained` does, and return its directory."""
    tiny_model(model_type, seed=seed, **overrides).save_pretrained(path)
    return path


def _randomize(model: Any, seed: int) -> None:
    """Make every weight count: large matrices, and noise where a fresh model has zeros or ones."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or name.endswith(("inv_freq", "masked_bias", "embed_scale")):
                continue
            is_buffer = not isinstance(tensor, torch.nn.Parameter)
            noise = torch.randn(tensor.shape, generator=generator)
            if is_buffer and not name.endswith(("correction_bias", "expert_bias")):
                continue
            if tensor.ndim >= 2 and "A_log" not in name:
                fan_in = tensor.shape[-1] if "conv" not in name else tensor[0].numel()
                tensor.copy_(noise * (1.0 if "embed" in name else 0.8) / max(fan_in, 1) ** 0.5)
            else:
                tensor.add_(0.1 * noise)


@contextlib.contextmanager
def residual_stream(model: Any) -> Iterator[list[Any]]:
    """x(0)..x(L) of the latest forward pass inside the block, [batch, seq, d] each."""
    from slicer.model.layers import watch

    found: list[Any] = []

    def listener(index: int, states: Any) -> None:
        if index == 0:
            found.clear()
        found.append(states.detach())

    with watch(model, listener):
        yield found
