"""The blockwise form as a transformers model: Qwen2's code, without the sublayers that a layer lacks.

It has the class name of vLLM's own model, DeciLMForCausalLM, and reads the same directory. A layer without attention
stores no keys and values; a low-rank replacement of removed sublayers acts after the sublayer before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
)

from slicer.checkpoint.blockwise_config import BlockwiseConfig


class DeciLMAttention(Qwen2Attention):  # type: ignore[misc]
    """Attention with biases by config: `qkv_bias` for queries, keys and values, `attention_bias` for the output."""

    def __init__(self, config: BlockwiseConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name, bias in (
            ("q_proj", config.qkv_bias),
            ("k_proj", config.qkv_bias),
            ("v_proj", config.qkv_bias),
            ("o_proj", config.attention_bias),
        ):
            old = getattr(self, name)
            setattr(self, name, nn.Linear(old.in_features, old.out_features, bias=bool(bias)))


class Emulated(nn.Module):
    """Low-rank replacement of removed sublayers: x + up(down(norm(x))), rank r, [.., d] -> [.., d]."""

    def __init__(self, width: int, rank: int, eps: float) -> None:
        super().__init__()
        self.norm = Qwen2RMSNorm(width, eps=eps)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        new: torch.Tensor = hidden_states + self.up(self.down(self.norm(hidden_states)))
        return new


class DeciLMDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """A decoder layer with the sublayers that its entry of `block_configs` lists."""

    def __init__(self, config: BlockwiseConfig, layer_idx: int) -> None:
        super().__init__()
        block = (config.block_configs or [])[layer_idx]
        width, eps = config.hidden_size, config.rms_norm_eps
        self.hidden_size = width
        self.has_attention, self.has_ffn = not block.attention.no_op, not block.ffn.no_op
        if self.has_attention:
            self.input_layernorm = Qwen2RMSNorm(width, eps=eps)
            self.self_attn = DeciLMAttention(config, layer_idx)
        if self.has_ffn:
            self.post_attention_layernorm = Qwen2RMSNorm(width, eps=eps)
            self.mlp = LlamaMLP(config)
        ranks = block.get("emulated_ranks", {})
        self.emulated_mid = Emulated(width, ranks["mid"], eps) if "mid" in ranks else None
        self.emulated_end = Emulated(width, ranks["end"], eps) if "end" in ranks else None

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.has_attention:
            update, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + update
        if self.emulated_mid is not None:
            hidden_states = self.emulated_mid(hidden_states)
        if self.has_ffn:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        if self.emulated_end is not None:
            hidden_states = self.emulated_end(hidden_states)
        return hidden_states


class DeciLMPreTrainedModel(Qwen2PreTrainedModel):  # type: ignore[misc]
    """Settings that the two classes below share."""

    config: BlockwiseConfig
    config_class = BlockwiseConfig
    _no_split_modules = ["DeciLMDecoderLayer"]
    _can_record_outputs = {"hidden_states": DeciLMDecoderLayer, "attentions": DeciLMAttention}


class DeciLMModel(DeciLMPreTrainedModel, Qwen2Model):  # type: ignore[misc]
    """The decoder: Qwen2's, with `DeciLMDecoderLayer`."""

    def __init__(self, config: BlockwiseConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(DeciLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class DeciLMForCausalLM(DeciLMPreTrainedModel, Qwen2ForCausalLM):  # type: ignore[misc]
    """The decoder with a language-model head."""

    def __init__(self, config: BlockwiseConfig) -> None:
        Qwen2PreTrainedModel.__init__(self, config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoModel.register(BlockwiseConfig, DeciLMModel, exist_ok=True)
AutoModelForCausalLM.register(BlockwiseConfig, DeciLMForCausalLM, exist_ok=True)
