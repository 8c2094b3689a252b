"""Memory: the budget of each device, what fits into it, and whether an error means that it ran out.

A budget follows from the options and from the total memory of a device, never from the free memory: the same command
does the same on every machine of a kind. Free memory is only checked before work begins (`check_free`).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.errors import OutOfMemory
from slicer.plan.amounts import spell_size
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import on_this_machine

if TYPE_CHECKING:
    import torch


HOST_SHARE = 0.7  # default budget, as a share of the total; the rest is for the system and other programs
DEVICE_SHARE = 0.9  # the same for a GPU; the rest is for CUDA
OVERHEAD = 1.3  # of a loaded model beside its weights: activations, buffers and the loader's own copies
# Shares of a budget that one use may take, so that the others keep theirs.
KEPT_SHARE = 0.25  # outputs kept so that nothing is computed twice: of the first layers, of the source's head
ACTIVATIONS_SHARE = 0.15  # the source's activations on the calibration text, kept for all cuts of a sweep
_UNNOTICED = 1 << 29  # bytes: about what the libraries of a process take; whether so little is free is not checked
_CGROUP_ROOT, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# (controller, limit, used, statistics, what counts as page cache in them) of the control groups, version 2 and 1.
_CGROUPS = (
    ("", "memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat",
     ("total_inactive_file", "total_active_file")),
)  # fmt: skip


def total(device: torch.device) -> int:
    """Bytes of a device's memory; of the host, no more than its control groups allow."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _control_groups())])


def available() -> int:
    """Bytes of the host's memory that can be taken without swapping, within the limits of the control groups.

    Page cache counts as available, in a container too: the kernel frees it on demand.
    """
    import psutil

    return min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _control_groups())])


def _control_groups() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use without page cache) of the control group of this process and of those around it."""
    for controller, limit, used, statistics, cache in _CGROUPS:
        root = own = _CGROUP_ROOT / controller
        with contextlib.suppress(OSError):
            for line in _OWN_CGROUP.read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                if controller in controllers.split(","):
                    own = root / path.lstrip("/")
        for directory in (own, *own.parents):
            if directory.is_relative_to(root):
                with contextlib.suppress(OSError, ValueError):
                    bound, taken = (int((directory / name).read_text()) for name in (limit, used))
                    yield bound, max(0, taken - _page_cache(directory / statistics, cache))


def _page_cache(statistics: Path, names: Sequence[str]) -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in statistics.read_text().splitlines())
        return sum(int(value) for name, value in lines if name in names)
    return 0


def free(device: torch.device) -> int:
    """Bytes free on a device; of a GPU, including bytes that torch holds without using them."""
    if device.type != "cuda":
        return available()
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def devices(compute: Compute) -> list[torch.device]:
    """Those that this process can spread a model over: all GPUs for "auto" in a process that works alone."""
    import torch

    target = compute.torch_device()
    if compute.device == "auto" and target == torch.device("cuda"):
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [target]


def settled(compute: Compute) -> Compute:
    """`compute` with its budgets, `memory` and (on GPUs) `device_memory`, as numbers.

    By default they are shares of the total; several processes have equal parts of it. Raises UsageError for an
    unavailable device.
    """
    import torch

    targets, (_, processes) = devices(compute), on_this_machine()
    host, device = compute.memory, compute.device_memory
    if host is None:
        host = _rounded(HOST_SHARE * total(torch.device("cpu")) / processes)
    if targets[0].type != "cuda":
        device = None
    elif device is None:
        sharing = -(-processes // torch.cuda.device_count())
        device = _rounded(DEVICE_SHARE * min(map(total, targets)) / sharing)
    return replace(compute, memory=host, device_memory=device)


def _rounded(nbytes: float) -> int:
    """Down to five binary digits: the totals of machines of a kind differ a little."""
    step = 1 << max(0, int(nbytes).bit_length() - 5)
    return int(nbytes) // step * step


def budget(compute: Compute, device: torch.device | None = None) -> int:
    """Bytes that this process may use on `device`; None: of the host's memory."""
    compute = settled(compute)
    found = compute.device_memory if device is not None and device.type == "cuda" else compute.memory
    assert found is not None
    return found


def fits(nbytes: int, compute: Compute, *, file: int = 0) -> bool:
    """Whether a model whose weights take `nbytes` is loaded, by the budgets alone.

    On GPUs the host holds one `file` of so many bytes at a time, in each process. Raises UsageError for an unavailable
    device.
    """
    targets, compute = devices(compute), settled(compute)
    if targets[0].type != "cuda":
        return OVERHEAD * nbytes <= budget(compute)
    return OVERHEAD * nbytes <= len(targets) * budget(compute, targets[0]) and file <= budget(compute)


def check_free(needed: float, compute: Compute, instead: str | None = "") -> None:
    """Raise OutOfMemory unless `needed` bytes are free where the model will be, an equal part on each device.

    `instead`: the option that takes less; "": a smaller budget; None: there is none.
    """
    targets = devices(compute)
    needed /= len(targets)
    for device in targets:
        found = free(device)
        if needed > max(found, _UNNOTICED):
            place, option = ("", "--memory") if device.type == "cpu" else (f" on {device}", "--device-memory")
            less = f", or use no more than that: {option} {spell_size(found)}" if instead == "" else ""
            raise OutOfMemory(
                f"too little memory is free{place}: {spell_size(needed, up=True)} are needed, {spell_size(found)} are "
                f"free; close other programs, or raise the limit of the container{less}"
                + (f", or give {instead}" if instead else "")
            )


def release() -> None:
    """Free unreferenced memory, also torch's unused GPU memory, before other models or processes need it."""
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


def smaller(batch_size: int) -> list[str]:
    """The options with which work on batches of so many sequences takes less memory, for `within_memory`."""
    return [f"--batch-size {batch_size // 4 or 1}"] * (batch_size > 1) + ["--device cpu"]


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
