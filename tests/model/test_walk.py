"""Layer by layer, loaded or from disk, is the same as a forward pass: for every architecture."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import sources
import tiny
import torch

from slicer.checkpoint.reader import Checkpoint
from slicer.errors import PlanError, SourceError
from slicer.model.layers import bypass
from slicer.model.load import load_model
from slicer.model.walk import Walk, open_walk
from slicer.runtime.compute import Compute


def batches() -> list[torch.Tensor]:
    """Two batches of unlike size and length."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 140, shape, generator=generator) for shape in ((2, 11), (1, 9))]


@torch.no_grad()
def forward(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x(0)..x(L), [L+1, batch, seq, d], and the logits, of one ordinary pass."""
    with tiny.residual_stream(model) as states:
        logits = model(input_ids=tokens, use_cache=False).logits
    return torch.stack(states), logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_every_architecture_from_disk_is_its_forward_pass(model_type: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(model_type).requires_grad_(False)  # as load_model does: it decides on the kernel
    model.save_pretrained(tmp_path)
    expected = [forward(model, tokens) for tokens in batches()]
    for walk in (Walk.out_of_core(tmp_path, device="cpu"), Walk.in_memory(model)):
        states = walk.start(batches())
        for i in range(walk.depth + 1):
            for b, (stream, _) in enumerate(expected):
                assert close(states[b], stream[i]), f"x({i}) of batch {b}"
            if i < walk.depth:
                walk.advance(i, states)
        for b, (_, logits) in enumerate(expected):
            assert close(walk.logits(states, b), logits)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("model"), tokenizer=False)


def test_weights_come_and_go(path: Path) -> None:
    walk = Walk.out_of_core(path, device="cpu")
    states = walk.start(batches())

    def loaded() -> list[int]:
        return [i for i, layer in enumerate(walk.layers) if any(p.device.type != "meta" for p in layer.parameters())]

    assert loaded() == []
    with walk.layer(0) as layer:
        seen: list[torch.Size] = []
        handle = layer.mlp.register_forward_hook(lambda _, args, output: seen.append(output.shape))
        walk.advance(0, states)
        handle.remove()
        assert loaded() == [0], "a block inside a block must not let the weights go"
        assert seen == [state.shape for state in states]
    assert loaded() == []
    walk.run(states, range(1, walk.depth))
    assert loaded() == []


@pytest.mark.parametrize("loads", [True, False])
def test_a_walk_is_closed_with_its_block(path: Path, loads: bool) -> None:
    """Its model goes, whatever name the walk still has."""
    checkpoint = Checkpoint.open(path)
    with open_walk(checkpoint, Compute("cpu"), loads=loads) as walk:
        model = weakref.ref(walk.model)
        assert walk.loaded == loads and walk.run(walk.start(batches()), range(walk.depth)).layer == walk.depth
    assert model() is None and walk is not None


def test_every_byte_is_read_once(path: Path) -> None:
    walk = Walk.out_of_core(path, device="cpu")
    states = walk.start(batches())
    walk.run(states, range(walk.depth))
    checkpoint = Checkpoint.open(path)
    inside = sum(s.nbytes for key, s in checkpoint.tensors.items() if key.startswith("model.layers."))
    assert walk.bytes_read == inside


@pytest.mark.parametrize("limit", [None, 0, 30_000])
def test_layers_left_out_from_a_snapshot(path: Path, tmp_path: Path, limit: int | None) -> None:
    """The rest of the model after a cut, with states in memory, in a file, and in both."""
    model = load_model(path, dtype="float32", device="cpu")
    walk = Walk.in_memory(model, memory_bytes=limit, directory=tmp_path)
    states = walk.start(batches())
    walk.run(states, range(2))
    cut = states.copy()
    walk.run(states, range(2, 6))
    walk.run(cut, [4, 5])
    for b, tokens in enumerate(batches()):
        assert close(walk.logits(states, b), forward(model, tokens)[1])
        with bypass(model, [2, 3]):
            assert close(walk.logits(cut, b), model(input_ids=tokens).logits)
    with pytest.raises(PlanError, match="at layer 6, past layer 3"):
        walk.advance(3, cut)
    assert not list(tmp_path.iterdir()), "spilled states leave no file behind"


def test_states_on_disk_come_back(path: Path, tmp_path: Path) -> None:
    walk = Walk.out_of_core(path, device="cpu")
    states = walk.run(walk.start(batches()), range(3))
    states.save(tmp_path / "states")
    again = walk.start(batches())
    again.restore(tmp_path / "states")
    assert again.layer == 3
    walk.run(again, range(3, 6))
    walk.run(states, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(again, states, strict=True))
    (tmp_path / "states").write_bytes((tmp_path / "states").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not the states"):
        walk.start(batches()).restore(tmp_path / "states")


def test_pickled_weights_walk_too(path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    walk = Walk.out_of_core(path, device="cpu")
    expected = walk.run(walk.start(batches()), range(walk.depth))
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    walk = Walk.out_of_core(tmp_path, device="cpu")
    found = walk.run(walk.start(batches()), range(walk.depth))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_missing_tensor_is_named(path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(SourceError, match=r"layers\.3\.mlp\.up_proj\.weight is missing"):
        Walk.out_of_core(tmp_path, device="cpu")


def test_a_cast_is_the_loaded_models(path: Path) -> None:
    model = load_model(path, dtype="bfloat16", device="cpu")
    walk = Walk.out_of_core(path, dtype="bfloat16", device="cpu")
    states = walk.run(walk.start(batches()), range(walk.depth))
    stream, _ = forward(model, batches()[0])
    assert states[0].dtype == torch.bfloat16 and torch.equal(states[0], stream[-1])
