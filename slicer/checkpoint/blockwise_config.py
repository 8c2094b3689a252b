"""The configuration of the blockwise form: a Llama-like model whose layers may lack attention or feed-forward part.

`block_configs` has one entry per layer, as vLLM's DeciLMForCausalLM reads it (by attribute) and as JSON:

    {"attention": {"no_op": false, "n_heads_in_group": 7}, "ffn": {"no_op": false, "intermediate_size": 4864}}

A block may also have `"emulated_ranks": {"mid": r, "end": r}`: the ranks of low-rank replacements of removed sublayers,
after its attention and after its feed-forward part.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

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
            raise ValueError(
                f"block_configs has {len(self.block_configs)} entries for {self.num_hidden_layers} layers"
            )
        for i, block in enumerate(self.block_configs):
            if not block.attention.no_op and block.attention.n_heads_in_group != group:
                raise ValueError(
                    f"block_configs[{i}]: n_heads_in_group is {block.attention.n_heads_in_group}, not {group}"
                )
