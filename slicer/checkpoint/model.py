"""A checkpoint as a transformers model: load it, find its layers, tap its residual stream, bypass layers.

Uses only hooks, so every class of the table works unchanged: a layer takes its hidden states as the first argument or
by keyword, and returns them alone or first in a tuple.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicer.checkpoint import architectures
from slicer.checkpoint.reader import Checkpoint, TensorSpan, read_config
from slicer.errors import ArchitectureError, SlicerError, SourceError
from slicer.runtime import memory
from slicer.runtime.compute import Compute

Model = Any  # a transformers PreTrainedModel, which has no type hints


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantization: Any = None,
    sharded: bool = False,
) -> Model:
    """Load `path` for inference: eval mode, no gradients.

    `dtype` is "auto" (as stored) or a torch name; `device` as in `Compute`: with "auto" the model is spread over
    several GPUs when one is too small, accelerate is installed and no other process is at work. `quantization` is
    transformers' config of one, applied while loading. A model that is to be `sharded` over processes stays where
    transformers puts it. Raises SourceError with the reason.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = Compute(device).torch_device()
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "local_files_only": True,
    }
    alone = device == "auto" and target == torch.device("cuda")  # not one of several processes
    spread = alone and not sharded and _needs_several(path, dtype, target)
    if spread:
        arguments["device_map"] = "auto"
    elif quantization is not None and not sharded:
        arguments["device_map"] = {"": target}
    if quantization is not None:
        arguments["quantization_config"] = quantization
    failure: Exception | None = None
    for auto in auto_classes(path):
        try:
            model = auto.from_pretrained(str(path), **arguments)
            break
        except Exception as error:  # transformers raises many kinds; the next class may fit
            if memory.is_out_of_memory(error):
                raise
            failure = failure or error
    else:
        reason = " ".join(str(failure).split())[:300]
        raise SourceError(f"{path}: transformers cannot load it: {reason}")
    model.requires_grad_(False)
    return model.eval() if spread or sharded or quantization is not None else model.eval().to(target)


def auto_classes(path: Path) -> list[Any]:
    """The transformers auto classes to try for the checkpoint, in order; multimodal wrapper classes first."""
    import transformers

    config = read_config(path)
    wrapped = architectures.text_config(config) is not config
    return [transformers.AutoModelForImageTextToText] * wrapped + [transformers.AutoModelForCausalLM]


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


def meta_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Raw key -> meta tensor with the stored shape and dtype, for all tensors."""
    return {
        key: torch.empty(span.shape, dtype=_DTYPES.get(span.dtype, torch.float32), device="meta")
        for key, span in checkpoint.tensors.items()
    }


def build_on_meta(
    path: Path,
    tensors: dict[str, torch.Tensor],
    *,
    config: Any = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """(model of `path` on the meta device, transformers' report of how `tensors` (by raw key) match it).

    The report has `missing_keys`, `unexpected_keys` and `mismatched_keys`. Reads no weights. Raises SourceError if no
    class can be built.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    failure: Exception | None = None
    try:
        if config is None:
            config = transformers.AutoConfig.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, local_files_only=True
            )
        classes = auto_classes(path)
    except SlicerError:
        raise
    except Exception as error:
        classes, failure = [], error
    for auto in classes:
        try:
            model, info = _model_class(auto, path, config, trust_remote_code).from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            return model, dict(info)
        except Exception as error:  # model classes raise many kinds
            failure = failure or error
    raise SourceError(f"transformers cannot build the model: {' '.join(str(failure).split())[:300]}")


def _model_class(auto: Any, path: Path, config: Any, trust_remote_code: bool) -> Any:
    """The class that `auto` would load: the checkpoint's own code if trusted, else transformers'."""
    remote = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    if remote and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote, str(path), local_files_only=True)
    return auto._model_mapping[type(config)]


def blueprint(path: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint that a config.json describes: every tensor's name, shape and dtype, without weights.

    Builds the model on the meta device. Raises SourceError with transformers' reason.
    """
    import transformers

    config = read_config(path)
    failure: Exception | None = None
    for auto in auto_classes(path):
        try:
            described = transformers.AutoConfig.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, local_files_only=True
            )
            with torch.device("meta"):
                model = auto.from_config(described, trust_remote_code=trust_remote_code)
            break
        except Exception as error:  # config classes raise many kinds
            failure = failure or error
    else:
        reason = " ".join(str(failure).split())[:300]
        raise SourceError(f"{path}/config.json: transformers cannot build it: {reason}")
    stored = str(architectures.text_config(config).get("dtype") or described.dtype or "bfloat16")
    name = {"float32": "F32", "float16": "F16"}.get(stored.removeprefix("torch."), "BF16")
    size = 4 if name == "F32" else 2
    tensors = {  # a tied head is listed once, as stored
        key: TensorSpan(path / "config.json", name, tuple(value.shape), 0, size * value.numel())
        for key, value in model.named_parameters()
    }
    return Checkpoint(path, config, tensors, {"format": "pt"})


def _needs_several(path: Path, dtype: str, target: torch.device) -> bool:
    from importlib.util import find_spec

    size = Checkpoint.open(path).bytes_as(dtype)
    return size * 1.1 > memory.free(target) and find_spec("accelerate") is not None


def decoder_layers(model: Model) -> nn.ModuleList:
    """The decoder layers, in order. Raises ArchitectureError if there is no list of the right length."""
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    text = [(n, m) for n, m in lists if not any(part in n for part in ("vision", "audio", "visual", "mtp"))]
    if not text:
        raise ArchitectureError(f"{type(model).__name__}: no list of {depth} decoder layers found")
    return min(text, key=lambda item: item[0].count("."))[1]


_MLP_NAMES = ("mlp", "feed_forward", "ffn", "mlp_block", "block_sparse_moe", "fc2", "mixer")


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """The feed-forward submodule of `layer`; None if it has none."""
    children = dict(layer.named_children())
    return next((children[name] for name in _MLP_NAMES if name in children), None)


def _states_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    states = args[0] if args else kwargs["hidden_states"]
    assert isinstance(states, torch.Tensor)
    return states


@contextlib.contextmanager
def watch(model: Model, listener: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call `listener(l, x)` with x(l), [batch, seq, d], for l = 0..L in every forward pass.

    x(l) enters layer l; x(L) leaves the last layer and enters the final norm.
    """
    layers = decoder_layers(model)
    handles = []

    def entering(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs: listener(index, _states_in(args, kwargs))

    def leaving(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        listener(len(layers), output[0] if isinstance(output, tuple) else output)

    try:
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(entering(index), with_kwargs=True))
        handles.append(layers[-1].register_forward_hook(leaving, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Tap:
    """The residual stream of the latest forward pass: `states[l]` is x(l), [batch, seq, d], l = 0..L."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []


@contextlib.contextmanager
def residual_stream(model: Model) -> Iterator[Tap]:
    """Tap the residual stream of each forward pass inside the block."""
    tap = Tap()

    def listener(index: int, states: torch.Tensor) -> None:
        if index == 0:
            tap.states = []
        tap.states.append(states.detach())

    with watch(model, listener):
        yield tap


@contextlib.contextmanager
def bypass(model: Model, dropped: Iterable[int]) -> Iterator[None]:
    """Inside the block, the layers `dropped` return their input unchanged. They still run: for checks only."""
    layers = decoder_layers(model)

    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = _states_in(args, kwargs)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handles = [layers[i].register_forward_hook(skip, with_kwargs=True) for i in dropped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
