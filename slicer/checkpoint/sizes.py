"""Size and cost of a checkpoint from its headers: parameters, bytes, FLOPs per token, KV-cache bytes per token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from slicer.checkpoint import hub
from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.architectures.table import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS
from slicer.checkpoint.export import Contents
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.tensors import TensorSpan
from slicer.plan.plan import Plan


@dataclass(frozen=True)
class Sizes:
    """Size and cost of a checkpoint, or of the result of a plan.

    Attributes:
        parameters, total_bytes: of all stored tensors; layer_bytes: of each decoder layer, in order.
        flops_per_token: 2 x the matrix parameters used per token: without embedding lookups, with only the routed share
            of experts, and without attention over the context (which grows with its length).
        kv_bytes_per_token: bytes of key-value cache per token of full-attention context, in the checkpoint's dtype;
            layers with a sliding window stop growing at its width.
    """

    depth: int
    parameters: int
    total_bytes: int
    layer_bytes: tuple[int, ...]
    flops_per_token: int
    kv_bytes_per_token: int

    def to_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {**asdict(self), "layer_bytes": list(self.layer_bytes)}


def measure_sizes(checkpoint: Checkpoint, kept: Iterable[int] | None = None, cast: str | None = None) -> Sizes:
    """Sizes of `checkpoint`, or of its layers `kept` only, written as dtype `cast`."""
    stay = tuple(range(checkpoint.depth)) if kept is None else tuple(kept)
    if kept is not None:
        checkpoint = replace(checkpoint, tensors=checkpoint.sliced(stay))
    tensors, layers = checkpoint.tensors, checkpoint.layers[: len(stay)]
    config = architectures.text_config(checkpoint.config)
    share = _expert_share(config)
    flops = _head_parameters(tensors)
    for name, span in chain.from_iterable(layer.items() for layer in layers):
        if len(span.shape) >= 2:
            flops += round(span.numel * (share if re.search(r"(^|\.)experts(\.|$)", name) else 1))
    total, *by_layer = (sum(span.cast(cast)[1] for span in part.values()) for part in (tensors, *layers))
    cached = sum(_kv_bytes(layer, config, cast) for layer in layers)
    return Sizes(len(stay), checkpoint.parameters, total, tuple(by_layer), 2 * flops, cached)


def sizes_of(contents: Contents) -> Sizes:
    """Sizes of a checkpoint that is still to be written."""
    tensors = dict(contents.tensors)
    written = Checkpoint(contents.origin, dict(contents.config), tensors, dict(contents.metadata))
    return measure_sizes(written, cast=contents.cast)


def width(config: Mapping[str, Any]) -> int:
    """d, the width of the residual stream, from the fields of a text model's config; 0 if it has none."""
    return int(config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0)


def widest_output(checkpoint: Checkpoint) -> int:
    """f: the most inputs of any map into the residual stream. A sum of experts has one map, of d inputs."""
    d = width(architectures.text_config(checkpoint.config)) or 1
    names = {f"{name}.weight" for name in (*ATTENTION_OUTPUTS, *FEED_FORWARD_OUTPUTS)}
    maps = (span for layer in checkpoint.layers for name, span in layer.items() if name in names)
    return max((span.numel // d for span in maps if len(span.shape) == 2), default=d)


def _expert_share(config: Mapping[str, Any]) -> float:
    """The share of the routed experts that each token uses."""
    total = next((config[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(k)), None)
    active = config.get("num_experts_per_tok") or config.get("moe_topk") or config.get("moe_k")
    return active / total if isinstance(total, int) and isinstance(active, int) and total else 1.0


def _head_parameters(tensors: Mapping[str, TensorSpan]) -> int:
    """Matrix parameters of the output head; a tied head uses the embedding."""
    head, embedding = r"(^|\.)(lm_head|embed_out|output)", r"(embed_tokens|wte|word_embeddings|embed_in|embeddings)"
    for pattern in (rf"{head}\.weight$", rf"{embedding}\.weight$"):
        for key, span in tensors.items():
            if re.search(pattern, key) and len(span.shape) == 2:
                return span.numel
    return 0


def _kv_bytes(layer: Mapping[str, TensorSpan], config: Mapping[str, Any], cast: str | None) -> int:
    """Bytes of key-value cache per token in this layer."""

    def rows(name: str) -> int:
        span = next((s for k, s in layer.items() if k.endswith(name)), None)
        return 0 if span is None else span.shape[0] * span.cast(cast)[1] // span.numel

    latent = rows("kv_a_proj_with_mqa.weight")  # multi-head latent attention caches the compressed state
    separate = rows(".k_proj.weight") + rows(".v_proj.weight")
    if latent or separate:
        return latent or separate
    fused = next((s for k, s in layer.items() if re.search(r"(qkv\w*|c_attn|query_key_value|Wqkv)\.weight$", k)), None)
    if fused is None:
        return 0
    hidden = width(config)
    heads = config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads") or 1
    kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1
    head_size = config.get("head_dim") or hidden // heads
    return int(2 * kv_heads * head_size * fused.cast(cast)[1] // fused.numel)


@dataclass(frozen=True)
class Inspection:
    """Architecture and sizes of a checkpoint; `plan` if slicer made it."""

    path: Path
    model_type: str
    classes: tuple[str, ...]
    dtypes: tuple[str, ...]
    files: int
    sizes: Sizes
    plan: Plan | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found = {"path": str(self.path), "model_type": self.model_type, "architectures": list(self.classes)}
        stored = {"dtypes": list(self.dtypes), "files": self.files}
        return {**found, **stored, **self.sizes.to_dict(), "plan": self.plan and self.plan.to_dict()}


def inspect(source: str) -> Inspection:
    """Inspect a directory, a Hub id or "demo". Raises SourceError, HubError or ArchitectureError."""
    checkpoint = Checkpoint.open(hub.resolve(source).path)
    checkpoint.check_layers()
    model_type = str(architectures.text_config(checkpoint.config).get("model_type", "unknown"))
    classes, spans = tuple(checkpoint.config.get("architectures") or ()), checkpoint.tensors.values()
    dtypes, files = tuple(sorted({span.dtype for span in spans})), len({span.file for span in spans})
    sizes, plan = measure_sizes(checkpoint), checkpoint.plan
    return Inspection(checkpoint.path, model_type, classes, dtypes, files, sizes, plan)
