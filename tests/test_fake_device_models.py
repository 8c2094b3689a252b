"""Gradients, optimizers and whole models on the pretended CUDA devices are those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.utils.checkpoint
from fake_device import ONE, ZERO, FakeCuda, fake_cuda, needs_fake_cuda, numbers

pytestmark = needs_fake_cuda


def test_gradients_live_beside_their_leaves(cuda: FakeCuda) -> None:
    def run(a: torch.Tensor, b: torch.Tensor) -> None:
        hidden = torch.utils.checkpoint.checkpoint(lambda h: (h @ h).softmax(-1), a, use_reentrant=False)
        (hidden.to(b.device) * b).sum().backward()

    a, b = numbers(4, 4).requires_grad_(), numbers(4, 4).requires_grad_()
    c, d = numbers(4, 4).to(ZERO).requires_grad_(), numbers(4, 4).to(ONE).requires_grad_()
    run(a, b)
    run(c, d)
    assert c.grad is not None and d.grad is not None and (c.grad.device, d.grad.device) == (ZERO, ONE)
    torch.testing.assert_close([c.grad.cpu(), d.grad.cpu()], [a.grad, b.grad])
    with torch.inference_mode():
        assert (c + 1).device == ZERO and not (c + 1).requires_grad
    with torch.no_grad():
        assert not (c @ c).requires_grad


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_makes_the_same_steps(optimizer: Any, cuda: FakeCuda) -> None:
    def run(device: torch.device) -> torch.Tensor:
        weight = torch.nn.Parameter(numbers(4, 4).to(device))
        steps = optimizer([weight], lr=0.1)
        for _ in range(3):
            steps.zero_grad()
            (weight**2).sum().backward()
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            steps.step()
        return weight.detach()

    torch.testing.assert_close(run(ONE).cpu(), run(torch.device("cpu")))


def test_autocast(cuda: FakeCuda) -> None:
    x = numbers(4, 4)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = x.to(ZERO) @ x.to(ZERO)
    assert found.dtype == torch.bfloat16 and torch.equal(found.cpu(), x.bfloat16() @ x.bfloat16())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def reference(llama: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    return logits_and_gradients(AutoModelForCausalLM.from_pretrained(llama))


def logits_and_gradients(model: Any, device: str = "cpu") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(3, 27).view(2, 12).to(device)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.device == parameter.device
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    return output.logits.detach().cpu(), gradients


SPREAD = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    **{f"model.layers.{i}": int(i > 2) for i in range(tiny.DEPTH)},
    "model.norm": 1,
    "lm_head": 1,
}


@pytest.mark.parametrize("way", ["moved", "loaded there", "spread", "spread by itself"])
def test_a_llama_on_devices_is_the_llama_on_the_cpu(way: str, llama: Path, reference: Any) -> None:
    from transformers import AutoModelForCausalLM

    with fake_cuda(2, 1e9, reported=9e5) as cuda:
        if way == "moved":
            model = AutoModelForCausalLM.from_pretrained(llama).to("cuda")
        else:
            place: Any = {"loaded there": {"": "cuda:0"}, "spread": SPREAD, "spread by itself": "auto"}[way]
            model = AutoModelForCausalLM.from_pretrained(llama, device_map=place)
        assert {p.device for p in model.parameters()} == ({ZERO, ONE} if "spread" in way else {ZERO})
        logits, gradients = logits_and_gradients(model, "cuda:0")
        assert cuda.live(0) > 0 and (cuda.live(1) > 0) == ("spread" in way)
        del model
    assert torch.equal(logits, reference[0])
    torch.testing.assert_close(gradients, reference[1])


@pytest.mark.parametrize("model_type", ["mixtral", "gemma3_text", "mamba", "qwen3_next", "gpt2"])
def test_other_architectures(model_type: str, cuda: FakeCuda) -> None:
    model = tiny.tiny_model(model_type)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        found = model.to("cuda")(input_ids=ids.cuda()).logits
    torch.testing.assert_close(found.cpu(), expected)


def test_generation(llama: Path, cuda: FakeCuda) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained(llama), torch.arange(3, 9).view(1, 6)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.cuda().generate(ids.cuda(), max_new_tokens=5, do_sample=False).cpu(), expected)
