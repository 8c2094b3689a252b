"""A checkpoint as a transformers model: load it, find its layers, tap its residual stream, bypass layers.

Uses only hooks, so every class of the table works unchanged: a layer takes its hidden states as the first argument or
by keyword, and returns them alone or first in a tuple.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicer.checkpoint import architectures
from slicer.checkpoint.memory import loaded_bytes, short_of_memory
from slicer.checkpoint.reader import Checkpoint, TensorSpan, read_config
from slicer.errors import ArchitectureError, SlicerError, SourceError, UsageError

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

    `dtype`: "auto" (as stored) or a torch name. `device`: "auto" (a GPU if there is one; several if one is too small
    and accelerate is installed), "cpu", "cuda", "cuda:1". `quantization`: a transformers quantization config, applied
    while loading. `sharded`: the model will be sharded over processes and is not moved to a device. Raises
    SourceError.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = pick_device(device)
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "local_files_only": True,
    }
    spread = (
        device == "auto" and target.type == "cuda" and not sharded and _needs_several(path, dtype, target)
    )
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
        except Exception as error:  # transformers raises many kinds; another class may work
            if short_of_memory(error):
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


def pick_device(device: str) -> torch.device:
    """The torch device named `device`. Raises UsageError if it is not available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {device}: not available ({str(error).splitlines()[0][:120]}); choose another device"
        ) from None
    return target


def _needs_several(path: Path, dtype: str, target: torch.device) -> bool:
    from importlib.util import find_spec

    size = loaded_bytes(path, dtype)
    return size * 1.1 > torch.cuda.mem_get_info(target)[0] and find_spec("accelerate") is not None


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


@contextlib.contextmanager
def sliced(model: Model, kept: Sequence[int], config: Mapping[str, Any]) -> Iterator[None]:
    """Cut `model` inside the block: only the layers `kept`, renumbered, with the rewritten `config`.

    `config` is the sliced config.json (`slicer.checkpoint.export.sliced_config`). Copies nothing: everything that
    shares the model's config object sees the new fields. All is restored at the end.
    """
    layers = decoder_layers(model)
    parent, name = _place_of(model, layers)
    old = model.config.get_text_config()
    fields = dict(old.__dict__)
    with tempfile.TemporaryDirectory(prefix="slicer-config-") as scratch:  # let transformers parse the file
        (Path(scratch) / "config.json").write_text(json.dumps(config), "utf-8")
        new = type(model.config).from_pretrained(scratch).get_text_config()
    changed = {key: value for key, value in new.__dict__.items() if not key.startswith("_")}
    # Set by loading and not in config.json: attention implementation and precision.
    changed = {key: value for key, value in changed.items() if key not in ("dtype", "torch_dtype")}
    numbers = [
        (module, attribute, getattr(module, attribute))
        for layer in layers
        for module in layer.modules()
        for attribute in ("layer_idx", "layer_id", "layer_number")
        if isinstance(getattr(module, attribute, None), int)
    ]
    shifts = {id(module): at - i for at, i in enumerate(kept) for module in layers[i].modules()}
    try:
        old.__dict__.update(changed)
        setattr(parent, name, nn.ModuleList(layers[i] for i in kept))
        for module, attribute, number in numbers:
            setattr(module, attribute, number + shifts.get(id(module), 0))
        yield
    finally:
        for module, attribute, number in numbers:
            setattr(module, attribute, number)
        setattr(parent, name, layers)
        old.__dict__.clear()
        old.__dict__.update(fields)


def _place_of(model: Model, child: nn.Module) -> tuple[nn.Module, str]:
    """(parent, attribute) of a module inside the model."""
    for parent in model.modules():
        for name, module in parent.named_children():
            if module is child:
                return parent, name
    raise ArchitectureError(f"{type(model).__name__}: the decoder layers are not a submodule")
