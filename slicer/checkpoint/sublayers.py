"""Attention and feed-forward tensors on disk: which sublayer a tensor belongs to, and the tensors that a plan keeps.

A tensor's sublayer follows from the first name of its key within the layer ("self_attn", "mlp", "ln_2"); these names
mean the same in all architectures of the table. Refuses layers with unknown names or with parallel attention and
feed-forward. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial

from slicer.checkpoint import tensors
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
# Config fields for attention and feed-forward sublayers that read the same input (parallel).
_PARALLEL = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")


def part_of(name: str, siblings: Collection[str]) -> str | None:
    """ATTENTION or FEED_FORWARD for the first name of a key within its layer; None if unknown.

    `siblings`: all such names of the layer. `post_attention_layernorm` belongs to the feed-forward (Llama), unless the
    feed-forward has another norm (Gemma 2) or the attention has no norm before it (OLMo 2).
    """
    if name == "post_attention_layernorm":
        norms = {"pre_feedforward_layernorm", "post_feedforward_layernorm", "input_layernorm"}.intersection(siblings)
        behind = "pre_feedforward_layernorm" in norms or norms == {"post_feedforward_layernorm"}
        return ATTENTION if behind else FEED_FORWARD
    if name in _ATTENTION:
        return ATTENTION
    return FEED_FORWARD if name in _FEED_FORWARD or name in _FEED_FORWARD_NORMS else None


def split(layer: Mapping[str, TensorSpan]) -> dict[str, dict[str, TensorSpan]]:
    """The tensors of a layer by sublayer. Raises ArchitectureError for a tensor that belongs to neither."""
    siblings = {name.partition(".")[0] for name in layer}
    found: dict[str, dict[str, TensorSpan]] = {ATTENTION: {}, FEED_FORWARD: {}}
    for name, span in layer.items():
        found[_part(name, siblings)][name] = span
    return found


def _part(name: str, siblings: Collection[str]) -> str:
    part = part_of(name.partition(".")[0], siblings)
    if part is None:
        raise ArchitectureError(
            f"tensor {name} of a layer belongs to neither attention nor feed-forward; drop whole layers of this "
            "model (--drop, --offset whole)"
        )
    return part


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
    neox = config.get("model_type") == "gpt_neox"  # parallel unless its config denies it
    reason = None
    if any(config.get(name, neox and name == "use_parallel_residual") for name in _PARALLEL):
        reason = "its attention and feed-forward sublayer run in parallel"
    for i, layer in enumerate(checkpoint.layers):
        parts = split(layer)
        if not parts[ATTENTION] or not parts[FEED_FORWARD]:
            reason = reason or f"layer {i} does not have both attention and feed-forward sublayer"
        names = {name.partition(".")[0] for name in parts[FEED_FORWARD]}
        if not names & (_FEED_FORWARD_NORMS | {"post_attention_layernorm"}):
            reason = reason or "its attention and feed-forward sublayer share a norm and run in parallel"
    if reason:
        raise ArchitectureError(
            f"{config.get('model_type')}: no half-offset cut is possible: {reason}; use --offset whole"
        )


def check_joined(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise ArchitectureError unless feed-forward sublayers that swap places are of the same kind."""
    if not plan.joined:
        return
    check_joinable(checkpoint)
    for i, j in plan.joined:
        parts = [split(checkpoint.layers[k])[FEED_FORWARD] for k in (i, j)]
        one, other = ({(name, span.shape) for name, span in part.items()} for part in parts)
        if one != other:
            name = min(one ^ other)[0]
            raise ArchitectureError(
                f"the feed-forward sublayer of layer {j} cannot replace that of layer {i}: they are of different "
                f"kinds ({name}); choose another cut, or --offset whole"
            )


def tensors_of(checkpoint: Checkpoint, plan: Plan) -> dict[str, TensorSpan]:
    """New key -> source tensor, in byte order, for everything that `plan` keeps.

    The zeroed form drops only whole layers, and sets the output matrices of other removed sublayers to zero.
    """
    zeroed = set(zeroed_keys(checkpoint, plan)) if plan.form == "zeroed" else set()
    found = {}
    for key, new in names_of(checkpoint, plan).items():
        span = checkpoint.tensors[key]
        found[new] = span.made(key, partial(tensors.zeros, span)) if key in zeroed else span
    return found


def names_of(checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """Raw key of the source -> its key in what `plan` leaves, of those that stay."""
    zeroed = plan.form == "zeroed"
    homes = {
        ATTENTION: {i: at for at, (i, _) in enumerate(plan.sublayers) if zeroed or i not in plan.no_attention},
        FEED_FORWARD: {j: at for at, (_, j) in enumerate(plan.sublayers) if zeroed or j not in plan.no_ffn},
    }
    siblings = [{name.partition(".")[0] for name in layer} for layer in checkpoint.layers]
    prefix, found = checkpoint.layer_prefix, {}
    for key in checkpoint.tensors:
        new = architectures.slice_key(key, prefix, plan.kept, plan.depth)
        match = re.match(re.escape(prefix) + r"(\d+)\.(.*)", key)
        if plan.below_layers and match and int(match[1]) < checkpoint.depth:
            i, name = int(match[1]), match[2]
            whole = zeroed and not plan.joined  # both sublayers have the same place
            at = homes[ATTENTION if whole else _part(name, siblings[i])].get(i)
            new = None if at is None else f"{prefix}{at}.{name}"
        if new is not None:
            found[key] = new
    return found


def _outputs(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[int, str, list[str]]]:
    """(layer, sublayer in words, its output matrices by name within the layer) of what `plan` removes below layers."""
    for i in plan.no_attention:
        yield i, "attention", [n for n in checkpoint.layers[i] if n.rpartition(".")[0] in ATTENTION_OUTPUTS]
    experts = re.compile("|".join(rf"(^|\.){pattern}$" for pattern, _ in EXPERT_OUTPUTS))
    for i in plan.no_ffn:
        names = [n for n in checkpoint.layers[i] if n.rpartition(".")[0] in FEED_FORWARD_OUTPUTS or experts.search(n)]
        yield i, "feed-forward", names


def zeroed_keys(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Raw keys of the output matrices of removed sublayers. Raises ArchitectureError if a sublayer has none."""
    found: list[str] = []
    for i, what, names in _outputs(checkpoint, plan):
        if not names:
            raise ArchitectureError(f"layer {i}: its {what} has no known output matrix to set to zero; keep it")
        found += [f"{checkpoint.layer_prefix}{i}.{name}" for name in names]
    return found


def check_there(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise PlanError if `plan` removes a sublayer that the source already lacks."""
    for i, what, names in _outputs(checkpoint, plan):
        if not names:
            raise PlanError(f"layer {i} of {checkpoint.path} has no {what} to drop; choose another layer")
