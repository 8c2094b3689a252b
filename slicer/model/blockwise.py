"""The configuration of the blockwise form: a Llama-like model whose layers may lack a sublayer.

`block_configs` has one entry per layer, as vLLM's DeciLMForCausalLM reads it (by attribute) and as JSON:

    {"attention": {"no_op": false, "n_heads_in_group": 7}, "ffn": {"no_op": false, "intermediate_size": 4864}}

A block may also have `"emulated_ranks": {"mid": r, "end": r}`: the ranks of low-rank replacements of removed sublayers,
after its attention and after its feed-forward sublayer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
)

from slicer.checkpoint.blockwise import MODEL_TYPE


class Block(dict[str, Any]):
    """A JSON object with attribute access to its entries."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class BlockwiseConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's fields and, besides `block_configs`: `layer_types` and `sliding_window` as in Mistral and Qwen2, and
    `qkv_bias` (None: as `attention_bias`, which otherwise applies to the output projection only)."""

    model_type = MODEL_TYPE

    layer_types: list[str] | None = None
    sliding_window: int | None = None
    qkv_bias: bool | None = None
    block_configs: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.qkv_bias is None:
            self.qkv_bias = self.attention_bias
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        group = self.num_attention_heads // self.num_key_value_heads
        if self.block_configs is None:
            whole = {
                "attention": {"no_op": False, "n_heads_in_group": group},
                "ffn": {"no_op": False, "intermediate_size": self.intermediate_size},
            }
            self.block_configs = [whole] * self.num_hidden_layers
        self.block_configs = [
            Block({name: Block(part) for name, part in block.items()}) for block in self.block_configs
        ]
        if len(self.block_configs) != self.num_hidden_layers:
            raise ValueError(f"block_configs has {len(self.block_configs)} entries for {self.num_hidden_layers} layers")
        for i, block in enumerate(self.block_configs):
            if not block.attention.no_op and block.attention.n_heads_in_group != group:
                raise ValueError(
                    f"block_configs[{i}]: n_heads_in_group is {block.attention.n_heads_in_group}, not {group}"
                )


class DeciLMAttention(Qwen2Attention):  # type: ignore[misc]
    """Attention with biases by config: `qkv_bias` for queries, keys and values, `attention_bias` for the output."""

    def __init__(self, config: BlockwiseConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            old, bias = getattr(self, name), config.attention_bias if name == "o_proj" else config.qkv_bias
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
