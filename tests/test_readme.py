"""The Python example of the README runs as it is printed, and public names are what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), found)
    from slicer import Plan, Written

    written = found["written"]
    assert isinstance(written, Written) and written.verified == "logits"
    assert Plan.load(tmp_path / "demo-9L") == written.plan


def test_public_names_are_bound_whatever_was_imported_before() -> None:
    """Also where a folder has the name of a function."""
    code = """
import slicer
assert set(slicer.__all__) <= set(dir(slicer)), sorted(set(slicer.__all__) - set(dir(slicer)))
import slicer.checkpoint.hub
from slicer.heal import patch
from slicer import analyze, choose, convert, heal, merge
from slicer.jobs import convert as job
for function in (analyze, choose, convert, heal, merge, slicer.heal, slicer.parse_amount):
    assert type(function).__name__ == "function", function
assert convert is job.convert and slicer.__version__ and patch.NONE == patch.Patch()
for name in slicer.__all__:
    getattr(slicer, name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
