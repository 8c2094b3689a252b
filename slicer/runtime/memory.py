"""Memory: how much there is, whether a model fits, and whether an error means that it ran out."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.errors import OutOfMemory
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import on_this_machine

if TYPE_CHECKING:
    import torch


# Shares of the free memory that one use may take, so that the others keep theirs.
WALK_SHARE = 0.7  # weights and hidden states of a walk through the model, where --memory is not given
COPY_SHARE = 0.5  # a copy of the model in float32, or the sums of a second-order solve
KEPT_SHARE = 0.25  # outputs kept so that nothing is computed twice: of the first layers, of the source's head
ACTIVATIONS_SHARE = 0.15  # the source's activations on the calibration text, kept for all cuts of a sweep
OVERHEAD = 1.3  # of a loaded model beside its weights: activations, buffers and the loader's own copies
# (limit, used, statistics, what counts as page cache in them) of the control groups, version 2 and 1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
     ("total_inactive_file", "total_active_file")),
)  # fmt: skip
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes of the host's memory that can be taken without swapping, within the limit of the control group.

    Page cache counts as available, in a container too: the kernel gives it up when memory is asked for.
    """
    import psutil

    found = int(psutil.virtual_memory().available)
    for limit, used, statistics, cache in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            bound = int((_CGROUP_ROOT / limit).read_text())
            taken = int((_CGROUP_ROOT / used).read_text()) - _page_cache(_CGROUP_ROOT / statistics, cache)
            found = min(found, bound - max(0, taken))
    return found


def _page_cache(statistics: Path, names: Sequence[str]) -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in statistics.read_text().splitlines())
        return sum(int(value) for name, value in lines if name in names)
    return 0


def free(device: torch.device) -> int:
    """Bytes free on a device; of a GPU, with those that torch holds and does not use."""
    if device.type != "cuda":
        return available()
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def budget(memory: int | None = None) -> int:
    """Bytes that weights and hidden states may take in this process: `memory`, or a safe part of what is available."""
    _, processes = on_this_machine()
    return memory or int(WALK_SHARE * available() / processes)


def fits(nbytes: int, device: str = "auto", memory: int | None = None) -> bool:
    """Whether a model whose weights take `nbytes` can be loaded on `device` in every process of this machine, beside
    what runs already, and within `memory` bytes where they are given. Raises UsageError for an unavailable device."""
    needed = nbytes * OVERHEAD
    target, (_, processes) = Compute(device).torch_device(), on_this_machine()
    if (memory is not None and needed > memory) or needed * processes >= available():
        return False
    if target.type != "cuda":
        return True
    import torch

    spread = device == "auto" and target.index is None  # one process: over all GPUs
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if spread else [target]
    return needed < sum(map(free, gpus))


def release() -> None:
    """Free what nothing refers to any more, torch's unused GPU memory too, before other models or processes need it."""
    import torch

    gc.collect()  # models of transformers and peft are in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, of the GPU's memory or the host's."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(sign in words for sign in signs)


@contextlib.contextmanager
def within_memory(doing: str, ways: Sequence[str]) -> Iterator[None]:
    """An allocation that fails inside the block is raised as OutOfMemory; `ways` are the options that take less, the
    most helpful first."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        *others, last = ways
        either = ", ".join(others) + (" or " if others else "") + last
        raise OutOfMemory(f"out of memory {doing}; give {either}") from None
