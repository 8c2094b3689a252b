"""Tensors that must be read through torch: pickled `.bin` files, and casts to another dtype.

Pickles are loaded with `weights_only` (no code runs) and memory-mapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.errors import SourceError

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # torch -> safetensors name, of what can be asked
_NAMES = DTYPES | {
    "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOATS = ("F64", "F32", "F16", "BF16")
_CHUNK = 4 << 20  # elements per step, to limit memory use


@lru_cache(maxsize=4)  # a few files stay mapped, which costs address space but no memory
def load(file: Path) -> dict[str, torch.Tensor]:
    """Key -> tensor, memory-mapped. Raises SourceError if the file is not a plain state dict."""
    import torch

    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a broken or hostile pickle
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise SourceError(f"{file}: cannot be read as weights ({reason}); convert it to safetensors") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise SourceError(f"{file}: not a dictionary of tensors; convert it to safetensors")
    return content


def dtype_name(dtype: torch.dtype | str) -> str:
    """The safetensors name of a torch dtype, or of its name. Raises SourceError if the format does not support it."""
    name = str(dtype).removeprefix("torch.")
    if name not in _NAMES:
        raise SourceError(f"a tensor has the dtype {name}, which safetensors does not support; convert the checkpoint")
    return _NAMES[name]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    import torch

    dtype: torch.dtype = next(getattr(torch, key) for key, value in _NAMES.items() if value == name)
    return dtype


def chunks(span: TensorSpan, dtype: str) -> Iterator[bytes]:
    """The tensor's bytes, cast to `dtype` (a safetensors name), in chunks of a few MB."""
    import torch

    if span.key is not None:
        for piece in torch.split(_content(span).flatten(), _CHUNK):
            yield piece.to(torch_dtype(dtype)).view(torch.uint8).numpy().tobytes()
        return
    old = torch_dtype(span.dtype)
    with open(span.file, "rb") as stream:
        size = _CHUNK * old.itemsize
        for start in range(span.start, span.end, size):
            stream.seek(start)
            block = bytearray(stream.read(min(size, span.end - start)))
            yield torch.frombuffer(block, dtype=old).to(torch_dtype(dtype)).view(torch.uint8).numpy().tobytes()


def _content(span: TensorSpan) -> torch.Tensor:
    """A tensor that is not in a safetensors file, on the CPU; computed ones pass here before they are written."""
    assert span.key is not None
    tensor = load(span.file)[span.key] if span.make is None else span.make()
    return tensor.detach().cpu().contiguous()


def read(span: TensorSpan) -> torch.Tensor:
    """Read the tensor into memory, in its stored dtype and shape."""
    import torch

    if span.key is not None:
        return _content(span).clone()
    block = bytearray(b"".join(chunks(span, span.dtype)))
    return torch.frombuffer(block, dtype=torch_dtype(span.dtype)).view(span.shape)


def zeros(span: TensorSpan) -> torch.Tensor:
    """A tensor of zeros of the dtype and shape of `span`."""
    import torch

    return torch.zeros(span.shape, dtype=torch_dtype(span.dtype))


@dataclass(frozen=True)
class TensorSpan:
    """Byte range of one tensor: `file[start:end]`, counted from the start of the file.

    `dtype` is the safetensors name ("BF16"). A tensor of a `.bin` file is read through torch by its `key`; then `start`
    is 0 and `end` its size.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    key: str | None = None
    make: Callable[[], Any] | None = None

    def made(self, key: str, make: Callable[[], Any]) -> TensorSpan:
        """A span like this one whose tensor `make` computes when it is read."""
        return replace(self, start=0, end=self.nbytes, key=key, make=make)

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def cast(self, dtype: str | None) -> tuple[str, int]:
        """(dtype, bytes) of this tensor when written as `dtype`; only floating-point tensors change."""
        if dtype is None or self.dtype not in FLOATS:
            return self.dtype, self.nbytes
        return dtype, self.numel * DTYPE_BITS[dtype] // 8

    @property
    def numel(self) -> int:
        return math.prod(self.shape)
