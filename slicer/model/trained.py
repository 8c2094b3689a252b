"""Weights trained in full (`--method full`), as transformers saves them, mapped to the keys of the checkpoint.

transformers saves a model under its own names: with or without an outermost prefix, tied matrices once, and without old
buffers. The mapping is computed on the meta device, before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slicer.checkpoint import tensors
from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.keys import KeyMap
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import HealError
from slicer.model import layers, verify
from slicer.model.load import build_on_meta, load_model
from slicer.model.verify import Expected
from slicer.runtime.compute import Compute
from slicer.runtime.memory import released

Homes = Mapping[str, tuple[str, ...]]


def homes_of(base: Checkpoint, *, trust_remote_code: bool = False) -> dict[str, tuple[str, ...]]:
    """Tensor name, as transformers saves the trained model -> raw keys of `base` to write it to.

    The keys are its own, if it exists, then those of matrices tied to it. A buffer that `base` does not store has no
    keys; stored keys that the model does not load stay unchanged. Raises HealError for a parameter that `base` lacks or
    has in another shape.
    """
    model = build_on_meta(base, trust_remote_code=trust_remote_code)[0]
    names = KeyMap(base)
    state = dict(model.state_dict())
    buffers = set(_as_saved(model, {name: t for name, t in model.named_buffers() if name in state}))
    partners: dict[str, set[str]] = {}
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        group = {name for tied in pair for name in _as_saved(model, {tied: state[tied]})}
        group |= {other for name in group for other in partners.get(name, ())}
        partners.update(dict.fromkeys(group, group))
    homes = {}
    for name, tensor in _as_saved(model, state).items():
        called = [name, *sorted(partners.get(name, set()) - {name})]
        keys = [key for key in map(names.key, called) if key is not None]
        shape = next((base.tensors[key].shape for key in keys if base.tensors[key].shape != tensor.shape), None)
        if shape is not None or not (keys or name in buffers):
            held = "does not hold it" if shape is None else f"holds it as {list(shape)}"
            raise HealError(
                f"{name}: transformers saves it as {list(tensor.shape)}, and {base.path} {held}; use --method lora"
            )
        homes[name] = tuple(keys)
    return homes


def _as_saved(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the loaded model as `save_pretrained` writes them, for example each expert separately."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def spans_of(base: Checkpoint, trained: Checkpoint, homes: Homes) -> dict[str, TensorSpan]:
    """Raw key of `base` -> trained tensor, in the stored dtype. Raises HealError if one is missing."""
    names = KeyMap(base)
    found: dict[str, TensorSpan] = {}
    for name, span in trained.tensors.items():
        own = names.key(name)
        for key in homes.get(name, ()):
            if key == own or key not in found:  # tied matrices that differ were trained separately
                found[key] = _rounded(base.tensors[key], span)
    lost = sorted({key for keys in homes.values() for key in keys} - found.keys())
    if lost or not trained.tensors.keys() <= homes.keys():
        name = lost[0] if lost else min(trained.tensors.keys() - homes.keys())
        raise HealError(f"{name}: transformers saves this model under other names than it loads; use --method lora")
    return found


def _rounded(old: TensorSpan, new: TensorSpan) -> TensorSpan:
    return old.made("trained", lambda: tensors.read(new).to(tensors.torch_dtype(old.dtype)))


@released()
def trained_logits(base: Checkpoint, trained: Checkpoint, homes: Homes, compute: Compute) -> Expected:
    """Logits of the trained weights, exact and rounded to the dtypes that `base` stores them in, in float32."""
    model = load_model(trained.path, compute, dtype="float32")
    vocabulary = architectures.text_config(base.config).get("vocab_size") or model.config.vocab_size
    tokens = verify.probe_tokens(vocabulary)
    exact = layers.logits_of(model, tokens)
    for name, parameter in model.named_parameters():
        saved = _as_saved(model, {name: torch.empty_like(parameter, device="meta")})
        dtypes = {tensors.torch_dtype(base.tensors[key].dtype) for part in saved for key in homes.get(part, ())[:1]}
        if dtypes:  # the parts of one tensor have the same dtype in all known checkpoints
            parameter.data = parameter.data.to(min(dtypes, key=lambda dtype: dtype.itemsize)).float()
    return Expected(tokens, layers.logits_of(model, tokens), exact)
