"""Serves checkpoints with vLLM's OpenAI-compatible server (installed as `slicer.serve`).

    from slicer.serve import Server

    with Server("qwen-20L") as server:
        print(server.base_url)        # http://127.0.0.1:41873/v1

Importing this loads neither torch nor vLLM.
"""

from __future__ import annotations

from slicer.serve.server import Server as Server

__all__ = ["Server"]
