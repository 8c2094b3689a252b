"""How a pretended CUDA device computes: every operation on the CPU, on the same memory, after CUDA's own checks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

CPU = torch.device("cpu")
_aten = torch.ops.aten
_active: list[Any] = []  # the FakeCuda of the block that the process is in


def running() -> Any:
    """The FakeCuda of the `fake_cuda` block. Raises RuntimeError outside of one."""
    if not _active:
        raise RuntimeError("a tensor of a pretended CUDA device was used outside of its fake_cuda block")
    return _active[-1]


def in_block() -> bool:
    return bool(_active)


def run_with(fake: Any | None) -> None:
    """Make `fake` the one whose devices compute, or none."""
    _active[:] = [] if fake is None else [fake]


def indexed(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the memory of a device tensor, for as long as that lives (another tensor: itself)."""
    if not tensor.is_cuda:
        return tensor
    storage = tensor.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    made = torch.empty(0, dtype=tensor.dtype)
    made = made.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
    if tensor.is_conj():
        made = made.conj()
    return torch._neg_view(made) if tensor.is_neg() else made


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, list | tuple):
        return [v for v in value if isinstance(v, torch.Tensor)]
    return ()


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
            key for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write for key in (i, a.name)
        }
        self.tensors = {key for i, a in enumerate(arguments) if str(a.type) == "Tensor" for key in (i, a.name)}
        self.lists = self.name.startswith("_foreach_")
        self.numbers = torch.Tag.pointwise in op.tags or self.name in _ONE_NUMBER
        self.random = torch.Tag.nondeterministic_seeded in op.tags or "generator" in self.places


_facts = functools.cache(_Facts)


def kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `op` on the CPU with the memory of its device tensors, after the checks that CUDA makes."""
    return _Call(op, {**dict(enumerate(args)), **kwargs}).run()


class _Call:
    """An operation and its arguments, by position or name.

    No function in here may hold on to itself: a cycle would keep device memory until the next garbage collection.
    """

    def __init__(self, op: Any, values: dict[Any, Any]) -> None:
        self.op, self.facts, self.values = op, _facts(op), values
        self.tensors = [t for value in values.values() for t in _tensors(value)]
        self.written = [t for key in self.facts.writes if key in values for t in _tensors(values[key])]
        self.device = _one_device_a_row(self) if self.facts.lists else _one_device(self, self.tensors)
        self.on_device: dict[int, torch.Tensor] = {}  # of a CPU tensor's id -> the device tensor it is for
        self.outs: list[tuple[torch.Tensor, torch.Tensor]] = []  # a new CPU tensor, and where its value goes
        self.placed: dict[Any, Any] = {}  # what the CPU's kernel gets for each value

    def run(self) -> Any:
        clocks = running().clocks
        clocks.work(self.device, self.tensors, self.written)
        self.placed = {key: self._host(value, key in self.facts.outs) for key, value in self.values.items()}
        self._adapt()
        result = self._with_random_numbers() if self.facts.random else self._on_cpu()
        for made, out in self.outs:
            if made.shape != out.shape:
                out.resize_(made.shape).as_strided_(made.shape, made.stride())
            on_host(out).copy_(made)
        return result if self.device.type == "cpu" else self._back(result, self.device)

    def _host(self, value: Any, out: bool) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.is_cuda:
                return value
            made = torch.empty(0, dtype=value.dtype) if out else on_host(value)
            self.on_device[id(made)] = value
            if out:
                self.outs.append((made, value))
            return made
        if isinstance(value, list | tuple):
            return [self._host(v, out) for v in value]
        return CPU if isinstance(value, torch.device) else value

    def _back(self, value: Any, to: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in self.on_device:
                return self.on_device[id(value)]
            made = _aten.empty_strided.default(value.shape, value.stride(), dtype=value.dtype, device=to)
            on_host(made).copy_(value)
            running().clocks.wrote(to, made)
            return made
        if isinstance(value, list | tuple):
            places = [t.device for t in self.values[0]] if self.facts.lists else [to] * len(value)
            return type(value)(self._back(v, p) for v, p in zip(value, places, strict=True))
        return value

    def _adapt(self) -> None:
        """Arguments that CUDA's kernels take and the CPU's do not."""
        placed = self.placed
        for key, value in placed.items():
            if isinstance(value, bool) and key in self.facts.tensors:
                placed[key] = torch.tensor(value)  # torch hands numbers on as they are; only these it does not take
        if self.facts.name in _SOFTMAX and placed[2]:  # of float16 with a float32 result
            placed[0], placed[2] = placed[0].float(), False
        if self.facts.name in _SOFTMAX_BACKWARD and placed[0].dtype != placed[3]:
            made, out = torch.empty(0, dtype=placed[0].dtype), self.outs.pop()[1]
            placed[3], placed[next(key for key in self.facts.outs if key in placed)] = made.dtype, made
            self.on_device[id(made)] = out
            self.outs.append((made, out))

    def _on_cpu(self) -> Any:
        given = [v for k, v in self.placed.items() if isinstance(k, int)]
        named = {k: v for k, v in self.placed.items() if isinstance(k, str)}
        try:
            return self.op(*given, **named)
        except NotImplementedError:  # "... not implemented for 'Int'": of a type that only CUDA has the kernel for
            if self.facts.writes or not isinstance(given[0], torch.Tensor):
                raise
            dtype = given[0].dtype
            wide = torch.float32 if dtype.is_floating_point else torch.float64
            wider = [v.to(wide) if isinstance(v, torch.Tensor) and v.dtype == dtype else v for v in given]
            return self.op(*wider, **named).to(dtype)

    def _with_random_numbers(self) -> Any:
        """With random numbers from the device's generator, or the one given."""
        key = next((k for k, v in self.values.items() if isinstance(v, torch.Generator)), None)
        if key is not None:
            given, twin = self.values[key], torch.Generator()
            if given.device != self.device:
                same = given.device.type == self.device.type
                ours, found = (d if same else d.type for d in (self.device, given.device))
                raise RuntimeError(f"Expected a '{ours}' device type for generator but found '{found}'")
            self.placed[key] = twin.set_state(given.get_state())
            result = self._on_cpu()
            given.set_state(twin.get_state())
            return result
        if self.device.type == "cpu":
            return self._on_cpu()
        default, before = running().generators[self.device.index], torch.get_rng_state()
        torch.set_rng_state(default.get_state())
        try:
            result = self._on_cpu()
            default.set_state(torch.get_rng_state())
            return result
        finally:
            torch.set_rng_state(before)


