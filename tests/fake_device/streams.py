"""Streams of pretended CUDA devices: what has to wait for what, and an error where it does not.

Work is done at once, in the order of the program. Vector clocks keep what each stream and the host may take as done:
a stream that touches what another one wrote, and has not waited for, raises; so does a pinned source that changed
before its copy was waited for; and the target of a copy to the host holds nothing of use before that.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fake_device.kernels import indexed, on_host, running

Key = tuple[int, int]  # a stream: its device, its number there (0: the default stream)
Clock = dict[Key, int]  # of each stream, how many pieces of its work are known to be done


def _merge(into: Clock, clock: Clock) -> None:
    for key, n in clock.items():
        into[key] = max(into.get(key, 0), n)


@dataclass
class _Touched:
    """Who last wrote a piece of device memory, and who has read it since: stream -> its count then; the stream that its
    memory is of, which is the first to write, and those that `record_stream` named."""

    writer: Key | None = None
    written: int = 0
    readers: Clock = field(default_factory=dict)
    owner: Key | None = None
    recorded: set[Key] = field(default_factory=set)


def _in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Clocks, *args: Any) -> Any:
        with self._turn:
            return method(self, *args)

    return call


@dataclass
class _Pending:
    """A non-blocking copy that the host has not waited for: `finish` runs when it does."""

    key: Key
    count: int
    address: int
    finish: Callable[[], None]


class Clocks:
    """What each stream, and the host, may take as done (vector clocks); operations are only tracked
    once there are side streams. Threads take turns."""

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._done: Clock = {}  # pieces of work of each stream
        self._known: dict[Key, Clock] = {}
        self._host: Clock = {}
        self._pending: list[_Pending] = []
        self._touched: dict[int, _Touched] = {}
        self._current = threading.local()
        self._streams = 0

    # which stream

    @_in_turn
    def new_stream(self) -> int:
        self._streams += 1
        return self._streams

    def current(self, device: torch.device) -> Key:
        index = indexed(device).index
        return index, getattr(self._current, "streams", {}).get(index, 0)

    def set_current(self, key: Key) -> None:
        self._current.streams = {**getattr(self._current, "streams", {}), key[0]: key[1]}

    # what it may take as done

    def known(self, device: torch.device) -> Clock:
        return self.known_to(self.current(device))

    @_in_turn
    def known_to(self, key: Key) -> Clock:
        clock = self._known.setdefault(key, {})
        _merge(clock, self._host)
        clock[key] = self._done.get(key, 0)
        return dict(clock)

    @_in_turn
    def everything(self, device: int | None = None) -> Clock:
        return {key: n for key, n in self._done.items() if device in (None, key[0])}

    @_in_turn
    def wait(self, key: Key, clock: Clock) -> None:
        """The stream `key` waits for all of `clock`."""
        self._take_freed()
        _merge(self._known.setdefault(key, {}), clock)

    @_in_turn
    def meet(self, a: torch.device, b: torch.device) -> None:
        """A copy between devices waits for, and is waited for by, the current streams of both."""
        both = [self.current(a), self.current(b)]
        clocks = [self.known_to(key) for key in both]
        for key in both:
            for clock in clocks:
                self.wait(key, clock)

    @_in_turn
    def settle(self, clock: Clock) -> None:
        """The host waits for all of `clock`: the copies in it arrive, or are found spoilt."""
        self._take_freed()
        _merge(self._host, clock)
        ready = [p for p in self._pending if p.count <= clock.get(p.key, 0)]
        self._pending = [p for p in self._pending if p.count > clock.get(p.key, 0)]
        for pending in ready:
            pending.finish()

    # work

    @_in_turn
    def work(self, device: torch.device, tensors: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        """A piece of work on the device's current stream; RuntimeError where it races with another stream."""
        if device.type != "cuda":
            return
        self._take_freed()
        key = self.current(device)
        self._done[key] = self._done.get(key, 0) + 1
        if not self._streams:
            return
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

    @_in_turn
    def wrote(self, device: torch.device, tensor: torch.Tensor) -> None:
        if self._streams and tensor.numel():
            key, before = self.current(device), self._at(tensor)
            touched = _Touched(key, self._done.get(key, 0), owner=before.owner or key, recorded=before.recorded)
            self._touched[self._serial(tensor)] = touched

    @_in_turn
    def recorded(self, tensor: torch.Tensor, stream: Stream) -> None:
        """`tensor.record_stream(stream)`."""
        self._at(tensor).recorded.add(stream.key)

    def _take_freed(self) -> None:
        """Check the memory that was freed since: it is for other tensors of the stream that it is of."""
        while serial := int(running().library.take_freed()):
            touched = self._touched.pop(serial, None)
            if touched is not None and touched.owner is not None:
                known = self.known_to(touched.owner)
                users = {**touched.readers, **({touched.writer: touched.written} if touched.writer else {})}
                for key in users.keys() - touched.recorded - {touched.owner}:
                    self._check(
                        known.get(key, 0) < users[key], touched.owner, "uses, though it is freed without record_stream"
                    )

    def _at(self, tensor: torch.Tensor) -> _Touched:
        return self._touched.setdefault(self._serial(tensor), _Touched())

    def _serial(self, tensor: torch.Tensor) -> int:
        return int(running().library.block_serial(tensor.untyped_storage().data_ptr()))

    def _check(self, races: bool, key: Key, what: str) -> None:
        if races:
            raise RuntimeError(
                f"stream {key[1]} of cuda:{key[0]} uses what another stream still {what}:"
                " wait_event or wait_stream first"
            )

    # copies that nobody waits for

    @_in_turn
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

    @_in_turn
    def borrow(self, device: torch.device, source: torch.Tensor, target: torch.Tensor) -> None:
        """A copy to the device: the source must stay as it is until it was waited for."""
        value = source.detach().clone()

        def unchanged() -> None:
            same = torch.equal(source.detach().nan_to_num(), value.nan_to_num())
            if not same:
                raise RuntimeError(f"pinned memory changed before its non_blocking copy to {device} was waited for")

        self._later(device, source, unchanged)

    @_in_turn
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
        index = indexed(as_device(device)).index
        self.key: Key = key if key is not None else (index, running().clocks.new_stream())
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
        clocks = running().clocks
        clocks.settle(clocks.known_to(self.key))

    def query(self) -> bool:
        self.synchronize()
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        running().clocks.wait(self.key, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        clocks = running().clocks
        clocks.wait(self.key, clocks.known_to(stream.key))


class Event:
    """In the place of torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing
        self.clock: Clock = {}
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.clock = running().clocks.known_to((stream or current_stream()).key)
        self.seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        running().clocks.settle(self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        return (end.seconds - self.seconds) * 1000


def as_device(device: Any) -> torch.device:
    if device is None:
        return torch.device("cuda")
    if isinstance(device, int):
        return torch.device("cuda", device)
    return torch.device(device)


def current_stream(device: Any = None) -> Stream:
    return Stream(key=running().clocks.current(as_device(device)))


def default_stream(device: Any = None) -> Stream:
    return Stream(key=(indexed(as_device(device)).index, 0))


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        torch.cuda.set_device(stream.device)
        running().clocks.set_current(stream.key)
