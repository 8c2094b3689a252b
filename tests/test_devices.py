"""Every command where the model is on a device, and where it is spread over two: on pretended ones (`fake_device`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from commands import slicer
from fake_device import fake_cuda, needs_fake_cuda

from slicer.checkpoint import tensors
from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.tensors import TensorSpan
from slicer.demo import show
from slicer.heal.patch import _Placing
from slicer.jobs.request import Text
from slicer.model import load
from slicer.sweep.table import read_table

pytestmark = needs_fake_cuda

TEXT = DEMO.parent / "heldout.txt"
FEW = ["--calibration", TEXT, "--samples", 16, "--seq-len", 48]
CUT = ["convert", "demo", "--drop", 4, *FEW]
TRAINED = ["--calibration", TEXT, "--train-batch-size", 4, "--train-seq-len", 32, "--max-steps", 4, "--warmup-steps", 0]
LORA = ["--method", "lora", "--lora-r", 2, "--lora-dropout", 0, "--learning-rate", 3e-3, *TRAINED]
STREAMED = ["--memory", "4MB"]
SUBLAYERS = ["convert", "demo", "--drop-sublayers", 6, *FEW]

# name -> arguments; a relative path is in the machine's directory, and what makes it runs first.
WRITES: dict[str, list[object]] = {
    "demo": ["demo", "--drop", 5],
    "whole": [*CUT, "--offset", "whole", "--heal", "fold"],
    "half": [*CUT, "--offset", "half", "--heal", "fold"],
    "sublayers": [*SUBLAYERS, "--heal", "fold"],
    "bias": [*CUT, "--heal", "bias", "--heal-steps", 3],
    "linear": [*CUT, "--heal", "linear", "--rank", 8, "--heal-steps", 3],
    "bare": [*CUT, "--offset", "whole", "--heal", "none"],
    "fold": ["heal", Path("bare"), *FEW],
    "lora": ["heal", Path("bare"), *LORA, "--train-from", "cut", "--save-adapter", Path("adapter")],
    "folded-lora": ["heal", Path("bare"), *LORA, "--kl-weight", 0.5],
    "merge": ["merge", Path("bare"), Path("adapter")],
}
STREAMS: dict[str, list[object]] = {
    "streamed": [*CUT, "--offset", "whole", "--heal", "fold", *STREAMED],
    "streamed-sublayers": [*SUBLAYERS, "--heal", "bias", *STREAMED],
    "streamed-fold": ["heal", Path("bare"), *FEW, *STREAMED],
}
MEASURES: dict[str, list[object]] = {
    "analyze": ["analyze", "demo", "--calibration", TEXT, "--samples", 8, "--seq-len", 24, "--losses", 1, "--greedy", 1,
                "--taylor", "--healed", 4, "--sublayers", "--shapley", 2],
    "eval": ["eval", "demo", Path("whole"), "--text", TEXT, "--tasks", "c4", "--limit", 2, "--batch-size", 2],
    "sweep": ["sweep", "demo", "--drop", "0,4", "--strategies", "similarity", "--heal", "none,fold", "--limit", 2,
              "--batch-size", 2, *FEW],
}  # fmt: skip
NEEDS_SEVERAL = load._needs_several
ALL = {**WRITES, **STREAMS, **MEASURES}
MADE_BY = {"adapter": "lora"}  # what makes a directory, where it is not the command of its name


@dataclass
class Machine:
    """A machine of so many devices, and what the commands wrote there."""

    devices: int
    directory: Path
    done: dict[str, tuple[Result, list[int]]] = field(default_factory=dict)

    def run(self, name: str) -> Path:
        """The output of a command of `ALL`, which is run once, after those that it needs; it must succeed."""
        if name not in self.done:
            for place in ALL[name]:
                if isinstance(place, Path) and not place.is_absolute() and name != MADE_BY.get(str(place)):
                    self.run(MADE_BY.get(str(place), str(place)))
            self.done[name] = self.slicer(*ALL[name], "-o", self.directory / name)
        result = self.done[name][0]
        assert result.exit_code == 0, result.output
        return self.directory / name

    def slicer(self, *arguments: object, **memory: float) -> tuple[Result, list[int]]:
        """What a command says, and the peak memory of each device, which have `memory` as in `fake_cuda`."""
        given = [self.directory / a if isinstance(a, Path) else a for a in arguments]
        if not self.devices:
            return slicer(*given), []
        with fake_cuda(self.devices, **{"memory": 4e9, **memory}) as cuda:
            result = slicer(*given)
            assert torch.cuda.current_device() == 0 and "ACCELERATE_TORCH_DEVICE" not in os.environ
            return result, [cuda.peak(i) for i in range(self.devices)]


Machines = Callable[[int], Machine]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """The machine of so many devices; 0: the CPU alone. With two, models are spread over them, for they are told that
    one is too small; as they are not, what depends on the memory that is free is the same as with one."""
    made: dict[int, Machine] = {}

    def of(devices: int) -> Machine:
        if devices not in made:
            made[devices] = Machine(devices, tmp_path_factory.mktemp(f"devices-{devices}"))
        return made[devices]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_needs_several", lambda *_: torch.cuda.device_count() > 1)
        # Sampling 64 x 128 tokens by pretended kernels takes a minute.
        patch.setattr(show, "Text", lambda source, **_: Text(source, samples=16, seq_len=24))
        yield of


@pytest.fixture(params=[1, 2], ids=["one device", "two devices"])
def machine(request: pytest.FixtureRequest, machines: Machines) -> Machine:
    return machines(request.param)


def losses(out: Path) -> dict[str, float]:
    """What the plan of a checkpoint tells of its healing."""
    record = json.loads((out / "slicer" / "plan.json").read_text())["healing"] or {"loss": {}}
    return {name: value for name, value in record["loss"].items() if value is not None}


def near(found: dict[str, float], expected: dict[str, float]) -> bool:
    return found == pytest.approx(expected, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("name", WRITES)
def test_a_checkpoint_that_is_written_is_right(name: str, machine: Machine, machines: Machines) -> None:
    if "lora" in name or name == "merge":
        pytest.importorskip("peft")
    out = machine.run(name)
    result, peaks = machine.done[name]
    assert "logits (largest relative error" in result.output
    assert all(peak > 1e6 for peak in peaks), "the model was not on every device"
    assert near(losses(out), losses(machines(0).run(name)))


@pytest.mark.parametrize("name", STREAMS)
def test_layers_that_are_read_one_at_a_time_are_on_the_device(name: str, machine: Machine, machines: Machines) -> None:
    out = machine.run(name)
    loaded = machines(1).run("whole") and machines(1).done["whole"][1][0]
    assert 1e6 < machine.done[name][1][0] < 0.85 * loaded, "the sums of a solve are there in both"
    assert losses(out) and near(losses(out), losses(machines(0).run(name)))


def test_without_a_fold_little_more_than_a_layer_is_on_the_device(machines: Machines) -> None:
    out, loaded = machines(1).directory / "streamed-bare", machines(1).run("whole") and machines(1).done["whole"][1][0]
    result, (peak,) = machines(1).slicer(*CUT, "--heal", "none", *STREAMED, "-o", out)
    assert result.exit_code == 0 and 1e6 < peak < loaded / 4, result.output


def test_so_are_those_of_a_model_that_the_device_does_not_hold(machine: Machine) -> None:
    """With less room there, states are on the host between the layers: nothing that is written depends on it."""
    out = machine.directory / "small-device"
    expected = machine.run("streamed")
    result, peaks = machine.slicer(*ALL["streamed"][:-2], "--device-memory", "4MB", "-o", out)
    assert result.exit_code == 0 and 1e6 < peaks[0] < machine.done["streamed"][1][0], result.output
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_what_is_measured_is_what_the_cpu_measures(machine: Machine, machines: Machines) -> None:
    def of(machine: Machine) -> dict[str, float]:
        return numbers(json.loads((machine.run("analyze") / "analysis.json").read_text()))

    found = of(machine)
    assert len(found) > 100 and all(peak > 1e6 for peak in machine.done["analyze"][1])
    assert near(found, of(machines(0)))


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """The numbers in a JSON value, by where they are."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in numbers(item, f"{name}.{key}").items()}
    return {name: value} if isinstance(value, float) else {}


