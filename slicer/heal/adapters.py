"""The model to be trained: the weights as stored or in NF4, LoRA on its feed-forward modules, and the CPU's trap.

The trap: where the processor has AVX512-BF16, bitsandbytes packs 4-bit weights anew in the first forward pass outside
training. Later passes through them bypass autograd: gradients are missing, or wrong, without a word. `unpack` turns
that off; training looks for packed weights and for gradients that are not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicer.checkpoint import architectures
from slicer.checkpoint.adapter import is_conv1d
from slicer.checkpoint.model import decoder_layers, load_model, mlp_of
from slicer.checkpoint.names import Names
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError
from slicer.heal.full import homes_of
from slicer.heal.settings import Settings
from slicer.runtime.compat import named_as_loaded, quiet_bitsandbytes
from slicer.runtime.distributed import sharded

# Parts of a feed-forward block that choose rather than compute: the paper trains none of them.
_CHOOSING = {"gate", "router", "shared_expert_gate"}


def require(method: str) -> None:
    """Raise HealError where a library that `method` needs is not installed."""
    needed = {
        "full": ("accelerate",),
        "lora": ("peft", "accelerate"),
        "qlora": ("peft", "bitsandbytes", "accelerate"),
    }
    quiet_bitsandbytes()
    missing = [name for name in needed[method] if find_spec(name) is None]
    if missing:
        raise HealError(f"--method {method} needs {' and '.join(missing)}: pip install 'slicer-llm[heal]'")


def nf4(compute: torch.dtype) -> Any:
    """transformers' config of NF4 with double quantization, the arithmetic in `compute`."""
    from transformers import BitsAndBytesConfig

    # FSDP shards what it stores, and takes tensors of one dtype only.
    storage = {"bnb_4bit_quant_storage": compute} if sharded() else {}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        **storage,
    )


def load(path: Path, settings: Settings, *, device: str = "auto", trust_remote_code: bool = False) -> Any:
    """The checkpoint at `path` as a model to train: with adapters that start at nothing, or all weights (`full`).

    All weights are trained in float32; adapters are in float32 on weights in the precision of the arithmetic. Raises
    HealError where no feed-forward matrix can take an adapter, or not all weights could be written afterwards.
    """
    if settings.method == "full":
        homes_of(Checkpoint.open(path), trust_remote_code=trust_remote_code)
    compute = getattr(torch, settings.compute)
    model = load_model(
        path,
        dtype="float32" if settings.method == "full" else settings.compute,
        device=device,
        trust_remote_code=trust_remote_code,
        quantization=nf4(compute) if settings.method == "qlora" else None,
        sharded=sharded(),
    )
    model.config.use_cache = False
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.method == "full":
        model.requires_grad_(True)
        return model
    import peft

    names = targets(model, Checkpoint.open(path))
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
        fan_in_fan_out=any(is_conv1d(model.get_submodule(name)) for name in names),
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)  # A is drawn at random, B is zero
    unpack(model)
    with named_as_loaded():
        return peft.get_peft_model(model, config, autocast_adapter_dtype=not sharded())


def targets(model: Any, checkpoint: Checkpoint) -> list[str]:
    """Names of the matrices that get an adapter: the linear ones of every layer's feed-forward part.

    Found by structure, as `slicer.checkpoint.model.mlp_of` finds the part: gate, up and down projections of Llama and
    its kin, fc1 and fc2 of Phi and OPT, w1, w2 and c_proj of Qwen. Routers are left alone; so are experts that are
    slices of one tensor, which LoRA of a linear layer cannot reach (shared experts it can). A layer with no such
    matrix gets adapters on its attention instead. All have to be in the checkpoint under their own names and shapes.
    """
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    known, found = Names(checkpoint), []
    for i, layer in enumerate(layers):
        every = [name for name, module in layer.named_modules() if _linear(module)]
        for name in list(_feed_forward(layer)) or every:
            if _CHOOSING & set(name.split(".")) or _read_past(layer, name):
                continue
            full = f"{prefix}.{i}.{name}"
            key = known.key(f"{full}.weight")
            if key is not None and checkpoint.tensors[key].shape == _shape(layer.get_submodule(name)):
                found.append(full)
    if not found:
        raise HealError(
            f"{checkpoint.path}: no matrix of its layers can take an adapter ({checkpoint.config.get('model_type')}); "
            "use --method full or fold"
        )
    return found


def _feed_forward(layer: nn.Module) -> Iterator[str]:
    part = mlp_of(layer)
    if part is None:
        return
    if _linear(part):  # fc1 and fc2 stand in the layer itself
        yield from (name for name, child in layer.named_children() if _linear(child))
        return
    own = next(name for name, child in layer.named_children() if child is part)
    for name, module in part.named_modules():
        if _linear(module) and not _CHOOSING & set(name.split(".")):
            yield f"{own}.{name}"


def _read_past(layer: nn.Module, name: str) -> bool:
    """Whether the module is one of Mamba's whose matrix its kernels read without calling it."""
    parent, _, own = name.rpartition(".")
    return own in ("out_proj", "dt_proj") and "Mamba" in type(layer.get_submodule(parent)).__name__


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _shape(module: Any) -> tuple[int, int]:
    """Of its matrix on disk."""
    if is_conv1d(module):
        return int(module.nx), int(module.nf)
    shape = int(module.out_features), int(module.in_features)
    before = getattr(module, "source_cls", None)  # of a 4-bit layer: what it took the place of
    return shape[::-1] if before is not None and before.__name__ == "Conv1D" else shape


def unpack(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on the CPU, and undo it where it has happened."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    if packed(model):
        model.state_dict()  # writing the weights out is what unpacks them


def packed(model: nn.Module) -> bool:
    """Whether some 4-bit weights are packed, so that gradients go by them."""
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training moves."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def most_tokens(config: dict[str, Any]) -> int | None:
    """The longest sequence that a model of this config reads, where it says so."""
    text = architectures.text_config(config)
    limit = text.get("max_position_embeddings") or text.get("n_positions")
    return limit if isinstance(limit, int) else None
