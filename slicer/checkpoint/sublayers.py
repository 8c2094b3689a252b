"""Attention and feed-forward tensors on disk: which sublayer a tensor belongs to, and the tensors that a plan keeps.

A tensor's sublayer follows from the first name of its key within the layer ("self_attn", "mlp", "ln_2"); these names
mean the same in all architectures of the table. Refuses layers with unknown names or with parallel attention and
feed-forward. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.architectures.table import ATTENTION_OUTPUTS, EXPERT_OUTPUTS, FEED_FORWARD_OUTPUTS
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import ArchitectureError, PlanError
from slicer.plan.plan import Plan

ATTENTION, FEED_FORWARD = "attention", "feed-forward"
_ATTENTION = {
    *("self_attn", "attn", "attention", "self_attention", "linear_attn", "conv", "mamba", "temporal_block"),
    *("emulated_mid",),
    *("input_layernorm", "ln_1", "self_attn_layer_norm", "norm_1", "operator_norm", "attention_layernorm"),
    *("post_self_attn_layernorm", "temporal_pre_norm", "ln_attn"),
}
_FEED_FORWARD_NORMS = {
    *("pre_feedforward_layernorm", "post_feedforward_layernorm", "ln_2", "final_layer_norm", "norm_2"),
    *("ffn_norm", "pre_ff_layernorm", "post_mlp_layernorm", "feedforward_layernorm", "channel_pre_norm"),
    *("ln_mlp",),
}
_FEED_FORWARD = {*architectures.FEED_FORWARDS, "fc1", "emulated_end"}
# Config fields for attention and feed-forward parts that read the same input (parallel); the first one, GPT-NeoX's,
# is true if absent.
_PARALLEL = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")


def part_of(name: str, siblings: Collection[str]) -> str | None:
    """ATTENTION or FEED_FORWARD for the first name of a key within its layer; None if unknown.

    `siblings`: all such names of the layer. `post_attention_layernorm` belongs to the feed-forward part (Llama), unless
    that has a norm of its own (Gemma 2) or the attention has no norm before it (OLMo 2).
    """
    if name == "post_attention_layernorm":
        behind = "pre_feedforward_layernorm" in siblings or (
            "input_layernorm" not in siblings and "post_feedforward_layernorm" in siblings
        )
        return ATTENTION if behind else FEED_FORWARD
    if name in _ATTENTION:
        return ATTENTION
    return FEED_FORWARD if name in _FEED_FORWARD or name in _FEED_FORWARD_NORMS else None


def split(layer: Mapping[str, TensorSpan]) -> dict[str, dict[str, TensorSpan]]:
    """The tensors of a layer by sublayer. Raises ArchitectureError for a tensor that belongs to neither."""
    siblings = {name.partition(".")[0] for name in layer}
    found: dict[str, dict[str, TensorSpan]] = {ATTENTION: {}, FEED_FORWARD: {}}
    for name, span in layer.items():
        part = part_of(name.partition(".")[0], siblings)
        if part is None:
            raise ArchitectureError(
                f"tensor {name} of a layer belongs to neither attention nor feed-forward part; drop whole layers of "
                "this model (--drop, --offset whole)"
            )
        found[part][name] = span
    return found


def adds_directly(checkpoint: Checkpoint) -> bool:
    """Whether each sublayer adds the output of one matrix to the stream unchanged: no norm after it, no experts.

    Then a fold works for a half-offset cut as it does for whole layers.
    """
    names = {name for layer in checkpoint.layers for name in layer}
    behind = {"post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm"}
    return not any(name.partition(".")[0] in behind or "expert" in name for name in names)


def check_joinable(checkpoint: Checkpoint) -> None:
    """Raise ArchitectureError unless feed-forward follows attention: only then can halves of two layers be joined."""
    config = architectures.text_config(checkpoint.config)
    reason = None
    neox = config.get("model_type") == "gpt_neox"
    if any(config.get(name, neox and name == _PARALLEL[0]) for name in _PARALLEL):
        reason = "its attention and feed-forward part run in parallel"
    for i, layer in enumerate(checkpoint.layers):
        parts = split(layer)
        if not parts[ATTENTION] or not parts[FEED_FORWARD]:
            reason = reason or f"layer {i} does not have both attention and feed-forward part"
        names = {name.partition(".")[0] for name in parts[FEED_FORWARD]}
        if not names & (_FEED_FORWARD_NORMS | {"post_attention_layernorm"}):
            reason = reason or "its attention and feed-forward part share a norm and run in parallel"
    if reason:
        raise ArchitectureError(
            f"{config.get('model_type')}: no half-offset cut is possible: {reason}; use --offset whole"
        )


def check_joined(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise ArchitectureError unless feed-forward parts that swap places are of the same kind."""
    if not plan.joined:
        return
    check_joinable(checkpoint)
    layers = checkpoint.layers
    for i, j in plan.joined:
        one, other = (split(layers[k])[FEED_FORWARD] for k in (i, j))
        shapes = [{name: span.shape for name, span in part.items()} for part in (one, other)]
        if shapes[0] != shapes[1]:
            name = sorted(shapes[0].items() ^ shapes[1].items())[0][0]
            raise ArchitectureError(
                f"the feed-forward part of layer {j} cannot replace that of layer {i}: they are of different "
                f"kinds ({name}); choose another cut, or --offset whole"
            )


