"""CUDA devices for machines without one: `with fake_cuda(devices=2, memory=80e9) as cuda: ...`.

Tensors are torch's own, with `cuda:0` as their device and their storage in host memory, so that everything torch
decides by device is decided as on a real one: `.numpy()` raises, operands of two devices raise, a CPU generator raises,
gradients live beside their leaves, a full device raises `torch.OutOfMemoryError`. Three things are stricter than CUDA:

- a `non_blocking` copy from or to memory that is not pinned raises (CUDA silently waits);
- new device memory is filled with not-a-number, and so is the target of a `non_blocking` copy to the host until
  something waits for it; a pinned source that changes before its copy was waited for raises;
- work on one stream with what another stream wrote (or still reads) raises, unless the one waits for the other; so does
  freeing memory that another stream than its first may still use, without `record_stream`.

How: torch's CPU build lacks only CUDA's kernels. `device.cpp` registers devices, memory and generators (a C++
compiler is needed, a few seconds once); one kernel runs every operation on the CPU, on the same memory. Not there:
`torch.compile`, CUDA graphs, NCCL, bitsandbytes and other libraries with kernels of their own; torch built with CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from fake_device.kernels import in_block, indexed, register, run_with
from fake_device.streams import Clocks, Event, Stream, as_device, current_stream, default_stream, set_stream

_PINNED = 8  # the place of pinned host memory among the counters of device.cpp


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def why_not() -> str | None:
    """Why this machine cannot pretend to have CUDA devices, or None if it can."""
    if torch.version.cuda or torch.version.hip:
        return "fake devices need torch's CPU build"
    if not _compiler():
        return "fake devices need a C++ compiler"
    return None


needs_fake_cuda = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


ZERO, ONE = torch.device("cuda", 0), torch.device("cuda", 1)


def numbers(*shape: int) -> torch.Tensor:
    """The same random numbers for one number of dimensions, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@contextlib.contextmanager
def fake_cuda(
    devices: int = 2,
    memory: float = 80e9,
    *,
    reported: float | None = None,
    pageable: bool = False,
    pinnable: float | None = None,
) -> Iterator[FakeCuda]:
    """Inside it this process has so many CUDA devices of `memory` bytes each; no tensor on them is of use afterwards.

    `reported` is what a device tells of its size, where that should be less than it really takes: a small model is
    then spread over several, and its activations still have room. With `pageable`, `non_blocking` copies from and to
    memory that is not pinned wait, as CUDA's do, and do not raise. `pinnable`: bytes of the host that can be pinned.

    transformers' warming of the device's memory is left out: it fails on devices of less than 1.3e9 bytes.
    `torch.manual_seed` seeds the devices as well. Libraries that remember whether there is CUDA (transformers,
    accelerate) are made to forget it on entry and on exit. Backward passes run in the calling thread.
    """
    if in_block():
        raise RuntimeError("fake_cuda within fake_cuda")
    for name in ("torch._dynamo", "transformers.modeling_utils", "accelerate", "peft"):
        if find_spec(name.partition(".")[0]):  # what they find at import is for the whole process
            import_module(name)
    library = _library()
    library.install(devices, (ctypes.c_int64 * devices)(*[int(memory)] * devices))
    fake = FakeCuda(library, devices, int(reported or memory), reported is not None, pageable)
    if pinnable is not None:
        library.limit_pinned(ctypes.c_int64(int(pinnable)))
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        stack.callback(library.uninstall)
        for place, name, value in _replacements(fake):
            for twin in _twins(place, name):
                stack.enter_context(mock.patch.object(twin, name, value, create=not hasattr(twin, name)))
        stack.callback(run_with, None)
        run_with(fake)
        # torch counts the devices at a process's first backward pass; later ones would have no thread.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        _forget()
        yield fake
        fake.clocks.settle(fake.clocks.everything())


@dataclass(eq=False)
class FakeCuda:
    """The devices of a `fake_cuda` block, and how much of their memory is and was in use (bytes, in units of 512)."""

    library: Any
    devices: int
    memory: int
    told_less: bool
    pageable: bool
    generators: tuple[torch.Generator, ...] = ()
    clocks: Clocks = field(default_factory=Clocks)

    def __post_init__(self) -> None:
        self.generators = tuple(torch.Generator(device=torch.device("cuda", i)) for i in range(self.devices))

    def live(self, device: int = 0) -> int:
        return int(self.library.live_bytes(device))

    def peak(self, device: int = 0) -> int:
        return int(self.library.peak_bytes(device))

    def reset_peak(self, device: int = 0) -> None:
        self.library.reset_peak(device)

    @property
    def pinned(self) -> int:
        """Bytes of pinned host memory in use."""
        return int(self.library.live_bytes(_PINNED))


# ---------------------------------------------------------------- the C++ part


@functools.cache
def _library() -> Any:
    """device.cpp, built once a version of torch, loaded, and the kernels of this file registered."""
    if reason := why_not():
        raise RuntimeError(reason)
    source = Path(__file__).with_name("device.cpp")
    mark = hashlib.sha256(source.read_bytes() + torch.__version__.encode() + str(os.getuid()).encode())
    built = Path(tempfile.gettempdir()) / f"fake_device-{mark.hexdigest()[:16]}.so"
    if not built.exists():
        root = Path(torch.__file__).parent
        own = built.with_suffix(f".{os.getpid()}")
        includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        links = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC"]
        command = [str(_compiler()), *flags, *includes, str(source), "-o", str(own), *links]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{made.stderr[-3000:]}")
        own.rename(built)
    library = ctypes.CDLL(str(built))
    for name in ("live_bytes", "reserved_bytes", "peak_bytes", "block_serial", "take_freed"):
        getattr(library, name).restype = ctypes.c_int64
    library.block_serial.argtypes = [ctypes.c_void_p]
    register()
    return library


