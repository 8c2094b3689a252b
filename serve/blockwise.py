"""vLLM's DeciLMForCausalLM with low-rank replacements of removed sublayers.

If a block has `emulated_ranks`, `up(down(norm(x)))` is added to the stream after its attention or at its end, as in
`slicer.model.blockwise`. Everything else is vLLM's code.
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
    def __init__(self, width: int, rank: int, eps: float, prefix: str) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=eps)
        # Not named "up_proj": vLLM fuses all modules of that name with a gate_proj.
        self.down = ReplicatedLinear(width, rank, bias=False, prefix=f"{prefix}.down")
        self.up = ReplicatedLinear(rank, width, bias=True, prefix=f"{prefix}.up")

    def forward(self, states: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # vLLM's layers return the last update and the stream before it; a norm adds the two.
        states, residual = self.norm(states, residual)
        return self.up(self.down(states)[0])[0], residual


class _Layer(DeciLMDecoderLayer):  # type: ignore[misc]
    def __init__(
        self, config: Any, layer_idx: int, cache_config: Any = None, quant_config: Any = None, prefix: str = ""
    ) -> None:
        super().__init__(config, layer_idx, cache_config, quant_config, prefix)
        ranks = config.block_configs[layer_idx].get("emulated_ranks", {})
        width, eps = config.hidden_size, config.rms_norm_eps
        for at in ("mid", "end"):
            name = f"emulated_{at}"
            setattr(self, name, _Emulated(width, ranks[at], eps, f"{prefix}.{name}") if at in ranks else None)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._is_no_op_attention:
            if residual is None:
                residual = hidden_states
                hidden_states = self.input_layernorm(hidden_states)
            else:
                hidden_states, residual = self.input_layernorm(hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.emulated_mid is not None:
            hidden_states, residual = self.emulated_mid(hidden_states, residual)
        if not self._is_no_op_ffn:
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        if self.emulated_end is not None:
            hidden_states, residual = self.emulated_end(hidden_states, residual)
        return hidden_states, residual


@support_torch_compile
class _Model(DeciModel):  # type: ignore[misc]
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_Layer)


class SlicerBlockwiseForCausalLM(DeciLMForCausalLM):  # type: ignore[misc]
    """The class that the config's `architectures` field names."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "") -> nn.Module:
        return _Model(vllm_config=vllm_config, prefix=prefix)
