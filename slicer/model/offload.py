"""A transformers model whose decoder layers are loaded from disk one at a time and released again.

While one layer is in use the next one is read, and copied to the GPU if that has room for two.

The model is the real class, built on the meta device. Raw keys are converted by transformers' own loading code
(renamings, fused experts, dtypes), as in `from_pretrained`. Everything outside the decoder layers is memory-mapped, so
an embedding takes only the memory of the rows in use.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from slicer.checkpoint import tensors
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import SourceError
from slicer.model.buffers import Buffers, buffer_bytes
from slicer.model.layers import decoder_layers
from slicer.model.load import build_on_meta
from slicer.runtime.compute import Compute


class OffloadedModel:
    """A model that permanently holds only the weights outside its decoder layers.

    Attributes:
        model: the transformers model, in eval mode; parameters of absent layers are on the meta device.
        layers: its decoder layers.
        device: device of the weights.
        reads_ahead: whether `fetch` reads the next layer while one is in use.
        bytes_read: bytes of layers read from disk.

    Raises SourceError if tensors are missing or have wrong shapes.
    """

    def __init__(self, checkpoint: Checkpoint, compute: Compute) -> None:
        self.checkpoint, self.device = checkpoint, compute.torch_device()
        trusted, dtype = compute.trust_remote_code, compute.dtype or "auto"
        self.model, report = build_on_meta(checkpoint, dtype=dtype, trust_remote_code=trusted)
        for kind, words in (("missing_keys", "is missing"), ("mismatched_keys", "has the wrong shape")):
            for found in sorted(report.get(kind) or (), key=str):
                name = found if isinstance(found, str) else found[0]
                raise SourceError(f"{checkpoint.path}: tensor {name} {words}; fetch the checkpoint again")
        self.model.requires_grad_(False)
        self.layers: nn.ModuleList = decoder_layers(self.model)
        # Layers beyond these are for multi-token prediction and never run.
        prefix = checkpoint.layer_prefix
        self._spans = [
            {f"{prefix}{i}.{name}": span for name, span in layer.items()} for i, layer in enumerate(checkpoint.layers)
        ]
        within = re.compile(rf"{re.escape(prefix)}\d+\.")
        outside = {key: _mapped(span) for key, span in checkpoint.tensors.items() if not within.match(key)}
        self.reads_ahead, self.bytes_read = True, 0
        on_gpu = self.device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._coming: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._buffers = Buffers(max(buffer_bytes(spans.values()) for spans in self._spans), pinned=on_gpu)
        self._load(outside)
        self._tie()
        self._fill_buffers()
        # `release` restores these same meta parameters, so that nothing else of the model changes.
        self._empty = [list(_tensors(layer)) for layer in self.layers]

    def layer_bytes(self, index: int) -> int:
        """Bytes of layer `index` on disk."""
        return sum(span.nbytes for span in self._spans[index].values())

    def device_bytes(self, layers: int) -> int:
        """Bytes on the device of the modules outside the layers and of `layers` layers, the largest."""
        placed = {t for t in (*self.model.parameters(), *self.model.buffers()) if t.device.type != "meta"}
        outside = sum(int(tensor.nbytes) for tensor in placed)
        loaded = [sum(tensor.nbytes for *_, tensor in layer) for layer in self._empty]
        return outside + layers * max(*loaded, *map(self.layer_bytes, range(len(loaded))))

    def fetch(self, index: int, after: int | None, *, copies: bool = False) -> dict[str, torch.Tensor]:
        """The stored tensors of layer `index`, by raw key, on the host or the device; then layer `after` is read ahead,
        in another thread, which also `copies` it to a GPU."""
        if self._coming is not None and self._coming[0] == index:
            stored = self._coming[1].result()
        else:
            self._coming = None  # free it before reading another
            stored = self._read(index)
        self._coming = None
        if self.reads_ahead and after is not None:
            self._reader = self._reader or self._new_reader()
            copies = copies and self._copies is not None
            computed = torch.cuda.current_stream(self.device).record_event() if copies else None
            self._coming = (after, self._reader.submit(self._ahead, after, computed))
        return stored

    def keep(self, index: int, stored: dict[str, torch.Tensor]) -> None:
        """Keep the result of `fetch` for its next call."""
        ready: Future[dict[str, torch.Tensor]] = Future()
        ready.set_result(stored)
        self._coming = (index, ready)

    def close(self) -> None:
        """End reading ahead."""
        if self._reader is not None:
            self._reader.shutdown()

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        self.bytes_read += self.layer_bytes(index)
        return self._buffers.read(self._spans[index])

    def _new_reader(self) -> ThreadPoolExecutor:
        name = "slicer-read"
        if self._copies is None:
            return ThreadPoolExecutor(1, name)
        # A thread begins on the first GPU, which may be another process's.
        return ThreadPoolExecutor(1, name, initializer=torch.cuda.set_device, initargs=(self._copies.device,))

    def _ahead(self, index: int, computed: torch.cuda.Event | None) -> dict[str, torch.Tensor]:
        """The stored tensors of layer `index`: on the host, or, if the event `computed` is given, on the device in the
        place of the layer before the present one, which is computed by then."""
        stored = self._read(index)
        if computed is None:
            return stored
        computed.synchronize()
        with torch.cuda.stream(self._copies):
            moved = {key: t.to(self.device, non_blocking=t.is_pinned()) for key, t in stored.items()}
        self._copies.synchronize()  # only then may the buffer of `stored` be filled again, and `moved` be used
        return moved

    def place(self, index: int, stored: dict[str, torch.Tensor]) -> nn.Module:
        """Put weights (from `fetch`) into layer `index`, converted and on the device; returns the layer."""
        for tensor in stored.values():
            if tensor.is_cuda:  # its memory belongs to the copies, which wait for this stream before they use it again
                tensor.record_stream(torch.cuda.current_stream(self.device))
        self._load(stored)
        layer = self.layers[index].requires_grad_(False)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.device.type == "meta":
                raise SourceError(
                    f"{self.checkpoint.path}: no tensor for {name} of layer {index}; fetch the checkpoint again"
                )
        return layer

    def release(self, index: int) -> None:
        """Free the weights of layer `index`."""
        for owner, name, tensor in self._empty[index]:
            owner[name] = tensor

    def _load(self, stored: dict[str, torch.Tensor]) -> None:
        """Load raw tensors as `from_pretrained` would."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.model.dtype,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        info, _ = convert_and_load_state_dict_in_model(self.model, stored, config)
        if info.conversion_errors:
            name, reason = next(iter(info.conversion_errors.items()))
            raise SourceError(
                f"{self.checkpoint.path}: tensor {name} cannot be converted: {' '.join(str(reason).split())[:200]}"
            )

    def _tie(self) -> None:
        """Tie weights that share a name (input and output embeddings) and are stored once."""
        for one, other in self.model.all_tied_weights_keys.items():
            for target, source in ((one, other), (other, one)):
                if self._get(target).device.type == "meta" and self._get(source).device.type != "meta":
                    path, _, name = target.rpartition(".")
                    setattr(self.model.get_submodule(path), name, self._get(source))

    def _get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.model.get_parameter_or_buffer(name)
        return tensor

    def _fill_buffers(self) -> None:
        """Compute non-persistent buffers (rotary frequencies, causal masks) with the model's own code."""
        held = {name for name, _ in self.model.named_non_persistent_buffers()}
        owners = {self.model.get_submodule(name.rpartition(".")[0]) for name in held}
        self.model._move_missing_keys_from_meta_to_device(set(), {"": self.device}, None, None)
        for module in self.model.modules():
            if module in owners or any(child in owners for child in module.children()):
                module._is_hf_initialized = False
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.device.type == "meta":
                tensor._is_hf_initialized = True
        self.model.initialize_weights()
        self.model.requires_grad_(False)


def _tensors(module: nn.Module) -> Iterable[tuple[dict[str, Any], str, torch.Tensor]]:
    """(owning dictionary, name, tensor) of everything below `module` that a checkpoint stores."""
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for name, tensor in owner.items():
                if tensor is not None and tensor.device.type == "meta":
                    yield owner, name, tensor


def _mapped(span: TensorSpan) -> torch.Tensor:
    """The tensor, memory-mapped."""
    dtype = tensors.torch_dtype(span.dtype)
    if span.key is not None:
        return tensors.load(span.file)[span.key]
    if not span.nbytes:
        return torch.empty(span.shape, dtype=dtype)
    # Maps the whole file, because offsets must be multiples of a page; copy-on-write, because torch needs it writable.
    with open(span.file, "rb") as stream:
        view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    if span.start % dtype.itemsize:
        return Buffers(0).read({"": span})[""]
    return torch.frombuffer(view, dtype=dtype, count=math.prod(span.shape), offset=span.start).view(span.shape)