def test_the_loss_on_text_is_the_one_on_the_cpu(machine: Machine, machines: Machines) -> None:
    def of(machine: Machine) -> dict[str, float]:
        results = json.loads(machine.run("eval").read_text())["results"]
        return {result["model"]: result["loss"]["nats_per_token"] for result in results}

    assert len(of(machine)) == 2
    assert list(of(machine).values()) == pytest.approx(list(of(machines(0)).values()), abs=1e-2)


def test_so_are_those_of_a_sweep(machine: Machine, machines: Machines) -> None:
    def of(machine: Machine) -> dict[str, float]:
        rows = read_table(machine.run("sweep")).rows
        return {row.name: row.evaluation.loss.nats_per_token for row in rows if row.evaluation and row.evaluation.loss}

    assert len(of(machine)) == 3 and near(of(machine), of(machines(0)))


def test_a_model_too_large_for_one_device_is_spread(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model takes 8.8e6 bytes."""
    monkeypatch.setattr(load, "_needs_several", NEEDS_SEVERAL)
    result, peaks = machines(2).slicer(*ALL["bare"], "-o", tmp_path / "out", reported=6.5e6)
    assert result.exit_code == 0 and min(peaks) > 2e6, result.output
    assert "logits (largest relative error" in result.output


@pytest.mark.parametrize(
    ("text", "words"), [(TEXT, "out of memory loading the model to train"), ("self", "--calibration self")]
)
def test_one_too_large_for_both_is_neither_trained_nor_sampled(
    text: object, words: str, machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    machines(2).run("bare")
    monkeypatch.setattr(load, "_needs_several", NEEDS_SEVERAL)
    command = ["heal", Path("bare"), *LORA, "--train-from", "cut", "--calibration", text, "-o", tmp_path / "out"]
    result, _ = machines(2).slicer(*command, reported=2e6)
    said = [line for line in result.stderr.splitlines() if line.startswith("slicer:")]
    assert result.exit_code == 1 and not os.listdir(tmp_path) and len(said) == 1 and words in said[0]


def test_a_training_takes_the_device_it_is_given(machines: Machines) -> None:
    pytest.importorskip("peft")
    machines(2).run("bare")
    out = machines(2).directory / "on-1"
    result, peaks = machines(2).slicer(*ALL["lora"][:-2], "--device", "cuda:1", "-o", out)
    assert result.exit_code == 0, result.output
    assert peaks[0] < 1e6 < peaks[1] and near(losses(out), losses(machines(2).run("lora")))


@pytest.mark.parametrize("command", [CUT, ["heal", Path("bare")]], ids=["convert", "heal"])
def test_a_model_that_is_not_loaded_gives_no_text(command: list[object], machine: Machine, tmp_path: Path) -> None:
    machine.run("bare")
    result, _ = machine.slicer(*command, *STREAMED, "--calibration", "self", "-o", tmp_path / "out")
    assert result.exit_code == 1 and not os.listdir(tmp_path)
    assert [line for line in result.stderr.splitlines() if not line.startswith("note")] == [
        line for line in result.stderr.splitlines() if line.startswith("slicer: --calibration self")
    ]


# ---------------------------------------------------------------- too little memory


SMALL = 16e6  # bytes of a device that holds the model, and not what the fold of it takes


def test_a_fold_by_default_that_does_not_fit_leaves_the_bare_cut(machines: Machines) -> None:
    out = machines(1).directory / "too-small"
    result, _ = machines(1).slicer(*CUT, "-o", out, memory=SMALL)
    assert result.exit_code == 0, result.output
    assert "not healed: out of memory" in result.stderr and "--device cpu" in result.stderr
    assert "logits (largest relative error" in result.output and not losses(out)


@pytest.mark.parametrize(
    "command",
    [[*CUT, "--heal", "fold"], ["heal", Path("bare"), *FEW],
     ["heal", Path("bare"), *LORA]],
    ids=["fold", "heal", "training that starts from a fold"],
)  # fmt: skip
def test_one_that_is_asked_for_ends_in_one_line(command: list[object], machines: Machines, tmp_path: Path) -> None:
    machines(1).run("bare")
    result, _ = machines(1).slicer(*command, "-o", tmp_path / "out", memory=SMALL)
    said = [line for line in result.stderr.splitlines() if line.startswith("slicer:")]
    assert result.exit_code == 1 and set(os.listdir(tmp_path)) <= {"out.work"}, "what was measured may stay"
    assert len(said) == 1 and "out of memory" in said[0] and "--device cpu" in said[0]


def test_less_than_a_layer_of_the_device_is_one_line_with_the_figure(machines: Machines, tmp_path: Path) -> None:
    result, _ = machines(1).slicer(*CUT, "--device-memory", "1MB", "-o", tmp_path / "out")
    assert result.exit_code == 2 and not os.listdir(tmp_path)
    assert "slicer: --device-memory 1MB: too little for one layer" in result.stderr
    assert "give at least 1.94MB" in result.stderr


# ---------------------------------------------------------------- that this finds what it is for


def test_it_finds_a_weight_that_never_leaves_the_device(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Second-order steps keep new weights on the device; below the layer, nothing but these two brings them back."""

    def span(placing: _Placing, key: str, tensor: torch.Tensor, dtype: str) -> TensorSpan:
        ready = tensor.detach().to(tensors.torch_dtype(dtype)).contiguous()
        return TensorSpan(tmp_path, dtype, tuple(ready.shape), 0, ready.nbytes, key, lambda: ready)

    def content(span: TensorSpan) -> torch.Tensor:
        assert span.make is not None
        return span.make().detach().contiguous()

    command = [*CUT, "--offset", "half", "--heal", "fold", "-o", tmp_path / "out"]
    monkeypatch.setattr(_Placing, "_span", span)
    assert machines(1).slicer(*command)[0].exit_code == 0
    monkeypatch.setattr(tensors, "_content", content)
    result, _ = machines(1).slicer(*command, "--overwrite")
    assert result.exit_code == 1 and "can't convert cuda:0 device type tensor to numpy" in result.stderr
