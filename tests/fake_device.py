"""CUDA devices for machines without one: `with fake_cuda(devices=2, memory=80e9): ...`, or the fixtures of that name.

Tensors are torch's own, with `cuda:0` as their device and their storage in host memory, so that everything torch
decides by device is decided as on a real one: `.numpy()` raises, operands of two devices raise, a CPU generator raises,
gradients live beside their leaves, a full device raises `torch.OutOfMemoryError`. Three things are stricter than CUDA:

- a `non_blocking` copy from or to memory that is not pinned raises (CUDA silently waits);
- new device memory is filled with not-a-number, and so is the target of a `non_blocking` copy to the host until
  something waits for it; a pinned source that changes before its copy was waited for raises;
- work on one stream with what another stream wrote (or still reads) raises, unless the one waits for the other.

How: torch's CPU build lacks only CUDA's kernels. `fake_device.cpp` registers devices, memory and generators (a C++
compiler is needed, a few seconds once); one kernel here runs every operation on the CPU, on the same memory. Not there:
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
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

_PINNED = 8  # the place of pinned host memory among the counters of fake_device.cpp
_CPU = torch.device("cpu")
_aten = torch.ops.aten


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


@contextlib.contextmanager
def fake_cuda(
    devices: int = 2, memory: float = 80e9, *, reported: float | None = None, pageable: bool = False
) -> Iterator[FakeCuda]:
    """Inside it this process has so many CUDA devices of `memory` bytes each. Not reentrant; nothing of it may be kept.

    `reported` is what a device tells of its size, where that should be less than it really takes: a small model is
    then spread over several, and its activations still have room. With `pageable`, `non_blocking` copies from and to
    memory that is not pinned wait, as CUDA's do, and do not raise.
    transformers' warming of the device's memory is left out: it fails on devices of less than 1.3e9 bytes.

    `torch.manual_seed` seeds the devices as well. Libraries that remember whether there is CUDA (transformers,
    accelerate) are made to forget it on entry and on exit. Backward passes run in the calling thread.
    """
    for name in ("torch._dynamo", "transformers.modeling_utils", "accelerate", "peft"):
        if find_spec(name.partition(".")[0]):  # what they find at import is for the whole process
            import_module(name)
    library = _library()
    library.install(devices, (ctypes.c_int64 * devices)(*[int(memory)] * devices))
    fake = FakeCuda(library, devices, int(reported or memory), pageable)
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        stack.callback(library.uninstall)
        for place, name, value in _replacements(fake):
            for twin in _twins(place, name):
                stack.enter_context(mock.patch.object(twin, name, value, create=not hasattr(twin, name)))
        stack.enter_context(mock.patch.object(sys.modules[__name__], "_active", fake))
        # torch counts the devices at a process's first backward pass; later ones would have no thread.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        _forget()
        yield fake
        fake.clocks.settle(fake.clocks.everything())


_active: FakeCuda | None = None


@dataclass(eq=False)
class FakeCuda:
    """The devices of a `fake_cuda` block, and how much of their memory is and was in use (bytes, in units of 512)."""

    library: Any
    devices: int
    memory: int
    pageable: bool = False
    generators: tuple[torch.Generator, ...] = ()
    clocks: Clocks = field(default_factory=lambda: Clocks())

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
    """fake_device.cpp, built once a version of torch, loaded, and the kernels of this file registered."""
    if reason := why_not():
        raise RuntimeError(reason)
    source = Path(__file__).with_suffix(".cpp")
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
    for name in ("live_bytes", "reserved_bytes", "peak_bytes", "block_serial"):
        getattr(library, name).restype = ctypes.c_int64
    library.block_serial.argtypes = [ctypes.c_void_p]
    _register()
    return library


@functools.cache
def _register() -> None:
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(_kernel, "CUDA")
    special = torch.library.Library("aten", "IMPL")
    # These would reach for a kernel of CUDA without asking the dispatcher.
    special.impl("copy_", _copy, "CUDA")
    special.impl("convolution", functools.partial(_kernel, _aten.convolution.default), "CUDA")
    special.impl(
        "convolution_backward", functools.partial(_kernel, _aten.convolution_backward.default), "CUDA"
    )
    for key in ("CUDA", "AutogradCUDA"):
        special.impl("scaled_dot_product_attention", _attention, key)
    _registered.extend([rest, special])


_registered: list[Any] = []  # a library's kernels live as long as it does


# ---------------------------------------------------------------- the kernel of every operation

_ONE_NUMBER = {  # operations that take a number on the CPU (a tensor of no dimensions) beside device tensors
    *("fill_", "masked_fill", "masked_fill_", "index_put", "index_put_", "_index_put_impl_", "index_fill_"),
    *("lerp", "lerp_", "where", "_fused_adamw_", "_fused_adam_"),
}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_SOFTMAX = {"_softmax", "_log_softmax"}
_SOFTMAX_BACKWARD = {"_softmax_backward_data", "_log_softmax_backward_data"}


class _Facts:
    """What the kernel has to know of an operation, from its schema."""

    def __init__(self, op: Any) -> None:
        arguments = op._schema.arguments
        self.name = op._schema.name.removeprefix("aten::")
        self.places = {a.name: i for i, a in enumerate(arguments)}
        self.outs = {key for i, a in enumerate(arguments) if a.is_out for key in (i, a.name)}
        self.writes = {
            key
            for i, a in enumerate(arguments)
            if a.alias_info and a.alias_info.is_write
            for key in (i, a.name)
        }
        self.tensors = {
            key for i, a in enumerate(arguments) if str(a.type) == "Tensor" for key in (i, a.name)
        }
        self.lists = self.name.startswith("_foreach_")
        self.numbers = torch.Tag.pointwise in op.tags or self.name in _ONE_NUMBER
        self.random = torch.Tag.nondeterministic_seeded in op.tags or "generator" in self.places


_facts = functools.cache(_Facts)


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `op` on the CPU with the memory of its device tensors, after the checks that CUDA makes."""
    facts, running = _facts(op), _running()
    values = {**dict(enumerate(args)), **kwargs}
    written = [t for key in facts.writes if key in values for t in _tensors(values[key])]
    if facts.lists:
        device = _one_device_a_row(op, values, written)
    else:
        device = _one_device(op, values, [t for v in values.values() for t in _tensors(v)], written)
    if running.clocks.tracks:
        running.clocks.work(device, [t for v in values.values() for t in _tensors(v)], written)
    else:
        running.clocks.count(device)

    on_device: dict[int, torch.Tensor] = {}  # of a CPU tensor's id -> the device tensor it is for
    outs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def host(value: Any, out: bool = False) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.is_cuda:
                return value
            made = torch.empty(0, dtype=value.dtype) if out else on_host(value)
            on_device[id(made)] = value
            if out:
                outs.append((made, value))
            return made
        if isinstance(value, list | tuple):
            return [host(v, out) for v in value]
        return _CPU if isinstance(value, torch.device) else value

    placed = {key: host(value, key in facts.outs) for key, value in values.items()}
    for key, value in placed.items():
        if isinstance(value, bool) and key in facts.tensors:
            placed[key] = torch.tensor(
                value
            )  # torch hands numbers on as they are, and takes them so, but not these
    if (
        facts.name in _SOFTMAX and placed[2]
    ):  # of float16 with a float32 result: one kernel on CUDA, none on the CPU
        placed[0], placed[2] = placed[0].float(), False
    if facts.name in _SOFTMAX_BACKWARD and placed[0].dtype != placed[3]:
        made, out = torch.empty(0, dtype=placed[0].dtype), outs.pop()[1]
        placed[3], placed[next(key for key in facts.outs if key in placed)] = made.dtype, made
        on_device[id(made)] = out
        outs.append((made, out))

    def run() -> Any:
        given = [v for k, v in placed.items() if isinstance(k, int)]
        named = {k: v for k, v in placed.items() if isinstance(k, str)}
        try:
            return op(*given, **named)
        except (
            NotImplementedError
        ):  # "... not implemented for 'Int'": of a type that only CUDA has the kernel for
            if facts.writes or not _tensors(given[0]):
                raise
            wide = torch.float32 if given[0].is_floating_point() else torch.float64
            wider = [
                v.to(wide) if isinstance(v, torch.Tensor) and v.dtype == given[0].dtype else v for v in given
            ]
            return op(*wider, **named).to(given[0].dtype)

    result = _with_random_numbers(device, values, placed, run) if facts.random else run()
    for made, out in outs:
        if made.shape != out.shape:
            out.resize_(made.shape).as_strided_(made.shape, made.stride())
        on_host(out).copy_(made)

    def back(value: Any, to: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in on_device:
                return on_device[id(value)]
            made = _aten.empty_strided.default(value.shape, value.stride(), dtype=value.dtype, device=to)
            on_host(made).copy_(value)
            if running.clocks.tracks:
                running.clocks.wrote(to, made)
            return made
        if isinstance(value, list | tuple):
            places = [t.device for t in values[0]] if facts.lists else [to] * len(value)
            return type(value)(back(v, p) for v, p in zip(value, places, strict=True))
        return value

    return result if device.type == "cpu" else back(result, device)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the memory of a device tensor, for as long as that lives (another tensor: itself)."""
    if not tensor.is_cuda:
        return tensor
    storage = tensor.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _CPU, storage.nbytes())
    made = torch.empty(0, dtype=tensor.dtype)
    made = made.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
    if tensor.is_conj():
        made = made.conj()
    return torch._neg_view(made) if tensor.is_neg() else made


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, list | tuple):
        return [v for v in value if isinstance(v, torch.Tensor)]
    return ()


def _running() -> FakeCuda:
    if _active is None:
        raise RuntimeError("a tensor of a fake CUDA device was used outside of its fake_cuda block")
    return _active


def _one_device(
    op: Any, values: dict[Any, Any], tensors: list[torch.Tensor], written: list[torch.Tensor]
) -> torch.device:
    """The device of an operation; RuntimeError, as CUDA's kernels raise it, where its operands have two."""
    if not tensors:
        asked = values.get("device") or _CPU  # on the CPU, it came here by its generator
        return _indexed(asked) if asked.type == "cuda" else asked
    facts = _facts(op)
    if facts.name in _INDEXING:
        base, indices = values[0].device, _tensors(values[1])
        if any(i.device not in (_CPU, base) for i in indices):
            message = "indices should be either on cpu or on the same device as the indexed tensor"
            raise RuntimeError(f"{message} ({base})")
        tensors = [t for t in tensors if not any(t is i for i in indices)]
    first: torch.device | None = None
    for t in tensors:
        if t.is_cpu and facts.numbers and t.dim() == 0 and not any(t is w for w in written):
            continue
        if first is None:
            first = t.device
        elif t.device != first:
            message = "Expected all tensors to be on the same device, but found at least two devices"
            raise RuntimeError(f"{message}, {first} and {t.device}! (in {op})")
    return first or _CPU


def _one_device_a_row(op: Any, values: dict[Any, Any], written: list[torch.Tensor]) -> torch.device:
    """The same for an operation on lists, whose elements may be on several devices; returns the first one's."""
    lists = [
        v for v in values.values() if isinstance(v, list | tuple) and v and isinstance(v[0], torch.Tensor)
    ]
    for row in zip(*lists, strict=True):
        if "copy" not in _facts(op).name:
            large = [t for t in row if t.is_cuda or t.dim() > 0]
            _one_device(op, values, large or list(row), written)
    return next((t.device for row in lists for t in row if t.is_cuda), _CPU)


def _indexed(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _with_random_numbers(
    device: torch.device, values: dict[Any, Any], placed: dict[Any, Any], run: Callable[[], Any]
) -> Any:
    """Run with random numbers from the device's generator, or the one given."""
    key = next((k for k, v in values.items() if isinstance(v, torch.Generator)), None)
    if key is not None:
        given, twin = values[key], torch.Generator()
        if given.device != device:
            which = (lambda d: str(d)) if given.device.type == device.type else (lambda d: str(d.type))
            message = (
                f"Expected a '{which(device)}' device type for generator but found '{which(given.device)}'"
            )
            raise RuntimeError(message)
        placed[key] = twin.set_state(given.get_state())
        result = run()
        given.set_state(twin.get_state())
        return result
    if device.type == "cpu":
        return run()
    default, before = _running().generators[device.index], torch.get_rng_state()
    torch.set_rng_state(default.get_state())
    try:
        result = run()
        default.set_state(torch.get_rng_state())
        return result
    finally:
        torch.set_rng_state(before)


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`copy_` where one side or both are on a device."""
    clocks = _running().clocks
    if target.is_cuda and source.is_cuda:
        clocks.meet(target.device, source.device)
        clocks.work(target.device, [source], [target])
    else:
        on_cpu, device = (source, target.device) if target.is_cuda else (target, source.device)
        if non_blocking and on_cpu.numel() and not on_cpu.is_pinned():
            if not _running().pageable:
                raise RuntimeError(f"non_blocking copy between {device} and memory that is not pinned")
            non_blocking = False
        clocks.work(device, [source], [target])
        clocks.deliver(device, on_cpu)
        if non_blocking and on_cpu is target:
            clocks.promise(device, target, source)
            return target
    on_host(target).copy_(on_host(source))
    if not (target.is_cuda and source.is_cuda):
        if non_blocking:
            clocks.borrow(device, source, target)
        else:
            clocks.settle(clocks.known(device))
    return target


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the way that the CPU would take, so that results are the CPU's."""
    on_cpu = [
        None if t is None else on_host(t.detach()).detach().requires_grad_(t.requires_grad)
        for t in (query, key, value, attn_mask)
    ]
    flash = 1
    named = {"scale": scale, "enable_gqa": enable_gqa}
    if torch._fused_sdp_choice(*on_cpu, dropout_p, is_causal, **named) == flash:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zeros = torch.zeros(attn_mask.shape, dtype=query.dtype, device=attn_mask.device)
            attn_mask = zeros.masked_fill_(attn_mask.logical_not(), float("-inf"))
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    return _aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, **named
    )[0]


# ---------------------------------------------------------------- streams: what has to wait for what

Key = tuple[int, int]  # a stream: its device, its number there (0: the default stream)
Clock = dict[Key, int]  # of each stream, how many pieces of its work are known to be done


def _merge(into: Clock, clock: Clock) -> None:
    for key, n in clock.items():
        into[key] = max(into.get(key, 0), n)


@dataclass
class _Touched:
    """Who last wrote a piece of device memory, and who has read it since: stream -> its count then."""

    writer: Key | None = None
    written: int = 0
    readers: Clock = field(default_factory=dict)


@dataclass
class _Pending:
    """A non-blocking copy that the host has not waited for: `finish` runs when it does."""

    key: Key
    count: int
    address: int
    finish: Callable[[], None]


class Clocks:
    """What each stream, and the host, may take as done (vector clocks); operations are only tracked
    once there are side streams."""

    def __init__(self) -> None:
        self._done: Clock = {}  # pieces of work of each stream
        self._known: dict[Key, Clock] = {}
        self._host: Clock = {}
        self._pending: list[_Pending] = []
        self._touched: dict[int, _Touched] = {}
        self._current = threading.local()
        self._streams = 0

    @property
    def tracks(self) -> bool:
        """Whether there has been a stream beside the default ones."""
        return self._streams > 0

    # which stream

    def new_stream(self) -> int:
        self._streams += 1
        return self._streams

    def current(self, device: torch.device) -> Key:
        index = _indexed(device).index
        return index, getattr(self._current, "streams", {}).get(index, 0)

    def set_current(self, key: Key) -> None:
        self._current.streams = {**getattr(self._current, "streams", {}), key[0]: key[1]}

    # what it may take as done

    def known(self, device: torch.device) -> Clock:
        return self.known_to(self.current(device))

    def known_to(self, key: Key) -> Clock:
        clock = self._known.setdefault(key, {})
        _merge(clock, self._host)
        clock[key] = self._done.get(key, 0)
        return dict(clock)

    def everything(self, device: int | None = None) -> Clock:
        return {key: n for key, n in self._done.items() if device in (None, key[0])}

    def wait(self, key: Key, clock: Clock) -> None:
        """The stream `key` waits for all of `clock`."""
        _merge(self._known.setdefault(key, {}), clock)

    def meet(self, a: torch.device, b: torch.device) -> None:
        """A copy between devices waits for, and is waited for by, the current streams of both."""
        both = [self.current(a), self.current(b)]
        clocks = [self.known_to(key) for key in both]
        for key in both:
            for clock in clocks:
                self.wait(key, clock)

    def settle(self, clock: Clock) -> None:
        """The host waits for all of `clock`: the copies in it arrive, or are found spoilt."""
        _merge(self._host, clock)
        ready = [p for p in self._pending if p.count <= clock.get(p.key, 0)]
        self._pending = [p for p in self._pending if p.count > clock.get(p.key, 0)]
        for pending in ready:
            pending.finish()

    # work

    def count(self, device: torch.device) -> None:
        """A piece of work on the device's current stream, where nothing can race with it."""
        if device.type == "cuda":
            key = self.current(device)
            self._done[key] = self._done.get(key, 0) + 1

    def work(self, device: torch.device, tensors: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        """A piece of work on the device's current stream; RuntimeError where it races with another stream."""
        self.count(device)
        if device.type != "cuda" or not self.tracks:
            return
        key = self.current(device)
        known = self.known_to(key)
        for t in tensors:
            if t.is_cuda and t.device == device and t.numel():
                at = self._at(t)
                self._check(at.writer is not None and known.get(at.writer, 0) < at.written, key, "wrote")
                at.readers[key] = self._done[key]
        for t in written:
            if t.is_cuda and t.device == device and t.numel():
                at = self._at(t)
                self._check(any(known.get(k, 0) < n for k, n in at.readers.items() if k != key), key, "reads")
                self.wrote(device, t)

    def wrote(self, device: torch.device, tensor: torch.Tensor) -> None:
        if tensor.numel():
            key = self.current(device)
            self._touched[self._serial(tensor)] = _Touched(key, self._done.get(key, 0))

    def _at(self, tensor: torch.Tensor) -> _Touched:
        return self._touched.setdefault(self._serial(tensor), _Touched())

    def _serial(self, tensor: torch.Tensor) -> int:
        return int(_running().library.block_serial(tensor.untyped_storage().data_ptr()))

    def _check(self, races: bool, key: Key, what: str) -> None:
        if races:
            raise RuntimeError(
                f"stream {key[1]} of cuda:{key[0]} uses what another stream still {what}:"
                " wait_event or wait_stream first"
            )

    # copies that nobody waits for

    def promise(self, device: torch.device, target: torch.Tensor, source: torch.Tensor) -> None:
        """A copy to the host: the target holds nothing of use until it was waited for."""
        value = on_host(source).clone()
        self._later(device, target, lambda: target.data.copy_(value))
        lost: Any = (
            float("nan")
            if target.is_floating_point() or target.is_complex()
            else 255
            if target.dtype == torch.uint8
            else -1
        )
        target.data.fill_(lost)

    def borrow(self, device: torch.device, source: torch.Tensor, target: torch.Tensor) -> None:
        """A copy to the device: the source must stay as it is until it was waited for."""
        value = source.detach().clone()

        def unchanged() -> None:
            same = torch.equal(source.detach().nan_to_num(), value.nan_to_num())
            if not same:
                raise RuntimeError(
                    f"pinned memory changed before its non_blocking copy to {device} was waited for"
                )

        self._later(device, source, unchanged)

    def deliver(self, device: torch.device, source: torch.Tensor) -> None:
        """A copy with host memory that an earlier copy still uses: in order on one stream, else it must have waited."""
        address, known = source.untyped_storage().data_ptr(), self.known(device)
        for pending in [p for p in self._pending if p.address == address]:
            self._check(pending.count > known.get(pending.key, 0), self.current(device), "copies")
            pending.finish()
            self._pending.remove(pending)

    def _later(self, device: torch.device, on_cpu: torch.Tensor, finish: Callable[[], None]) -> None:
        key = self.current(device)
        self._pending.append(_Pending(key, self._done[key], on_cpu.untyped_storage().data_ptr(), finish))


class Stream:
    """In the place of torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, *, key: Key | None = None) -> None:
        index = _indexed(_as_device(device)).index
        self.key: Key = key if key is not None else (index, _running().clocks.new_stream())
        self.priority = priority

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.key[0])

    @property
    def device_index(self) -> int:
        return self.key[0]

    @property
    def stream_id(self) -> int:
        return self.key[1]

    cuda_stream = stream_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def synchronize(self) -> None:
        clocks = _running().clocks
        clocks.settle(clocks.known_to(self.key))

    def query(self) -> bool:
        self.synchronize()
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        _running().clocks.wait(self.key, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        clocks = _running().clocks
        clocks.wait(self.key, clocks.known_to(stream.key))


class Event:
    """In the place of torch.cuda.Event."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self.enable_timing = enable_timing
        self.clock: Clock = {}
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.clock = _running().clocks.known_to((stream or _current_stream()).key)
        self.seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _current_stream()).wait_event(self)

    def synchronize(self) -> None:
        _running().clocks.settle(self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        return (end.seconds - self.seconds) * 1000


def _as_device(device: Any) -> torch.device:
    if device is None:
        return torch.device("cuda")
    if isinstance(device, int):
        return torch.device("cuda", device)
    return torch.device(device)


def _current_stream(device: Any = None) -> Stream:
    return Stream(key=_running().clocks.current(_as_device(device)))


def _default_stream(device: Any = None) -> Stream:
    return Stream(key=(_indexed(_as_device(device)).index, 0))


def _set_stream(stream: Stream | None) -> None:
    if stream is not None:
        torch.cuda.set_device(stream.device)
        _running().clocks.set_current(stream.key)


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

        live, reserved, peak = (
            int(f(index)) for f in (library.live_bytes, library.reserved_bytes, library.peak_bytes)
        )
        return {"allocated_bytes": of(live, peak), "reserved_bytes": of(reserved, max(peak, reserved))}

    def index_of(device: Any) -> int:
        index = _indexed(_as_device(device)).index
        if not 0 <= index < fake.devices:
            raise AssertionError("Invalid device id")
        return int(index)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Free and total bytes; as on a real device, what torch keeps for later use is not free."""
        return max(0, fake.memory - int(library.reserved_bytes(index_of(device)))), fake.memory

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
    yield cuda, "Stream", Stream
    yield cuda, "Event", Event
    yield cuda, "current_stream", _current_stream
    yield cuda, "default_stream", _default_stream
    yield cuda, "set_stream", _set_stream
    yield torch.Tensor, "record_stream", lambda tensor, stream: None
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