# ---------------------------------------------------------------- torch.cuda


def _replacements(fake: FakeCuda) -> Iterator[tuple[Any, str, Any]]:
    """What of torch itself is replaced: place, name, replacement. The rest of torch.cuda is torch's own code."""
    library = fake.library

    def set_device(index: int) -> None:
        if library.set_device(index):
            raise torch.AcceleratorError(f"CUDA error: invalid device ordinal {index}")

    def exchange(index: int) -> int:
        before = int(library.get_device())
        if index >= 0:
            set_device(index)
        return before

    def stats(index: int) -> dict[str, Any]:
        def of(current: int, peak: int) -> dict[str, Any]:
            return {"all": {"current": current, "peak": peak, "allocated": peak, "freed": peak - current}}

        live, reserved, peak = (int(f(index)) for f in (library.live_bytes, library.reserved_bytes, library.peak_bytes))
        return {"allocated_bytes": of(live, peak), "reserved_bytes": of(reserved, max(peak, reserved))}

    def index_of(device: Any) -> int:
        index = indexed(as_device(device)).index
        if not 0 <= index < fake.devices:
            raise AssertionError("Invalid device id")
        return int(index)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Free and total bytes; as on a real device, what torch keeps for later use is not free."""
        used = (library.live_bytes if fake.told_less else library.reserved_bytes)(index_of(device))
        return max(0, fake.memory - int(used)), fake.memory

    def properties(device: Any = None) -> SimpleNamespace:
        index_of(device)
        return SimpleNamespace(
            name="a pretended CUDA device",
            total_memory=fake.memory,
            major=9,
            minor=0,
            multi_processor_count=132,
            warp_size=32,
            is_integrated=0,
        )

    def register(address: int, nbytes: int, flags: int) -> int:
        return int(library.pin(ctypes.c_void_p(address), ctypes.c_int64(nbytes)))

    def unregister(address: int) -> int:
        return int(library.unpin(ctypes.c_void_p(address)))

    def synchronize(device: Any = None) -> None:
        fake.clocks.settle(fake.clocks.everything(index_of(device)))

    make_storage = torch.UntypedStorage.__new__

    def new_storage(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return make_storage(cls, *args, **({"device": device} if device is not None else {}), **kwargs)
        data = args[0] if args else 0
        nbytes = data if isinstance(data, int) else len(data)
        return torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()

    low, cuda = torch._C, torch.cuda
    yield low, "_cuda_getDevice", lambda: int(library.get_device())
    yield low, "_cuda_setDevice", set_device
    yield low, "_cuda_emptyCache", lambda: library.empty_cache()
    yield low, "_cuda_memoryStats", stats
    yield low, "_cuda_resetPeakMemoryStats", fake.reset_peak
    yield low, "_cuda_resetAccumulatedMemoryStats", lambda index: None
    yield low, "_cuda_isCurrentStreamCapturing", lambda: False
    yield low, "_cuda_hasPrimaryContext", lambda index: True
    yield cuda, "_lazy_init", lambda: None
    yield cuda, "_lazy_call", lambda call, **how: call()
    yield cuda, "_initialized", True
    yield cuda, "_exchange_device", exchange
    yield cuda, "_maybe_exchange_device", exchange
    yield cuda, "default_generators", fake.generators
    yield cuda, "is_available", lambda: True
    yield cuda, "device_count", lambda: fake.devices
    yield cuda, "is_bf16_supported", lambda including_emulation=True: True
    yield cuda, "get_device_properties", properties
    yield cuda, "ipc_collect", lambda: None
    yield cuda, "mem_get_info", mem_get_info
    yield cuda, "synchronize", synchronize
    yield cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    yield cuda, "Stream", Stream
    yield cuda, "Event", Event
    yield cuda, "current_stream", current_stream
    yield cuda, "default_stream", default_stream
    yield cuda, "set_stream", set_stream
    yield torch.Tensor, "record_stream", lambda tensor, stream: fake.clocks.recorded(tensor, stream)
    yield torch.UntypedStorage, "__new__", new_storage
    if modeling := sys.modules.get("transformers.modeling_utils"):
        yield modeling, "caching_allocator_warmup", lambda *what: None


def _twins(place: Any, name: str) -> list[Any]:
    """The place, and the modules of torch.cuda that have imported the same name from it."""
    if not hasattr(place, name):
        return [place]
    modules = [module for key, module in sys.modules.items() if key.startswith("torch.cuda.")]
    return [place, *(m for m in modules if m is not place and vars(m).get(name) is getattr(place, name))]


def _forget() -> None:
    """Libraries ask once whether there is CUDA, and remember: make them ask again."""
    for name in ("transformers.utils.import_utils", "accelerate.utils.imports", "accelerate.utils.modeling"):
        for value in vars(sys.modules.get(name, SimpleNamespace())).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
