"""The table of a forecast beside what happened."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sources

from slicer.benchmarks import forecast


def test_a_command_is_run_and_its_error_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.save_llama(tmp_path / "tiny")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["forecast", "convert", str(source), "--drop", "2-3", "-o", str(out)])
    forecast.main()
    table = capsys.readouterr().out
    assert "| all stages, s | " in table and "| host memory, GB | 0." in table and f"disk of {out}, GB" in table
    monkeypatch.setattr(sys, "argv", ["forecast", "convert", str(tmp_path / "none"), "--drop", "2", "-o", str(out)])
    with pytest.raises(SystemExit, match="1"):
        forecast.main()


def test_the_error_is_a_ratio() -> None:
    rows = iter([("measuring, s", 30.0, 20.0), ("nothing, s", 1.0, 0.0)])
    assert forecast.table(rows).splitlines()[2:] == ["| measuring, s | 30 | 20 | 1.50 |", "| nothing, s | 1 | 0 | - |"]