def tensors_of(checkpoint: Checkpoint, plan: Plan) -> dict[str, TensorSpan]:
    """New key -> source tensor, in byte order, for everything that `plan` keeps.

    The zeroed form drops only whole layers, and sets the output matrices of other removed sublayers to zero.
    """
    if not plan.below_layers:
        return checkpoint.sliced(plan.kept)
    zeroed = set(zeroed_keys(checkpoint, plan)) if plan.form == "zeroed" else set()
    found = {}
    for key, new in names_of(checkpoint, plan).items():
        span = checkpoint.tensors[key]
        found[new] = span.made(key, _zeros(span)) if key in zeroed else span
    return found


def names_of(checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """Raw key of the source -> its key in what `plan` leaves, of those that stay."""
    attention = {i: at for at, (i, _) in enumerate(plan.sublayers)}
    ffn = {j: at for at, (_, j) in enumerate(plan.sublayers)}
    if plan.form != "zeroed":
        for i in plan.no_attention:
            del attention[i]
        for j in plan.no_ffn:
            del ffn[j]
    siblings = [{name.partition(".")[0] for name in layer} for layer in checkpoint.layers]
    prefix, found = checkpoint.layer_prefix, {}
    for key, span in checkpoint.tensors.items():
        new = architectures.slice_key(key, prefix, plan.kept, plan.depth)
        match = re.match(re.escape(prefix) + r"(\d+)\.(.*)", key)
        if plan.below_layers and match and int(match[1]) < checkpoint.depth:
            i, name = int(match[1]), match[2]
            part = part_of(name.partition(".")[0], siblings[i])
            if part is None and not (plan.form == "zeroed" and not plan.joined):
                split({name: span})  # raises the reason
            at = (ffn if part == FEED_FORWARD else attention).get(i)
            new = None if at is None else f"{prefix}{at}.{name}"
        if new is not None:
            found[key] = new
    return found


def new_keys(checkpoint: Checkpoint, plan: Plan, keys: Iterable[str]) -> dict[str, str]:
    """Raw key of the source -> its key in what `plan` leaves, of those among `keys` that stay."""
    names = names_of(checkpoint, plan)
    return {key: names[key] for key in keys if key in names}


def _zeros(span: TensorSpan) -> Callable[[], Any]:
    def make() -> Any:
        import torch

        from slicer.checkpoint.tensors import torch_dtype

        return torch.zeros(span.shape, dtype=torch_dtype(span.dtype))

    return make


def zeroed_keys(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Raw keys of the output matrices of removed sublayers. Raises ArchitectureError if a sublayer has none."""
    found: list[str] = []
    layers = checkpoint.layers
    for gone, outputs, what in (
        (plan.no_attention, ATTENTION_OUTPUTS, "attention"),
        (plan.no_ffn, FEED_FORWARD_OUTPUTS, "feed-forward part"),
    ):
        for i in gone:
            names = [name for name in layers[i] if name.rpartition(".")[0] in outputs]
            if gone is plan.no_ffn:
                experts = [p for p, _ in EXPERT_OUTPUTS]
                names += [n for n in layers[i] if any(re.search(rf"(^|\.){p}$", n) for p in experts)]
            if not names:
                raise ArchitectureError(f"layer {i}: its {what} has no known output matrix to set to zero; keep it")
            found += [f"{checkpoint.layer_prefix}{i}.{name}" for name in dict.fromkeys(names)]
    return found


def check_there(checkpoint: Checkpoint, attention: Iterable[int], ffn: Iterable[int]) -> None:
    """Raise PlanError for a sublayer that the source already lacks."""
    layers = checkpoint.layers
    for what, gone, outputs in (
        ("attention", attention, ATTENTION_OUTPUTS),
        ("feed-forward part", ffn, (*FEED_FORWARD_OUTPUTS,)),
    ):
        for i in gone:
            names = {name.rpartition(".")[0] for name in layers[i]}
            experts = what != "attention" and any("expert" in name for name in names)
            if not names.intersection(outputs) and not experts:
                raise PlanError(f"layer {i} of {checkpoint.path} has no {what} to drop; choose another layer")
