"""Saves and loads the adapter of a model that FSDP (version 1) has wrapped.

FSDP adds the names of its wrappers to module names but not to the state dict. peft 0.21 finds adapter weights by module
name, so it would save an empty file and load nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
_ADAPTER = "default"  # peft's default adapter name


def wraps_adapter(model: Any) -> bool:
    """Whether `model` is a peft model wrapped by FSDP."""
    from peft import PeftModel
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(model, FullyShardedDataParallel) and isinstance(model.module, PeftModel)


def save_adapter(model: Any, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the adapter of a wrapped `model` as peft does; `state`: the gathered state dict of the whole model."""
    path.mkdir(parents=True, exist_ok=True)
    mark = f".{_ADAPTER}."
    weights = {key.replace(mark, "."): tensor.contiguous() for key, tensor in state.items() if mark in key}
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})
    model.module.peft_config[_ADAPTER].save_pretrained(str(path))


def load_adapter(model: Any, path: Path) -> None:
    """Load an adapter written by `save_adapter` into a wrapped `model`; every process reads the file."""
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    state = {}
    for key, tensor in load_file(path / WEIGHTS).items():
        name, _, kind = key.rpartition(".")
        state[f"{name}.{_ADAPTER}.{kind}"] = tensor
    everywhere = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, everywhere):
        found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
