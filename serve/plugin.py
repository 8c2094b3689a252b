"""slicer's plugin for vLLM (entry point `vllm.general_plugins`), loaded in each of vLLM's processes.

Importing it registers the configuration of the blockwise form (see `slicer`), which vLLM's own DeciLMForCausalLM then
runs; the plugin adds the class for checkpoints in which low-rank maps replace removed sublayers.
"""

from __future__ import annotations

from slicer.checkpoint.blockwise import OWN_CLASS


def register() -> None:
    """Register the blockwise form in this process. May be called more than once."""
    from vllm import ModelRegistry

    if OWN_CLASS not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(OWN_CLASS, f"slicer.serve.blockwise:{OWN_CLASS}")
