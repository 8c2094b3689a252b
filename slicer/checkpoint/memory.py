"""What a checkpoint takes of memory once loaded, and whether an error says that memory ran out."""

from __future__ import annotations

from pathlib import Path

from slicer.checkpoint.reader import Checkpoint


def loaded_bytes(path: Path, dtype: str = "auto") -> int:
    """Bytes of the checkpoint's weights, loaded in `dtype`: "auto" (as stored) or a torch name."""
    import torch

    from slicer.checkpoint import tensors

    checkpoint = Checkpoint.open(path)
    name = None if dtype == "auto" else tensors.dtype_name(torch.empty(0, dtype=getattr(torch, dtype)))
    return sum(span.cast(name)[1] for span in checkpoint.tensors.values())


def short_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, of the GPU's memory or the host's."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(sign in words for sign in signs)
