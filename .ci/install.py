"""Makes the virtual environment that the Makefile runs in: `python3 .ci/install.py --venv .venv --extras dev`.

Plain `pip install` of slicer's extras goes wrong in two ways that this script takes care of:

1. torch. On Linux the registry's torch is the CUDA build, gigabytes that a CPU machine has no use for. So
   torch goes in first: the CPU build where pip's own configuration offers one, else from PyTorch's CPU index.
2. The torchvision trap. vLLM's CPU build requires torchvision, torchaudio and torchcodec. A build of these
   made for another torch cannot be imported ("operator torchvision::nms does not exist"), and a torchvision
   that is there but broken makes every model class of transformers fail to import. Text models need none
   of them: whichever cannot be imported is removed. `pip check` then names it as missing; that is harmless.

Standard library only; runs on the interpreter the environment is made from.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TRAPPED = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="", help="comma-separated extras of slicer-llm")
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement that is installed first")
    arguments = parser.parse_args()

    started = time.monotonic()
    python = make_venv(arguments.venv)
    options = install_torch(python, arguments.torch)
    extras = f"[{arguments.extras}]" if arguments.extras else ""
    pip(python, "install", *options, "-e", f"{ROOT}{extras}")
    remove_broken(python)
    modules = ["transformers", *(["vllm"] if is_installed(python, "vllm") else [])]
    check_imports(python, modules)
    print(f"{arguments.venv} is ready after {time.monotonic() - started:.0f} s", flush=True)


def make_venv(path: Path) -> Path:
    """Creates the environment unless it is there; returns its interpreter."""
    python = path / "bin" / "python"
    if python.exists() and run(python, "-c", "import pip").returncode == 0:
        return python
    shutil.rmtree(path, ignore_errors=True)
    ways = [[sys.executable, "-m", "venv", str(path)]]
    if shutil.which("virtualenv"):
        ways.append(["virtualenv", "-q", "-p", sys.executable, str(path)])
    if shutil.which("uv"):
        ways.append(["uv", "venv", "-q", "--seed", "-p", sys.executable, str(path)])
    for way in ways:
        if subprocess.run(way, stdout=subprocess.DEVNULL).returncode == 0:
            return python
        shutil.rmtree(path, ignore_errors=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    sys.exit(
        f"cannot create {path}: {sys.executable} has no working venv module. "
        f"Install it (on Debian and Ubuntu: apt install python{version}-venv) and run make again."
    )


def install_torch(python: Path, requirement: str) -> list[str]:
    """Installs the CPU build of torch; returns the pip options that the rest of the installation needs.

    `requirement` without a version suffix ("torch==2.13.0") means: the CPU build of that version. One with
    a suffix or a URL is installed as it is.
    """
    plain = "==" in requirement and "+" not in requirement and "@" not in requirement
    if not plain or platform.system() != "Linux":  # elsewhere the registry's build is the CPU build
        pip(python, "install", requirement)
        return []
    print(f"pip install {requirement}+cpu", flush=True)
    if run(python, "-m", "pip", "install", f"{requirement}+cpu").returncode == 0:
        return []
    print(f"no CPU build of {requirement} in pip's configuration; trying {TORCH_CPU_INDEX}", flush=True)
    options = ["--extra-index-url", TORCH_CPU_INDEX]
    if run(python, "-m", "pip", "install", "--retries", "1", *options, f"{requirement}+cpu").returncode == 0:
        return options
    print("PyTorch's CPU index cannot be reached; installing the registry's build of torch", flush=True)
    pip(python, "install", requirement)
    return []


def remove_broken(python: Path) -> None:
    """Removes those of torch's companions that are installed and cannot be imported beside this torch."""
    broken = [name for name in TRAPPED if is_installed(python, name) and run(python, "-c", f"import {name}").returncode]
    if broken:
        print(f"removing {', '.join(broken)}: not importable beside this torch, not needed", flush=True)
        pip(python, "uninstall", "-q", "-y", *broken)


def check_imports(python: Path, modules: list[str]) -> None:
    """Exits with the traceback unless the modules, and a lazily imported model class, can be imported."""
    code = f"import {', '.join(modules)}; from transformers import LlamaForCausalLM"
    result = run(python, "-c", code)
    if result.returncode:
        sys.exit(f"{result.stderr}\nthe environment is not usable: `{code}` fails in it")


def is_installed(python: Path, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return run(python, "-c", code).returncode == 0


def pip(python: Path, *arguments: str) -> None:
    print("pip", *arguments, flush=True)
    # a person wants to see the downloads move; a log wants the errors only
    quiet = [] if sys.stdout.isatty() or "-q" in arguments else ["-q"]
    result = subprocess.run([python, "-m", "pip", arguments[0], *quiet, *arguments[1:]], cwd=ROOT)
    if result.returncode:
        sys.exit(f"pip {arguments[0]} failed (exit code {result.returncode}): see its message above")


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [python, *arguments], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )


if __name__ == "__main__":
    main()
