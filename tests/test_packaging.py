"""What gets installed: every package, the data files, the command, nothing heavier than asked for."""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def setuptools_config() -> dict[str, Any]:
    config: dict[str, Any] = PYPROJECT["tool"]["setuptools"]
    return config


def test_every_package_is_listed() -> None:
    """The list in pyproject.toml is written by hand: a forgotten folder would be missing from wheels only."""
    folders = {ROOT / "slicer": "slicer"} | {
        ROOT / folder: package for package, folder in setuptools_config()["package-dir"].items()
    }
    found = {
        ".".join([package, *file.parent.relative_to(folder).parts])
        for folder, package in folders.items()
        for file in folder.rglob("__init__.py")
    }
    scripts = {"slicer.benchmarks.rivals"}  # of the repository, not installed
    assert found - scripts == set(setuptools_config()["packages"])


def test_every_data_file_is_covered() -> None:
    """Whatever is not Python in the package matches a package-data pattern."""
    patterns = setuptools_config()["package-data"]
    directories = setuptools_config()["package-dir"]
    covered: set[Path] = set()
    for package, globs in patterns.items():
        base = ROOT / directories.get(package, package.replace(".", "/"))
        covered.update(file for pattern in globs for file in base.glob(pattern))
    files = {
        file
        for file in (ROOT / "slicer").rglob("*")
        if file.is_file() and file.suffix not in {".py", ".pyc"} and "__pycache__" not in file.parts
    }
    assert files <= covered, f"no package-data pattern for {sorted(str(file) for file in files - covered)}"


def test_the_commands() -> None:
    installed = distribution("slicer-llm")
    commands = {entry.name: entry.value for entry in installed.entry_points if entry.group == "console_scripts"}
    assert commands["slicer"] == "slicer.cli.main:main"
    plugins = {entry.value for entry in installed.entry_points if entry.group == "vllm.general_plugins"}
    assert plugins == {"slicer.serve.plugin:register"}, "run make again: it was installed before it had a plugin"


def test_the_core_stays_light() -> None:
    """peft, bitsandbytes, lm-eval and vLLM come with extras only."""
    core = " ".join(PYPROJECT["project"]["dependencies"])
    assert not [name for name in ("peft", "bitsandbytes", "lm-eval", "vllm") if name in core]


def test_package_is_typed_and_licensed() -> None:
    assert (ROOT / "slicer" / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_subpackages_outside_the_folder_import() -> None:
    import slicer.benchmarks
    import slicer.serve

    assert Path(str(slicer.serve.__file__)).parent.name == "serve"
    assert Path(str(slicer.benchmarks.__file__)).parent.name == "benchmarks"
