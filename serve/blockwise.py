"""vLLM's DeciLMForCausalLM with low-rank linear maps in the place of removed parts.

A part that is a no-op and has an `emulated_rank` adds `up(down(norm(x)))` to the stream, as in
`slicer.checkpoint.blockwise_model`. Everything else is vLLM's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.nemotron_nas import DeciLMDecoderLayer, DeciLMForCausalLM, DeciModel


class _Emulated(nn.Module):
    def __init__(self, width: int, rank: int, prefix: str) -> None:
        super().__init__()
        self.down_proj = ReplicatedLinear(width, rank, bias=False, prefix=f"{prefix}.down_proj")
        self.up_proj = ReplicatedLinear(rank, width, bias=True, prefix=f"{prefix}.up_proj")

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.up_proj(self.down_proj(states)[0])[0]
        return update


class _Layer(DeciLMDecoderLayer):  # type: ignore[misc]
    def __init__(
        self, config: Any, layer_idx: int, cache_config: Any = None, quant_config: Any = None, prefix: str = ""
    ) -> None:
        super().__init__(config, layer_idx, cache_config, quant_config, prefix)
        block = config.block_configs[layer_idx]
        for part, name, norm in (
            (block.attention, "emulated_attn", "input_layernorm"),
            (block.ffn, "emulated_mlp", "post_attention_layernorm"),
        ):
            rank = part.get("emulated_rank", 0) if part.no_op else 0
            setattr(
                self, name, _Emulated(config.hidden_size, rank, f"{prefix}.{name}") if rank else None
            )
            if rank:
                setattr(self, norm, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # vLLM's layers hand on the last update and the stream before it; a norm adds the two.
        if not self._is_no_op_attention:
            if residual is None:
                residual = hidden_states
                hidden_states = self.input_layernorm(hidden_states)
            else:
                hidden_states, residual = self.input_layernorm(hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        elif self.emulated_attn is not None:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
            hidden_states = self.emulated_attn(hidden_states)
        if not self._is_no_op_ffn:
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        elif self.emulated_mlp is not None:
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
            hidden_states = self.emulated_mlp(hidden_states)
        return hidden_states, residual


@support_torch_compile
class _Model(DeciModel):  # type: ignore[misc]
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_Layer)


class SlicerBlockwiseForCausalLM(DeciLMForCausalLM):  # type: ignore[misc]
    """The class that `architectures` of such a checkpoint names."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "") -> nn.Module:
        return _Model(vllm_config=vllm_config, prefix=prefix)
