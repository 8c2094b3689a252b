"""All weights trained (`--method full`): under which keys of the checkpoint each of them is written.

transformers saves a model under names of its own: with or without an outermost prefix, one name for matrices that are
tied, no old buffers. Where all of it goes is settled on the meta device, before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slicer.checkpoint import architectures, verify
from slicer.checkpoint import tensors as stored
from slicer.checkpoint.merge import Probe
from slicer.checkpoint.model import build_on_meta, load_model, meta_tensors
from slicer.checkpoint.names import Names
from slicer.checkpoint.reader import Checkpoint, TensorSpan
from slicer.errors import HealError

Homes = Mapping[str, tuple[str, ...]]


def homes_of(base: Checkpoint, *, trust_remote_code: bool = False) -> dict[str, tuple[str, ...]]:
    """Name of a tensor, as transformers saves the trained model -> the raw keys of `base` that it belongs under.

    Those are its own, if it is there, and then the keys of the matrices that it is tied to. A buffer that `base` does
    not store belongs nowhere; stored keys that the model has no place for are nobody's, and are left as they are.
    Raises HealError for a parameter that `base` holds under no such key, or in another shape.
    """
    model = build_on_meta(base.path, meta_tensors(base), trust_remote_code=trust_remote_code)[0]
    names = Names(base)
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
        shape = next(
            (base.tensors[key].shape for key in keys if base.tensors[key].shape != tensor.shape), None
        )
        if shape is not None or not (keys or name in buffers):
            held = "does not hold it" if shape is None else f"holds it as {list(shape)}"
            raise HealError(
                f"{name}: transformers saves it as {list(tensor.shape)}, and {base.path} {held}; use --method lora"
            )
        homes[name] = tuple(keys)
    return homes


def _as_saved(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the loaded model as `save_pretrained` has them, such as each expert apart."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def spans_of(base: Checkpoint, trained: Checkpoint, homes: Homes) -> dict[str, TensorSpan]:
    """Raw key of `base` -> the trained tensor, in the dtype of the old one. Raises HealError where one is missing."""
    names = Names(base)
    found: dict[str, TensorSpan] = {}
    for name, span in trained.tensors.items():
        own = names.key(name)
        for key in homes.get(name, ()):
            if key == own or key not in found:  # tied matrices that differ were trained apart
                found[key] = _rounded(base.tensors[key], span)
    lost = sorted({key for keys in homes.values() for key in keys} - found.keys())
    if lost or not trained.tensors.keys() <= homes.keys():
        name = lost[0] if lost else min(trained.tensors.keys() - homes.keys())
        raise HealError(f"{name}: transformers saved this model otherwise than it loads; use --method lora")
    return found


def _rounded(old: TensorSpan, new: TensorSpan) -> TensorSpan:
    return old.made("trained", lambda: stored.read(new).to(stored.torch_dtype(old.dtype)))


def probe_of(
    base: Checkpoint,
    trained: Checkpoint,
    homes: Homes,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Probe:
    """The logits of the trained weights, and of each of them rounded to the dtype that `base` stores it in."""
    model = load_model(trained.path, dtype="float32", device=device, trust_remote_code=trust_remote_code)
    vocabulary = architectures.text_config(base.config).get("vocab_size") or model.config.vocab_size
    tokens = verify.probe_tokens(vocabulary)
    exact = verify.logits_of(model, tokens)
    for name, parameter in model.named_parameters():
        saved = _as_saved(model, {name: torch.empty_like(parameter, device="meta")})
        dtypes = {
            stored.torch_dtype(base.tensors[key].dtype) for part in saved for key in homes.get(part, ())[:1]
        }
        if dtypes:  # parts of one tensor are of one dtype in every checkpoint there is
            parameter.data = parameter.data.to(min(dtypes, key=lambda dtype: dtype.itemsize)).float()
    return Probe(tokens, exact, verify.logits_of(model, tokens))
