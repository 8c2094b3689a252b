"""slicer's plugin for vLLM, by the entry point `vllm.general_plugins`: vLLM loads it in each of its processes.

It makes the configuration of the blockwise form known, which vLLM's own DeciLMForCausalLM then runs, and the class for
checkpoints in which low-rank maps stand for removed parts.
"""

from __future__ import annotations

from slicer.checkpoint.blockwise import OWN_CLASS


def register() -> None:
    """Make the blockwise form known to this process. May be called more than once."""
    from vllm import ModelRegistry

    from slicer.checkpoint.registration import register

    register()
    if OWN_CLASS not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(OWN_CLASS, f"slicer.serve.blockwise:{OWN_CLASS}")
