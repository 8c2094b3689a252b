"""Builds transformers models: a checkpoint with its weights, or the structure alone on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.reader import Checkpoint, read_config
from slicer.checkpoint.tensors import DTYPES, TensorSpan, torch_dtype
from slicer.errors import SourceError
from slicer.runtime import memory
from slicer.runtime.compute import Compute

T = TypeVar("T")
Model = Any  # a transformers PreTrainedModel, which has no type hints


def load_model(
    path: Path,
    compute: Compute = Compute(),  # noqa: B008 (frozen)
    *,
    quantization: Any = None,
    sharded: bool = False,
    **changed: Any,
) -> Model:
    """Load `path` for inference: eval mode, no gradients.

    `changed` are fields of `compute` with another value. On the device "auto" the model is spread over several GPUs
    when one (its `device_memory`) is too small and no other process is at work. `quantization` is transformers' config
    of one, applied while loading. A model that is to be `sharded` over processes stays on the CPU, or quantized on the
    GPU of its process. Raises SourceError with the reason.
    """
    compute = replace(compute, **changed)
    target = compute.torch_device()
    given: dict[str, Any] = {"dtype": compute.dtype or "auto", "trust_remote_code": compute.trust_remote_code}
    alone = compute.device == "auto" and target == torch.device("cuda")  # not one of several processes
    spread = alone and not sharded and _needs_several(path, compute, target)
    if spread:
        given["device_map"] = "auto"
    elif quantization is not None or (target.type != "cpu" and not sharded):  # straight there, not through the host
        given["device_map"] = {"": target}
    if quantization is not None:
        given["quantization_config"] = quantization
    failing = f"{path}: transformers cannot load it"
    model = _first_working(path, lambda auto: auto.from_pretrained(str(path), local_files_only=True, **given), failing)
    model.requires_grad_(False)
    return model.eval()


def auto_classes(path: Path) -> list[Any]:
    """The transformers auto classes to try for the checkpoint, in order; multimodal wrapper classes first."""
    import transformers

    config = read_config(path)
    wrapped = architectures.text_config(config) is not config
    return [transformers.AutoModelForImageTextToText] * wrapped + [transformers.AutoModelForCausalLM]


def _first_working(path: Path, build: Callable[[Any], T], failing: str) -> T:
    """`build(auto)` for the first of the checkpoint's auto classes with which it works.

    Raises SourceError, the reason of the first failure after `failing`.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    failure: Exception | None = None
    for auto in auto_classes(path):
        try:
            return build(auto)
        except Exception as error:  # transformers raises many kinds; the next class may fit
            if memory.is_out_of_memory(error):
                raise
            failure = failure or error
    raise SourceError(f"{failing}: {' '.join(str(failure).split())[:300]}")


def _config(path: Path, trust_remote_code: bool) -> Any:
    """transformers' config object of the checkpoint."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)


def build_on_meta(
    checkpoint: Checkpoint, *, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Model, dict[str, Any]]:
    """(model of `checkpoint` on the meta device, transformers' report of how its tensors match the model).

    The report has `missing_keys`, `unexpected_keys` and `mismatched_keys`. Reads no weights. Raises SourceError if no
    class can be built.
    """
    path, stored = checkpoint.path, checkpoint.tensors.items()
    tensors = {key: torch.empty(s.shape, dtype=torch_dtype(s.dtype), device="meta") for key, s in stored}

    def build(auto: Any) -> tuple[Model, dict[str, Any]]:
        config = _config(path, trust_remote_code)
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

    return _first_working(path, build, "transformers cannot build the model")


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
    config = read_config(path)

    def build(auto: Any) -> tuple[Any, Model]:
        described = _config(path, trust_remote_code)
        with torch.device("meta"):
            return described, auto.from_config(described, trust_remote_code=trust_remote_code)

    described, model = _first_working(path, build, f"{path}/config.json: transformers cannot build it")
    stored = str(architectures.text_config(config).get("dtype") or described.dtype or "bfloat16")
    name = DTYPES.get(stored.removeprefix("torch."), "BF16")
    size = torch_dtype(name).itemsize
    tensors = {  # a tied head is listed once, as stored
        key: TensorSpan(path / "config.json", name, tuple(value.shape), 0, size * value.numel())
        for key, value in model.named_parameters()
    }
    return Checkpoint(path, config, tensors, {"format": "pt"})


def _needs_several(path: Path, compute: Compute, target: torch.device) -> bool:
    return Checkpoint.open(path).bytes_as(compute.dtype) * 1.1 > memory.budget(compute, target)
