"""The pretended CUDA devices refuse what real ones refuse, and compute what the CPU computes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from fake_device import ONE, ZERO, FakeCuda, fake_cuda, needs_fake_cuda, numbers

pytestmark = needs_fake_cuda

# ---------------------------------------------------------------- what is refused


TWO = "on the same device|to be on same device|at least two devices|multi-device"
OF_CUDA = "'cuda' device type for generator but found 'cpu'"
OF_CPU = "'cpu' device type for generator but found 'cuda'"
INDICES = "indices should be either on cpu or on the same device"
REFUSED = {  # x is on the CPU, y on cuda:0, z on cuda:1
    "y.numpy()": "can't convert cuda:0 device type tensor to numpy",
    "__import__('numpy').asarray(y)": "can't convert cuda:0 device type tensor to numpy",
    "y + z": TWO,
    "y + x": TWO,
    "x + y": TWO,
    "y + z.sum()": TWO,
    "x.add_(y)": TWO,
    "torch.tensor(1.0).add_(y.sum())": TWO,
    "torch.add(y, y, out=x)": TWO,
    "y @ x": TWO,
    "y @ z": TWO,
    "torch.addmm(y, y, x)": TWO,
    "torch.cat([y, x])": TWO,
    "torch.stack([y, z])": TWO,
    "torch.where(x > 0, y, y)": TWO,
    "torch.linalg.solve(y, x)": TWO,
    "y.gather(0, torch.zeros(1, 4).long())": TWO,
    "y.index_select(0, torch.tensor([1]))": TWO,
    "F.linear(y, y, x[0])": TWO,
    "F.embedding(torch.tensor([1]), y)": TWO,
    "F.layer_norm(y, (4,), x[0])": TWO,
    "F.cross_entropy(y, torch.zeros(4).long())": TWO,
    "F.scaled_dot_product_attention(y, y, x)": TWO,
    "torch._foreach_add([y, z], [y, y])": TWO,
    "torch._foreach_addcdiv_([y], [x], [y], 1.0)": TWO,
    "x[torch.tensor([1], device=ZERO)]": INDICES,
    "x[y > 0]": INDICES,
    "y[torch.tensor([1], device=ONE)]": INDICES,
    "x.index_put_((torch.tensor([1], device=ZERO),), x[1])": INDICES,
    "y.index_put_((torch.tensor([1]),), z[1])": TWO,
    "torch.randn(2, device=ZERO, generator=torch.Generator())": OF_CUDA,
    "y.normal_(generator=torch.Generator())": OF_CUDA,
    "y.abs().multinomial(1, generator=torch.Generator())": OF_CUDA,
    "torch.randn(2, generator=torch.Generator(ZERO))": OF_CPU,
    "x.normal_(generator=torch.Generator(ZERO))": OF_CPU,
    "torch.randperm(3, generator=torch.Generator(ZERO))": OF_CPU,
    "z.normal_(generator=torch.Generator(ZERO))": "'cuda:1' device type for generator but found 'cuda:0'",
    "x.to(ZERO, non_blocking=True)": "not pinned",
    "x.copy_(y, non_blocking=True)": "not pinned",
    "torch.empty(2, device=ZERO, pin_memory=True)": "pinned",
    "y.pin_memory()": "pin",
    "x.to('cuda:2')": "invalid device ordinal",
    "torch.cuda.set_device(2)": "invalid device ordinal",
    "torch.empty(10**9, device=ZERO)": "CUDA out of memory",
    "setattr(y.requires_grad_(), 'grad', z)": "device",
}


@pytest.mark.parametrize("expression", REFUSED)
def test_it_refuses(expression: str, cuda: FakeCuda) -> None:
    x = numbers(4, 4)
    with pytest.raises((RuntimeError, TypeError), match=REFUSED[expression]):
        eval(expression, {**globals(), "x": x, "y": x.to(ZERO), "z": x.to(ONE)})


def test_out_of_memory_is_torch_s_own_error_and_passes_when_memory_is_freed(cuda: FakeCuda) -> None:
    held = torch.empty(900_000_000, dtype=torch.uint8, device=ONE)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(200_000_000, dtype=torch.uint8, device=ONE)
    torch.empty(200_000_000, dtype=torch.uint8, device=ZERO)
    del held
    torch.empty(200_000_000, dtype=torch.uint8, device=ONE)


# ---------------------------------------------------------------- what is allowed, as on the CPU


F = torch.nn.functional
ALLOWED = """
x + 2, 2 - x, x * torch.tensor(3.0), torch.tensor(3.0) / x, x.pow(2), -x, x.sum() * torch.tensor(2.0)
x.clone().add_(1).mul_(2).clamp_(min=0), x.clone().zero_(), x.clone().fill_(torch.tensor(3.0))
(x > 0) | False, (x > 0) & (x < 1), (x > 0).any(), (x > 0).logical_not(), x.bool() | True
x.double(), x.bfloat16().float(), x.long() + 1, x.half(), x.to(torch.complex64).real
x.T, x[1:3, ::2], x.view(2, 8), x.reshape(-1), x.unfold(0, 2, 1), x.view(torch.int32), x.diagonal()
x.expand(3, 4, 4), *x.split(2), *x.unbind(1), x.movedim(0, 1).flatten(), x.squeeze(), x[None, ..., 1]
x[1:].fill_(5), x, x.T[0].copy_(x[1]), x, x.view(-1)[3:5].zero_(), x
x[torch.tensor([2, 0])], x[to([2, 0])], x[x > 0], x[torch.tensor([True, False, True, False])]
x.index_put_((torch.tensor([1]),), torch.tensor(4.0)), x.masked_fill_(x > 0, 1.0), x
x.index_put_((torch.tensor([0]), to([1])), to([7.0])), x.masked_fill(x > 0, torch.tensor(2.0))
x.scatter(1, to([[0], [1], [2], [3]]), 0.0), x.gather(1, to([[0], [1], [2], [3]])), x.index_add(0, to([0]), x[:1])
x.sum(), x.mean(0), x.max(1), x.argmin(), x.std(), x.norm(), x.cumsum(1), x.logsumexp(0), x.prod(1)
x.topk(2), x.sort(), x.unique(), x.median(), torch.bincount(to([1, 1, 3])), x.nonzero(), x.quantile(0.3)
torch.histc(x, 3), torch.searchsorted(to([1, 3]), to([2, 3]))
x @ x, x[0] @ x, torch.addmm(x, x, x.T), torch.einsum("ij,kj->ik", x, x), torch.outer(x[0], x[1])
torch.bmm(x[None], x[None]), torch.baddbmm(x[None], x[None], x[None]), torch.kron(x, x)
torch.linalg.cholesky(spd), torch.cholesky_solve(x, spd), torch.linalg.solve(x, x[:, :2]), torch.linalg.pinv(x)
torch.linalg.eigvalsh(spd), torch.linalg.svdvals(x), torch.linalg.qr(x), torch.linalg.lstsq(x, x).solution
torch.linalg.solve_triangular(spd.tril(), x, upper=False), torch.linalg.inv(spd), torch.linalg.matrix_norm(x)
torch.add(x, x, out=torch.empty(0, device=d)), torch.matmul(x, x, out=torch.empty_like(x)), torch.add(x, 1, out=x)
torch.arange(4, device=d), torch.ones_like(x), x.new_zeros(3), torch.full((2,), 3.0, device=d), x.new_tensor([3.0])
torch.tensor([[1.0, 2.0]], device=d), torch.linspace(0, 1, 5, device=d), torch.as_tensor([1, 2], device=d)
torch.tril(torch.ones(3, 3, device=d)), torch.eye(3, device=d), torch.tensor(3, device=d), torch.zeros(0, device=d)
torch.cat([x, x]), torch.stack([x, x], 2), x.repeat(2, 1), x.repeat_interleave(2, 0), x.roll(1, 0), x.flip(0)
torch.where(x > 0, x, torch.tensor(0.0)), torch.where(x > 0, x, 0.0), F.pad(x, (1, 2)), torch.lerp(x, x.T, 0.5)
F.softmax(x, -1), F.log_softmax(x, 0), F.silu(x), F.gelu(x), F.softplus(x), F.sigmoid(x), F.relu(x)
F.softmax(x.half(), -1, dtype=torch.float32), F.log_softmax(x.half(), -1, dtype=torch.float32)
F.layer_norm(x, (4,)), F.rms_norm(x, (4,)), F.linear(x, x, x[0]), F.embedding(to([[1, 2]]), x)
F.cross_entropy(x, to([1, 2, 0, 3])), F.mse_loss(x, x + 1), F.kl_div(x, x.softmax(-1)), F.one_hot(to([1, 2]))
F.dropout(x, 0.5, training=False), F.conv1d(x[None], x[:, None, :2], groups=4), F.cosine_similarity(x, x.T)
F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)
F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], spd.tril() > 0)
F.scaled_dot_product_attention(x.view(1, 4, 1, 4), x[:2].view(1, 2, 1, 4), x[:2].view(1, 2, 1, 4), enable_gqa=True)
torch._foreach_mul([x, x], 2.0), torch._foreach_norm([x, x + 1]), torch._foreach_add([x], [x], alpha=3)
x.sum().item(), x.tolist(), float(x[0, 0]), bool((x > 9).any()), int(x.argmax()), torch.allclose(x, x)
torch.view_as_real(torch.complex(x, x)), torch.complex(x, x).conj().resolve_conj().imag, torch.fft.rfft(x).abs()
x.clone().resize_(2, 2), x.clone().set_(x.untyped_storage(), 0, (2, 2), (1, 2)), x.to_dense(), x.contiguous()
x.to(memory_format=torch.contiguous_format), x.type(torch.int64), x.to("cpu").to(d), x.clone().data, x.detach()
torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False), torch.func.vmap(torch.sum)(x)
"""


@pytest.mark.parametrize("expressions", ALLOWED.strip().splitlines())
@pytest.mark.parametrize("device", [ZERO, ONE], ids=str)
def test_it_computes_what_the_cpu_computes(expressions: str, device: torch.device, cuda: FakeCuda) -> None:
    def results(on: torch.device) -> Any:
        def to(values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(on)

        x = numbers(4, 4).to(on)
        spd = x @ x.T + torch.eye(4, device=on)
        return eval(f"[{expressions}]", {**globals(), "x": x, "spd": spd, "to": to, "d": on})

    _same(results(device), results(torch.device("cpu")), device)


def _same(found: Any, expected: Any, device: torch.device) -> None:
    if isinstance(expected, torch.Tensor):
        assert (found.device, found.dtype) == (device, expected.dtype)
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            _same(f, e, device)
    else:
        assert found == pytest.approx(expected)


def test_what_only_cuda_has_a_kernel_for(cuda: FakeCuda) -> None:
    counts = torch.histc(torch.tensor([1, 1, 3], dtype=torch.int32, device=ZERO), bins=4, min=0, max=3)
    assert counts.dtype == torch.int32 and counts.tolist() == [0, 2, 0, 1]


def test_copies_go_everywhere(cuda: FakeCuda) -> None:
    x = numbers(4, 4)
    for tensor in (
        x.to(ZERO),
        x.cuda(),
        x.cuda(1).to(ZERO),
        x.to("cuda"),
        x.to(0),
        torch.empty_like(x, device=ZERO).copy_(x),
    ):
        assert tensor.device == ZERO and torch.equal(tensor.cpu(), x)
    y = x.to(ONE)
    assert x.to(ZERO).copy_(y).device == ZERO and y.to(ONE) is y and y.to("cpu").is_cpu
    assert torch.empty(4, 4).copy_(y).equal(x) and y.to(torch.float64).device == ONE
    x.data = y
    assert x.device == ONE  # as nn.Module.to does it


def test_the_current_device(cuda: FakeCuda) -> None:
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2 and torch.cuda.current_device() == 0
    assert torch.accelerator.is_available() and torch.accelerator.device_count() == 2
    torch.cuda.set_device(1)
    assert torch.zeros(1, device="cuda").device == ONE and torch.zeros(1).cuda().device == ONE
    assert torch.Generator("cuda").device == ONE and torch.device(1) == ONE
    with torch.cuda.device(0):
        assert torch.zeros(1, device="cuda").device == ZERO
    with torch.device("cuda:0"):
        assert torch.zeros(1).device == ZERO
    assert torch.cuda.current_device() == 1
    assert torch.cuda.get_device_capability() == (9, 0) and torch.cuda.get_device_name(0)
    assert torch.cuda.get_device_properties(0).total_memory == 1e9


def test_memory_is_counted(cuda: FakeCuda) -> None:
    assert torch.cuda.mem_get_info(0) == (10**9, 10**9)
    a = torch.zeros(1000, device=ZERO)
    b = a[10:]
    assert cuda.live(0) == torch.cuda.memory_allocated(0) == 4096 and cuda.live(1) == 0
    del a
    assert cuda.live(0) == 4096  # a view holds its storage
    torch.zeros(10_000, device=ZERO)
    del b
    assert cuda.live(0) == 0 and torch.cuda.max_memory_allocated(0) == cuda.peak(0) >= 40_000
    assert torch.cuda.mem_get_info(0)[0] < 10**9 and torch.cuda.memory_reserved(0) > 0  # torch's own cache
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(0)
    assert torch.cuda.mem_get_info(0)[0] == 10**9 and torch.cuda.max_memory_allocated(0) == 0


def test_new_memory_holds_nothing_of_use(cuda: FakeCuda) -> None:
    assert torch.empty(100, device=ZERO).isnan().all()


def test_saved_and_pickled_as_torch_does(cuda: FakeCuda, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    x = numbers(4, 4)
    y = x.to(ONE)
    file = io.BytesIO()
    torch.save({"y": y}, file)
    for place, expected in ((None, ONE), ("cpu", torch.device("cpu")), ("cuda:0", ZERO)):
        file.seek(0)
        loaded = torch.load(file, map_location=place)["y"]
        assert loaded.device == expected and torch.equal(loaded.cpu(), x)
    for twin in (pickle.loads(pickle.dumps(y)), copy.deepcopy(y)):
        assert twin.device == ONE and twin.data_ptr() != y.data_ptr() and torch.equal(twin.cpu(), x)
    save_file({"y": y}, tmp_path / "y.safetensors")
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], x)
    assert load_file(tmp_path / "y.safetensors", device="cuda:1")["y"].device == ONE


def test_random_numbers_follow_the_seed_of_the_device(cuda: FakeCuda) -> None:
    def draw() -> list[torch.Tensor]:
        x = torch.ones(50, device=ZERO)
        return [
            torch.randn(5, device=ZERO),
            F.dropout(x),
            x.multinomial(3),
            torch.randperm(9, device=ZERO),
            x.bernoulli(0.5),
        ]

    torch.manual_seed(3)
    host, first = torch.get_rng_state(), draw()
    assert torch.equal(torch.get_rng_state(), host)  # the CPU's generator was not used
    assert not all(map(torch.equal, first, draw()))
    torch.cuda.manual_seed(3)
    assert all(map(torch.equal, first, draw()))
    state = torch.cuda.get_rng_state(0)
    again = draw()
    torch.cuda.set_rng_state(state, 0)
    assert all(map(torch.equal, again, draw()))
    a, b = (torch.randn(3, device=ONE, generator=torch.Generator(ONE).manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


def test_pinned_memory(cuda: FakeCuda) -> None:
    x = numbers(4, 4)
    pinned = x.pin_memory()
    assert pinned.is_pinned() and torch.empty(3, pin_memory=True).is_pinned() and not x.is_pinned()
    assert cuda.pinned >= 512 and torch.equal(pinned[1:].to(ZERO, non_blocking=True).cpu(), x[1:])


def test_pageable_copies_wait_where_they_are_let(tmp_path: Path) -> None:
    with fake_cuda(1, pageable=True):
        x = numbers(4, 4)
        assert torch.equal(torch.empty(4, 4).copy_(x.to(ZERO, non_blocking=True), non_blocking=True), x)


# ---------------------------------------------------------------- streams


def test_a_copy_to_the_host_is_there_when_it_was_waited_for(cuda: FakeCuda) -> None:
    y = numbers(4, 4).to(ZERO)
    for wait in (torch.cuda.synchronize, lambda: torch.cuda.current_stream().synchronize(), lambda: y.sum().item()):
        host = y.to("cpu", non_blocking=True)
        assert host.is_pinned() and host.isnan().all()
        wait()
        assert torch.equal(host, y.cpu())
    host, event = y.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    late = y.to("cpu", non_blocking=True)
    event.synchronize()
    assert torch.equal(host, numbers(4, 4)) and late.isnan().all()


def test_a_pinned_source_stays_as_it_is_until_its_copy_was_waited_for(cuda: FakeCuda) -> None:
    pinned = numbers(4, 4).pin_memory()
    pinned.to(ZERO, non_blocking=True)
    torch.cuda.synchronize()
    pinned.add_(1)
    pinned.to(ZERO, non_blocking=True)
    pinned.add_(1)
    with pytest.raises(RuntimeError, match="pinned memory changed"):
        torch.cuda.synchronize()


def test_copies_in_one_stream_follow_each_other(cuda: FakeCuda) -> None:
    y = numbers(4, 4).to(ZERO)
    buffer = torch.empty(4, 4, pin_memory=True)
    buffer.copy_(y, non_blocking=True)
    z = buffer.to(ZERO, non_blocking=True)
    buffer.copy_(y + 1)
    assert torch.equal(z.cpu(), y.cpu()) and torch.equal(buffer, y.cpu() + 1)


def test_streams_wait_for_each_other(cuda: FakeCuda) -> None:
    pinned, side, main = numbers(4, 4).pin_memory(), torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        x = pinned.to(ZERO, non_blocking=True)
        ready = side.record_event()
    with pytest.raises(RuntimeError, match="wait"):
        x + 1
    main.wait_event(ready)
    y = x + 1
    with torch.cuda.stream(side), pytest.raises(RuntimeError, match="wait"):
        x.copy_(pinned, non_blocking=True)  # main may still read it
    side.wait_stream(main)
    with torch.cuda.stream(side):
        x.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(x.cpu() + 1, y.cpu())


def test_memory_of_one_stream_is_not_freed_while_another_uses_it(cuda: FakeCuda) -> None:
    pinned, side, main = numbers(4, 4).pin_memory(), torch.cuda.Stream(), torch.cuda.current_stream()

    def use(record: bool) -> torch.Tensor:
        with torch.cuda.stream(side):
            x = pinned.to(ZERO, non_blocking=True)
        main.wait_stream(side)
        if record:
            x.record_stream(main)
        return x + 1

    use(record=True)
    use(record=False)
    with pytest.raises(RuntimeError, match="freed without record_stream"):
        torch.cuda.synchronize()
    y = use(record=True)
    with torch.cuda.stream(side):
        x = pinned.to(ZERO, non_blocking=True)
    side.synchronize()
    z = x + y
    main.synchronize()  # then it may be freed without
    del x
    assert torch.equal(z.cpu(), pinned + (pinned + 1))


def test_registered_memory_is_pinned() -> None:
    with fake_cuda(1, pinnable=1000) as cuda:
        runtime, memory = torch.cuda.cudart(), torch.zeros(100, dtype=torch.uint8)
        assert runtime.cudaHostRegister(memory.data_ptr(), 100, 0) == 0
        assert memory[5:].is_pinned() and cuda.pinned == 100
        assert runtime.cudaHostRegister(memory.data_ptr(), 100, 0) != 0
        assert runtime.cudaHostUnregister(memory.data_ptr()) == 0
        assert not memory.is_pinned() and cuda.pinned == 0
        assert runtime.cudaHostRegister(memory.data_ptr(), 1001, 0) != 0


# ---------------------------------------------------------------- the block


def test_nothing_is_left_behind() -> None:
    from accelerate.utils import is_cuda_available
    from transformers.utils import is_torch_cuda_available

    with fake_cuda(1) as first:
        with pytest.raises(RuntimeError, match="within"), fake_cuda(1):
            pass
        assert is_torch_cuda_available() and is_cuda_available()
        kept = torch.zeros(3, device="cuda")
    assert not torch.cuda.is_available() and not is_torch_cuda_available() and not is_cuda_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError):
        kept + 1
    del kept
    gc.collect()
    with fake_cuda(2) as second:
        assert second.live() == first.live() == 0
    (torch.ones(3, requires_grad=True) * 2).sum().backward()
