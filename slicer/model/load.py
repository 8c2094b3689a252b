"""Builds transformers models: a checkpoint with its weights, or the structure alone on the meta device."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.reader import Checkpoint, read_config
from slicer.checkpoint.tensors import TensorSpan, torch_dtype
from slicer.errors import SlicerError, SourceError
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
    transformers' config of one, applied while loading. A model that is to be `sharded` over processes stays on
    the CPU, or quantized on the GPU of its process. Raises SourceError with the reason.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = Compute(device).torch_device()
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "local_files_only": True}
    alone = device == "auto" and target == torch.device("cuda")  # not one of several processes
    spread = alone and not sharded and _needs_several(path, dtype, target)
    if spread:
        arguments["device_map"] = "auto"
    if quantization is not None:
        arguments.setdefault("device_map", {"": target})  # also where it is sharded: on this process's own GPU
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


def meta_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Raw key -> meta tensor with the stored shape and dtype, for all tensors."""
    return {
        key: torch.empty(span.shape, dtype=torch_dtype(span.dtype), device="meta")
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


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[bool]:
    """Inside the block a loaded 16-bit `model` computes in float32, where there is memory for a copy of it.

    Afterwards its parameters are the same tensors as before.
    """
    halves = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    needed: Counter[torch.device] = Counter()
    for parameter in halves:
        needed[parameter.device] += 4 * parameter.numel()
    if not halves or any(
        device.type == "meta" or size > memory.COPY_SHARE * memory.free(device) for device, size in needed.items()
    ):
        yield False
        return
    before = [p.data for p in halves]
    try:
        for parameter in halves:
            parameter.data = parameter.data.float()
        yield True
    finally:
        for parameter, data in zip(halves, before, strict=True):
            parameter.data = data
