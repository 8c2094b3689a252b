"""slicer's plugin for vLLM (entry point `vllm.general_plugins`), loaded in each of vLLM's processes.

Registers the config of the blockwise form, which vLLM's own DeciLMForCausalLM runs, and the class for checkpoints with
low-rank replacements of removed sublayers.
"""

from __future__ import annotations

from slicer.checkpoint.blockwise import OWN_CLASS


def register() -> None:
    """Register the blockwise form in this process. May be called more than once."""
    from vllm import ModelRegistry

    from slicer.checkpoint.registration import register

    register()
    if OWN_CLASS not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(OWN_CLASS, f"slicer.serve.blockwise:{OWN_CLASS}")
