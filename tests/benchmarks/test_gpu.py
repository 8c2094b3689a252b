"""`python -m slicer.benchmarks.gpu`: all phases in tiny, with no more libraries than a GPU machine has; failures."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slicer.benchmarks import gpu
from slicer.benchmarks.gpu_phases import Bench, Line, check, conversion_bytes
from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.data.sources import TextSpec
from slicer.plan.plan import Plan

# A GPU machine may have none of these. None in sys.modules: importing it fails, and find_spec finds nothing.
MISSING = ("cloup", "lm_eval", "vllm", "datasets", "peft", "bitsandbytes")
PHASES = gpu.phases(["tiny"])


def read(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "gpu.json").read_text("utf-8"))
    return found


def verdicts(found: dict[str, Any], phase: str) -> list[str]:
    return [line["verdict"] for line in found["lines"] if line["phase"] == phase]


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
    assert list(found["seconds"]) == PHASES
    broken = [line for line in found["lines"] if line["what"] in ("ended with an error", "stopped", "not begun")]
    assert not broken, broken
    skipped = {line["phase"]: line["figure"] for line in found["lines"] if line["verdict"] == "SKIP"}
    assert {phase for phase in PHASES if phase.startswith("train")} <= skipped.keys()
    assert all("peft" in reason for phase, reason in skipped.items() if phase.startswith("train"))
    assert verdicts(found, "demo") == ["PASS", "PASS"]
    assert "PASS" in verdicts(found, "convert tiny loaded")


def test_figures_and_page(whole: Path) -> None:
    found = read(whole)
    loaded, streamed = (found["figures"][f"convert demo {way}"] for way in ("loaded", "streamed"))
    assert loaded["verified"] == "logits" and loaded["loss"]["after"] < loaded["loss"]["before"]
    assert not loaded["notes"] and any("from disk" in note for note in streamed["notes"])
    assert {"prefill_r2", "decode_r2", "decode_tokens_per_second_a_layer"} <= found["figures"]["depth tiny"].keys()
    page = (whole / "gpu.md").read_text("utf-8")
    assert all(f"| {line['phase']} | {line['verdict']} |" in page for line in found["lines"])
    assert [file.name for file in whole.iterdir() if file.is_dir()] == []  # no checkpoint stays


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_training_against_a_bare_loop(method: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    bench = Bench(tmp_path, torch.device("cpu"), True, {})
    assert [line.verdict for line in bench.run("write tiny")] == ["PASS"]
    speed, memory = bench.run(f"train tiny {method}")
    assert "SKIP" not in (speed.verdict, memory.verdict)
    assert all(way["tokens_per_second"] > 0 for way in bench.figures[f"train tiny {method}"].values())


def begin(out: Path) -> gpu.Report:
    machine = {"gpus": [], "processor": "none", "cores": 1, "memory_bytes": 1}
    report = gpu.Report(out, {"command": "", "machine": machine, "versions": {}})
    report.save()
    return report


def test_a_phase_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def demo(bench: Bench) -> Iterator[Line]:
        yield check("first", True, "said before the failure")
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(Bench, "demo", demo)
    begin(tmp_path)
    given = argparse.Namespace(output_dir=tmp_path, device="auto", tiny=True)
    gpu.work(given, ["demo", "depth tiny", "write tiny"], time.monotonic() + 60, tmp_path)
    found = read(tmp_path)
    assert [line["verdict"] for line in found["lines"]] == ["PASS", "FAIL", "SKIP", "PASS"]
    assert "RuntimeError: no kernel for this" in found["lines"][1]["figure"]
    assert "demo" in found["lines"][1]["traceback"]
    gpu.work(given, ["demo", "write tiny"], time.monotonic() + 60, tmp_path)  # another process begins no phase again
    assert read(tmp_path) == found


def test_a_process_that_dies_costs_one_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = (
        "import os, sys; from pathlib import Path; from slicer.benchmarks import gpu\n"
        f"report = gpu.Report(Path({str(tmp_path)!r}))\n"
        f"left = [name for name in {PHASES!r} if name not in report.seconds]\n"
        "if left: report.seconds[left[0]] = None; report.save(); os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setattr(gpu, "module_command", lambda *_: [sys.executable, "-c", dies])
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    found = read(tmp_path)
    assert [line["phase"] for line in found["lines"]] == PHASES
    assert all(line["verdict"] == "FAIL" and "-9" in line["figure"] for line in found["lines"])


def test_the_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = (
        "import time; from pathlib import Path; from slicer.benchmarks import gpu\n"
        f"report = gpu.Report(Path({str(tmp_path)!r})); report.seconds['demo'] = None; report.save(); time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "module_command", lambda *_: [sys.executable, "-c", waits])
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--output-dir", str(tmp_path), "--minutes", "0.1"])
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1 and time.monotonic() - began < 60
    assert {(line["verdict"], line["figure"]) for line in read(tmp_path)["lines"]} == {("SKIP", "the time is over")}


def test_a_device_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    begin(tmp_path)
    given = argparse.Namespace(output_dir=tmp_path, device="cuda", tiny=True)
    with pytest.raises(SystemExit, match="--device cuda: not available"):
        gpu.work(given, PHASES, time.monotonic() + 60, tmp_path)


def test_the_formula_of_a_conversion() -> None:
    """More weights in memory when loaded than when streamed; every matrix that steps counts."""
    checkpoint, text = Checkpoint.open(DEMO), TextSpec(samples=16, seq_len=64, batch_size=2)
    late, early = Plan.dropping(12, [9]), Plan.dropping(12, [3])
    loaded = conversion_bytes(checkpoint, late, text, streamed=False)
    assert conversion_bytes(checkpoint, late, text, streamed=True) < loaded
    assert loaded < conversion_bytes(checkpoint, early, text, streamed=False)
    assert loaded > checkpoint.total_bytes
