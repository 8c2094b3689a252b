"""Small whole checkpoints, tokenizer and all, from the real classes: what the commands are tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light. "
)


def save_tokenizer(path: Path) -> None:
    """A byte-level tokenizer of 258 tokens that begins a text with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(path)


def save_llama(path: Path, *, layers: int = 6, shard: str = "100KB", tokenizer: bool = True, **changes: Any) -> Path:
    """A random Llama of head size 32 with a byte tokenizer, in several shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {
        "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2, "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))
    model.save_pretrained(path, max_shard_size=shard)
    if tokenizer:
        save_tokenizer(path)
    (path / "LICENSE").write_text("free")
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Original\n")
    (path / "modeling_extra.py").write_text("# remote code\n")
    return path


def save_text(path: Path, documents: int = 40) -> Path:
    """Calibration text in the form that the suffix of `path` names."""
    texts = [f"{i}. {TEXT * (1 + i % 3)}" for i in range(documents)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_text("\n\n".join(texts))
    return path
