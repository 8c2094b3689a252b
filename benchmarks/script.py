"""What the scripts share: command-line options, rounds, the page cache, plain reading, a synthetic checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
VOCABULARY = 32000


def options(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with an option for each default, of its type; False makes a flag. `--worker ARGUMENTS` is for the
    script's own child processes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parse = Path if isinstance(default, Path) else type(default)  # not PosixPath
        kind: dict[str, Any] = {"action": "store_true"} if default is False else {"type": parse}
        shown = "" if default is False else f"[default: {default}]"
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=shown, **kind)
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def in_rounds(work: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each call returns in every round: in a new seeded order each round, after a warm-up that is not counted."""
    found: dict[str, list[T]] = {name: [] for name in work}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}" if number else "warming up", file=sys.stderr)
        for name in random.Random(number).sample(list(work), len(work)):
            result = work[name]()
            if number:
                found[name].append(result)
    return found


def drop_cache(path: Path) -> None:
    """Drop the tensor files of `path` from the page cache, so that they are read from disk."""
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(path: Path, most: int = 10) -> float:
    """MB/s of reading the first `most` layer files in order."""
    drop_cache(path)
    buffer = bytearray(16 << 20)
    total, started = 0, time.perf_counter()
    for file in sorted(path.glob("layer-*.safetensors"))[:most]:
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started) / 1e6


def write_llama(path: Path, shard_size: str | None = None, **shape: int) -> None:
    """Write a Llama with random bfloat16 weights: in shards of `shard_size`, or one file for each layer. `shape` are
    the fields of its config.json that differ from those of Llama-2-7B."""
    import torch
    import transformers
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16", "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    } | shape  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(torch.bfloat16)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if shard_size is not None:
        pattern = "model{suffix}.safetensors"
        split = split_torch_state_dict_into_shards(
            model.state_dict(), filename_pattern=pattern, max_shard_size=shard_size
        )
        files = split.filename_to_tensors
    else:
        files = {}
        for key in shapes:
            layer = re.search(r"layers\.(\d+)\.", key)
            name = f"layer-{int(layer[1]):03d}.safetensors" if layer else "outside.safetensors"
            files.setdefault(name, []).append(key)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(max(s.numel() for s in shapes.values()), dtype=torch.bfloat16)
    noise.normal_(std=0.02, generator=generator)
    for number, (name, keys) in enumerate(files.items()):
        print(f"\rwriting {name}", end="", file=sys.stderr)
        tensors = {
            key: noise[: s.numel()].roll(977 * at + number).view(s)
            if len(s := shapes[key]) > 1
            else torch.ones_like(noise[: s[0]])
            for at, key in enumerate(keys)
        }
        save_file(tensors, path / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(2 * s.numel() for s in shapes.values())},
             "weight_map": {key: name for name, keys in files.items() for key in keys}}  # fmt: skip
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()
    print(file=sys.stderr)
