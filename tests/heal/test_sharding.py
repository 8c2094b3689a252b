"""Training with the model sharded over two processes (FSDP): as one process trains, also when it was killed.

On a CPU, by `tests/sharded_on_cpu.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import succeeds
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

LAUNCHER = Path(__file__).resolve().parent.parent / "sharded_on_cpu.py"
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
FEW: list[object] = [
    "--train-from",
    "cut",
    "--verify",
    "none",
    "--dropout",
    0,
    "--lr",
    3e-3,
    "--micro-batch",
    2,
]
FEW += ["--steps", 8, "--train-batch-size", 4, "--train-seq-len", 32, "--eval-every", 2, "--patience", 0]
FEW += ["--validation-samples", 4]


@pytest.fixture(scope="module")
def given(sliced: Path, held_out_file: Path) -> list[object]:
    """What every training here is asked, but for its method."""
    return ["heal", sliced, "--calibration", held_out_file, "--samples", 32, "--seq-len", 32, *FEW]


def sharded(given: list[object], out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(LAUNCHER)]
    return subprocess.Popen(
        [*command, *map(str, given), "-o", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **FSDP, "OMP_NUM_THREADS": "1"},
    )


def finishes(run: subprocess.Popen[str]) -> None:
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-3000:]


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


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_sharded_processes_train_as_one(
    method: str, given: list[object], sliced: Path, tmp_path: Path
) -> None:
    given = [*given, "--method", method, *(["--rank", 4] if method != "full" else [])]
    succeeds(*given, "-o", tmp_path / "one")
    finishes(sharded(given, tmp_path / "two"))
    one, two = tmp_path / "one", tmp_path / "two"
    assert losses_apart(one, two) < 1e-3
    assert history_of(two)["held_out"]["8"] < history_of(two)["held_out"]["0"]
    # What was trained is what was written: it moved far from where it began, and both to the same place.
    assert weights_apart(one, two) < 0.1 * weights_apart(sliced, two)


def test_a_killed_sharded_training_goes_on(given: list[object], tmp_path: Path) -> None:
    given = [*given, "--method", "lora", "--rank", 4]
    finishes(sharded(given, tmp_path / "undisturbed"))
    run = sharded(given, tmp_path / "killed")
    until = time.monotonic() + 120
    while not any((tmp_path / "killed.training").glob("run/checkpoint-*/whole")):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    workers = psutil.Process(run.pid).children(recursive=True)  # torchrun gives each a session of its own
    for worker in workers:
        worker.kill()
    run.kill()
    run.communicate()
    assert not (tmp_path / "killed").exists()
    finishes(sharded(given, tmp_path / "killed"))
    assert losses_apart(tmp_path / "undisturbed", tmp_path / "killed") == 0
    assert weights_apart(tmp_path / "undisturbed", tmp_path / "killed") == 0