def _one_device(call: _Call, tensors: list[torch.Tensor]) -> torch.device:
    """The device of an operation; RuntimeError, as CUDA's kernels raise it, where its operands have two."""
    facts, values = call.facts, call.values
    if not tensors:
        asked = values.get("device") or CPU  # on the CPU, it came here by its generator
        return indexed(asked) if asked.type == "cuda" else asked
    if facts.name in _INDEXING:
        base, indices = values[0].device, _tensors(values[1])
        if any(i.device not in (CPU, base) for i in indices):
            message = "indices should be either on cpu or on the same device as the indexed tensor"
            raise RuntimeError(f"{message} ({base})")
        tensors = [t for t in tensors if not any(t is i for i in indices)]
    first: torch.device | None = None
    for t in tensors:
        if t.is_cpu and facts.numbers and t.dim() == 0 and not any(t is w for w in call.written):
            continue
        if first is None:
            first = t.device
        elif t.device != first:
            message = "Expected all tensors to be on the same device, but found at least two devices"
            raise RuntimeError(f"{message}, {first} and {t.device}! (in {call.op})")
    return first or CPU


def _one_device_a_row(call: _Call) -> torch.device:
    """The same for an operation on lists, whose elements may be on several devices; returns the first one's."""
    lists = [v for v in call.values.values() if isinstance(v, list | tuple) and len(_tensors(v)) > 0]
    for row in zip(*lists, strict=True):
        if "copy" not in call.facts.name:
            _one_device(call, [t for t in row if t.is_cuda or t.dim() > 0] or list(row))
    return next((t.device for t in call.tensors if t.is_cuda), CPU)


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`copy_` where one side or both are on a device."""
    clocks = running().clocks
    if target.is_cuda and source.is_cuda:
        clocks.meet(target.device, source.device)
        clocks.work(target.device, [source], [target])
    else:
        on_cpu, device = (source, target.device) if target.is_cuda else (target, source.device)
        if non_blocking and on_cpu.numel() and not on_cpu.is_pinned():
            if not running().pageable:
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
    return _aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, None, **named)[
        0
    ]


_registered: list[Any] = []  # a library's kernels live as long as it does


@functools.cache
def register() -> None:
    """Make these the kernels of every operation on CUDA tensors, for the rest of the process."""
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(kernel, "CUDA")
    special = torch.library.Library("aten", "IMPL")
    special.impl("copy_", _copy, "CUDA")
    for op in (_aten.convolution.default, _aten.convolution_backward.default):
        # Otherwise these, and attention, choose a kernel of CUDA's without asking the dispatcher.
        special.impl(op._schema.name, functools.partial(kernel, op), "CUDA")
    for key in ("CUDA", "AutogradCUDA"):
        special.impl("scaled_dot_product_attention", _attention, key)
    _registered.extend([rest, special])
