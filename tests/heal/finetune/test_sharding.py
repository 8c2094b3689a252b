"""Training with the model sharded over two processes (FSDP): as one process trains, also when it was killed.

On a CPU, by `tests/sharded_on_cpu.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import succeeds
from processes import TRAINING, ForkServer, Run
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

LAUNCHER = Path(__file__).resolve().parents[2] / "sharded_on_cpu.py"
# What `accelerate launch` makes of docs/guide/scaling.md's fsdp.yaml.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_USE_ORIG_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
}
FEW: list[object] = ["--train-from", "cut", "--verify", "none", "--lora-dropout", 0, "--learning-rate", 3e-3]
FEW += ["--micro-batch", 2]
FEW += ["--max-steps", 6, "--train-batch-size", 4, "--train-seq-len", 32, "--eval-every", 2, "--patience", 0]
FEW += ["--validation-samples", 4]


@pytest.fixture(scope="module")
def given(sliced: Path, held_out_file: Path) -> list[object]:
    """What every training here is asked, but for its method."""
    return ["heal", sliced, "--calibration", held_out_file, "--samples", 32, "--seq-len", 32, *FEW]


def lora(given: list[object]) -> list[object]:
    return [*given, "--method", "lora", "--lora-r", 4]


def start(forks: ForkServer, given: list[object], out: Path) -> list[Run]:
    return forks.start_group(2, *given, "-o", out, modules=TRAINING, environment=FSDP, script=LAUNCHER)


def finishes(group: list[Run]) -> None:
    for run in group:
        run.succeeds()
        assert steps(run) > 0, "it was not sharded"


def steps(run: Run) -> int:
    """The training steps of this process with a sharded model."""
    return run.errors.read_text().count("training step of FullyShardedDataParallel")


@pytest.fixture(scope="module")
def trained(forks: ForkServer, given: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA, by two processes."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    finishes(start(forks, lora(given), out))
    return out


def history_of(path: Path) -> dict[str, Any]:
    history: dict[str, Any] = json.loads((path / "slicer" / "training.json").read_text())
    return history


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in path.glob("*.safetensors") for key, tensor in load_file(file).items()}


def losses_apart(one: Path, two: Path) -> float:
    """The largest difference, nats a token."""
    a, b = history_of(one), history_of(two)
    assert all(a[kind].keys() == b[kind].keys() for kind in ("train", "held_out"))
    return max(abs(a[kind][k] - b[kind][k]) for kind in ("train", "held_out") for k in a[kind])


def weights_apart(one: Path, two: Path) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    a, b = weights_of(one), weights_of(two)
    assert a.keys() == b.keys() and a
    return max(float((a[k] - b[k]).abs().max() / a[k].abs().max()) for k in a)


def train_as_one(one: Path, two: Path, start: Path) -> bool:
    """Whether both have the same losses, and weights that moved far from `start` and to the same place."""
    assert losses_apart(one, two) < 1e-3
    assert history_of(two)["held_out"]["6"] < history_of(two)["held_out"]["0"]
    return weights_apart(one, two) < 0.1 * weights_apart(start, two)


def test_sharded_processes_train_as_one(given: list[object], sliced: Path, trained: Path, tmp_path: Path) -> None:
    succeeds(*lora(given), "-o", tmp_path / "one")
    assert train_as_one(tmp_path / "one", trained, sliced)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_so_they_do_with_every_method(
    method: str, forks: ForkServer, given: list[object], sliced: Path, tmp_path: Path
) -> None:
    given = [*given, "--method", method, *(["--lora-r", 4] if method == "qlora" else [])]
    succeeds(*given, "-o", tmp_path / "one")
    finishes(start(forks, given, tmp_path / "two"))
    assert train_as_one(tmp_path / "one", tmp_path / "two", sliced)


def test_a_killed_sharded_training_goes_on(
    forks: ForkServer, given: list[object], trained: Path, tmp_path: Path
) -> None:
    first, second = start(forks, lora(given), tmp_path / "killed")
    first.kill_when(lambda: any((tmp_path / "killed.training").glob("run/checkpoint-*/complete")))
    second.kill()
    assert not (tmp_path / "killed").exists()
    group = start(forks, lora(given), tmp_path / "killed")
    finishes(group)
    assert 0 < steps(group[0]) == steps(group[1]) <= 4, "the first two of six were done"
    assert losses_apart(trained, tmp_path / "killed") == 0
    assert weights_apart(trained, tmp_path / "killed") == 0
