"""The model to train: stored or NF4 weights with LoRA on the feed-forward modules; and a workaround for CPUs.

On processors with AVX512-BF16, bitsandbytes repacks 4-bit weights in the first forward pass outside training. Later
passes bypass autograd, so gradients are missing or wrong without an error. `unpack` turns this off; training also
checks for packed weights and missing gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from transformers.pytorch_utils import Conv1D

from slicer.checkpoint.adapter import WEIGHTS
from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.keys import KeyMap
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError
from slicer.heal.finetune.settings import TrainingSettings
from slicer.model.layers import decoder_layers, is_conv1d
from slicer.model.load import Model, load_model
from slicer.model.sublayers import mlp_of
from slicer.model.trained import homes_of
from slicer.runtime.compat import named_as_loaded, quiet_bitsandbytes
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import sharded

# Feed-forward modules that route tokens and compute no features: the paper does not train them.
_ROUTERS = {"gate", "router", "shared_expert_gate"}


def require(method: str) -> None:
    """Raise HealError if a library for `method` is not installed."""
    needed = {"full": ("accelerate",), "lora": ("peft", "accelerate"), "qlora": ("peft", "bitsandbytes", "accelerate")}
    quiet_bitsandbytes()
    missing = [name for name in needed[method] if find_spec(name) is None]
    if missing:
        raise HealError(f"--method {method} needs {' and '.join(missing)}: pip install 'slicer-llm[heal]'")


def nf4(dtype: str) -> Any:
    """transformers' quantization config of NF4 with double quantization, with arithmetic in `dtype` (a torch name)."""
    from transformers import BitsAndBytesConfig

    values = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": getattr(torch, dtype)}
    if sharded():  # FSDP shards the stored tensors, and needs all of them in one dtype
        values["quant_storage"] = values["compute_dtype"]
    return BitsAndBytesConfig(load_in_4bit=True, **{f"bnb_4bit_{name}": value for name, value in values.items()})


def load(base: Checkpoint, settings: TrainingSettings, compute: Compute) -> Model:
    """`base` as a model to train: with adapters that start at zero, or all weights (`full`).

    Full training uses float32 weights; adapters are float32 on weights in the precision of the arithmetic. Raises
    HealError if no feed-forward matrix can have an adapter, or if some weights could not be written afterwards;
    torch.OutOfMemoryError if the model does not fit on all GPUs together.
    """
    asked, method = settings.asked, settings.asked.method
    if method == "full":
        homes_of(base, trust_remote_code=compute.trust_remote_code)
    place = replace(compute.pinned(), dtype="float32" if method == "full" else settings.compute)
    quantization = nf4(settings.compute) if method == "qlora" else None
    model = load_model(base.path, place, quantization=quantization, sharded=sharded())
    # accelerate leaves weights that fit on no GPU elsewhere, and they cannot be trained there.
    if not sharded() and any(weight.is_meta for weight in model.parameters()):
        raise torch.OutOfMemoryError("the GPUs are too small for the model")
    model.config.use_cache = False
    if asked.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method == "full":
        return model.requires_grad_(True)
    import peft

    names = targets(model, base)
    values = {"r": settings.lora_r, "lora_alpha": settings.lora_alpha, "lora_dropout": asked.lora_dropout}
    transposed = any(is_conv1d(model.get_submodule(name)) for name in names)
    config = peft.LoraConfig(target_modules=names, fan_in_fan_out=transposed, task_type="CAUSAL_LM", **values)
    torch.manual_seed(asked.seed)  # A is random, B is zero
    unpack(model)
    with named_as_loaded():
        return peft.get_peft_model(model, config, autocast_adapter_dtype=not sharded())


