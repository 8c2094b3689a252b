"""Safetensors checkpoints made by hand, byte by byte: what the reader and the writer are tested on."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def header(entries: Mapping[str, Any], length: int | None = None, pad: int = 8) -> bytes:
    """`length` is what the file claims of its header; the safetensors library pads it to 8 bytes."""
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    encoded += b" " * (-len(encoded) % pad)
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def write_file(file: Path, tensors: Mapping[str, bytes], pad: int = 8) -> None:
    entries: dict[str, Any] = {}
    offset = 0
    for key, data in tensors.items():
        entries[key] = entry(offset, offset + len(data))
        offset += len(data)
    file.write_bytes(header(entries, pad=pad) + b"".join(tensors.values()))


def contents(layers: int = 4, size: int = 5000) -> dict[str, bytes]:
    """Tensors of a llama-like model, every one with bytes of its own."""
    tensors = {"model.embed_tokens.weight": b"e" * 16}
    for i in range(layers):
        for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
            tensors[f"model.layers.{i}.{name}"] = bytes((i * 7 + len(name) + k) % 251 for k in range(size + i))
    return tensors | {"model.norm.weight": b"n" * 8, "lm_head.weight": b"h" * 16}


def write_checkpoint(
    directory: Path, layers: int = 4, shards: int = 1, size: int = 5000, pad: int = 8
) -> dict[str, bytes]:
    """A llama-like directory (config, weights, index) of meaningless bytes; returns its tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "vocab_size": 4,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors = contents(layers, size)
    if shards == 1:
        write_file(directory / "model.safetensors", tensors, pad)
        return tensors
    keys = list(tensors)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    owner = {key: names[at * shards // len(keys)] for at, key in enumerate(keys)}
    for name in names:
        write_file(directory / name, {key: tensors[key] for key in keys if owner[key] == name}, pad)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owner}))
    return tensors


def read_tensors(directory: Path) -> dict[str, bytes]:
    """Every tensor's bytes, as the safetensors library itself reads them."""
    from safetensors import safe_open

    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(key).contiguous()
                import torch

                found[key] = tensor.flatten().view(torch.uint8).numpy().tobytes()
    return found
