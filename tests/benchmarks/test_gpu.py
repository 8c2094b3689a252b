"""`python -m slicer.benchmarks.gpu`: all phases in tiny, with no more libraries than a GPU machine has; failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import fake_cuda, needs_fake_cuda
from phases_that_end import Ending

from slicer.benchmarks import gpu
from slicer.benchmarks.gpu import PHASES, Bench, Line, conversion_bytes, lines
from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.data.sources import TextSpec

# A GPU machine may have none of these. None in sys.modules: importing it fails, and find_spec finds nothing.
MISSING = ("cloup", "lm_eval", "vllm", "datasets", "peft", "bitsandbytes")
NAMES = ["demo demo", "convert demo", *(f"{phase} tiny" for phase in PHASES)]


def read(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((directory / "gpu.json").read_text("utf-8"))["lines"]
    return found


def bench(directory: Path) -> Ending:
    return Ending(directory, "tiny", torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a tiny run, in an interpreter without the libraries that may be missing."""
    place, out = tmp_path_factory.mktemp("blocked"), tmp_path_factory.mktemp("gpu") / "out"
    (place / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MISSING!r}))\n")
    environment = {**os.environ, "PYTHONPATH": str(place)}
    command = [sys.executable, "-m", "slicer.benchmarks.gpu", "--tiny", "--output-dir", str(out), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert (out / "gpu.json").is_file(), done.stderr
    return out


def test_every_phase_ends_without_the_libraries_that_may_be_missing(whole: Path) -> None:
    """Whether a line is PASS depends on the machine's load; that no phase ends with an error does not."""
    found = read(whole)
    assert list(dict.fromkeys(line["phase"] for line in found)) == NAMES
    broken = [line for line in found if line["what"] in ("ended with an error", "stopped")]
    assert not broken, broken
    skipped = {line["phase"]: line["figure"] for line in found if line["verdict"] == "SKIP"}
    assert skipped.keys() == {"train lora tiny", "train qlora tiny"}
    assert all("peft" in reason for reason in skipped.values())
    assert [line["verdict"] for line in found if line["phase"] == "demo demo"] == ["PASS", "PASS"]


def test_figures_and_page(whole: Path) -> None:
    found = read(whole)
    loaded, streamed = (line["data"] for line in found if line["phase"] == "convert demo" and "loss" in line["data"])
    assert loaded["loss"]["after"] < loaded["loss"]["before"] and loaded["peak_bytes"] > 0
    reads = [any("from disk" in note for note in data["notes"]) for data in (loaded, streamed)]
    assert reads == [False, True]
    page = (whole / "gpu.md").read_text("utf-8")
    assert all(f"| {line['phase']} | {line['verdict']} | {line['what']} |" in page for line in found)
    assert [file.name for file in whole.iterdir() if file.is_dir()] == []  # no checkpoint stays


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_training_against_a_bare_loop(method: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    assert [line.passed for line in bench(tmp_path).write()] == [True]
    speed, memory = bench(tmp_path).train(method)
    assert speed.passed is not None and memory.passed is not None
    assert all(way["tokens_per_second"] > 0 for way in speed.data.values())


@needs_fake_cuda
@pytest.mark.parametrize("phase", ["depth", "analyze", "convert", "train lora"])
def test_on_a_pretended_device(phase: str, tmp_path: Path) -> None:
    """What takes how long says nothing here; what the device holds, and computes, does."""
    if phase == "train lora":
        pytest.importorskip("peft")
    for _ in bench(tmp_path).write():
        pass
    method, *arguments = phase.split()
    with fake_cuda(1, memory=4e9):
        found = list(getattr(Bench(tmp_path, "tiny", torch.device("cuda")), method)(*arguments))
    same = [line for line in found if "same" in line.what or "closer" in line.what or "peak memory" in line.what]
    assert len(same) == {"depth": 0, "analyze": 1, "convert": 6, "train lora": 1}[phase]
    assert all(line.passed for line in same) and None not in {line.passed for line in found}, found


def test_an_installed_wheel_has_no_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setitem(sys.modules, "slicer.benchmarks.rivals", None)
    (line,) = bench(tmp_path).train("lora")
    assert line.passed is None and "slicer.benchmarks.rivals" in line.figure


def test_a_phase_that_fails_says_what_and_where(tmp_path: Path) -> None:
    first, failure = lines(bench(tmp_path), "fails", time.monotonic() + 300)
    assert first == Line(True, "first", "said before the failure")
    assert not failure.passed and failure.figure == "RuntimeError: no kernel for this"
    assert "in fails" in failure.data["traceback"]


def test_a_process_that_dies_costs_one_phase(tmp_path: Path) -> None:
    (line,) = lines(bench(tmp_path), "dies", time.monotonic() + 300)
    assert line == Line(False, "stopped", "its process ended with -9")


def test_a_phase_is_stopped_when_the_time_is_over(tmp_path: Path) -> None:
    began = time.monotonic()
    (line,) = lines(bench(tmp_path), "waits", began + 2)
    assert line == Line(None, "stopped", "the time is over") and time.monotonic() - began < 100


def test_all_phases_are_skipped_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--output-dir", str(tmp_path), "--minutes", "0"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert [(line["phase"], line["verdict"]) for line in read(tmp_path)] == [(name, "SKIP") for name in NAMES]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--device", "cuda"], "--device cuda: not available"), (["--sizes", "1b,9b"], "--sizes 9b: choose from")],
)
def test_what_is_not_there_is_said_at_once(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["gpu", *options, "--output-dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_imports_do_not_use_cuda() -> None:
    """A process that has used CUDA, or only counted its devices, cannot be forked into one that uses it."""
    script = (
        "import torch\n"
        "def refuse(*_): raise AssertionError('CUDA was used')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = refuse\n"
        "import slicer.benchmarks.gpu\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_the_formula_of_a_conversion() -> None:
    """More weights in memory when loaded than when streamed, and more states of more text."""
    checkpoint, text = Checkpoint.open(DEMO), TextSpec(samples=16, seq_len=64, batch_size=2)
    loaded, streamed = (conversion_bytes(checkpoint, text, streamed=streamed) for streamed in (False, True))
    assert streamed < loaded and checkpoint.total_bytes < loaded
    assert loaded < conversion_bytes(checkpoint, TextSpec(samples=64, seq_len=64, batch_size=2), streamed=False)