def targets(model: Model, checkpoint: Checkpoint) -> list[str]:
    """Names of the matrices that get an adapter: the linear ones of every layer's feed-forward sublayer.

    Found by structure with `slicer.model.sublayers.mlp_of`: gate, up and down projections of Llama and similar models,
    fc1 and fc2 of Phi and OPT, w1, w2 and c_proj of Qwen. Skips routers, and experts that are slices of one tensor
    (LoRA of a linear layer cannot adapt them; shared experts work). A layer without such matrices gets adapters on its
    attention. All must be in the checkpoint under their own names and shapes; raises HealError if none is.
    """
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    known, found = KeyMap(checkpoint), []
    for i, layer in enumerate(layers):
        linear = [name for name, module in layer.named_modules() if _linear(module)]
        linear = [name for name in linear if not _ROUTERS & set(name.split(".")) and not _read_past(layer, name)]
        for name in _feed_forward(layer, linear) or linear:
            full = f"{prefix}.{i}.{name}"
            key = known.key(f"{full}.weight")
            if key is not None and checkpoint.tensors[key].shape == _shape(layer.get_submodule(name)):
                found.append(full)
    if not found:
        raise HealError(
            f"{checkpoint.path}: no matrix of its layers can have an adapter ({checkpoint.config.get('model_type')}); "
            "use --method full or fold"
        )
    return found


def _feed_forward(layer: nn.Module, names: list[str]) -> list[str]:
    """Those of the modules `names` of the layer that are in its feed-forward sublayer."""
    part = mlp_of(layer)
    if part is not None and _linear(part):  # fc1 and fc2 are direct children of the layer
        return [name for name in names if "." not in name]
    own = next((name for name, child in layer.named_children() if child is part), None)
    return [name for name in names if name.startswith(f"{own}.")]


def _read_past(layer: nn.Module, name: str) -> bool:
    """Whether it is a Mamba module whose matrix is read by a kernel without calling the module."""
    parent, _, own = name.rpartition(".")
    return own in ("out_proj", "dt_proj") and "Mamba" in type(layer.get_submodule(parent)).__name__


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _shape(module: Any) -> tuple[int, int]:
    """The shape of its matrix on disk."""
    if is_conv1d(module):
        return int(module.nx), int(module.nf)
    shape = int(module.out_features), int(module.in_features)
    return shape[::-1] if getattr(module, "source_cls", None) is Conv1D else shape  # the class that NF4 replaced


def unpack(model: nn.Module) -> None:
    """Prevent bitsandbytes from packing 4-bit weights on the CPU, and unpack those already packed."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    if packed(model):
        model.state_dict()  # this unpacks the weights


def packed(model: nn.Module) -> bool:
    """Whether some 4-bit weights are packed, so that autograd bypasses them."""
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def most_tokens(config: dict[str, Any]) -> int | None:
    """The maximum sequence length in the config, if any."""
    text = architectures.text_config(config)
    limit = text.get("max_position_embeddings") or text.get("n_positions")
    return limit if isinstance(limit, int) else None


_ADAPTER = "default"  # peft's default adapter name


def wraps_adapter(model: Model) -> bool:
    """Whether `model` is a peft model wrapped by FSDP."""
    from peft import PeftModel

    return isinstance(model, FullyShardedDataParallel) and isinstance(model.module, PeftModel)


def save_adapter(model: Model, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the adapter of a wrapped `model` as peft does; `state`: the gathered state dict of the whole model."""
    path.mkdir(parents=True, exist_ok=True)
    mark = f".{_ADAPTER}."
    weights = {key.replace(mark, "."): tensor.contiguous() for key, tensor in state.items() if mark in key}
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})
    model.module.peft_config[_ADAPTER].save_pretrained(str(path))


def load_adapter(model: Model, path: Path) -> None:
    """Load an adapter written by `save_adapter` into a wrapped `model`; every process reads the file."""
    parted = ((key.rpartition("."), tensor) for key, tensor in load_file(path / WEIGHTS).items())
    state = {f"{name}.{_ADAPTER}.{kind}": tensor for (name, _, kind), tensor in parted}
    everywhere = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, everywhere):
        found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
