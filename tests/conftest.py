"""For all tests: offline unless a test asks for the Hub, one thread a process, and the markers' conditions.

gpu     runs where there is a CUDA device
hub     runs with SLICER_TEST_HUB=1 (it talks to the real Hugging Face Hub)
large   runs with SLICER_TEST_MODELS=DIRECTORY, the directory that holds real models
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if os.environ.get("SLICER_TEST_HUB") != "1":
    # Before huggingface_hub is imported anywhere: a test that reaches for the network fails at once.
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only costs
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def why_skipped(item: pytest.Item) -> str | None:
    """Why the machine cannot run a marked test, or None if it can."""
    if item.get_closest_marker("hub") and os.environ.get("SLICER_TEST_HUB") != "1":
        return "talks to the Hugging Face Hub: set SLICER_TEST_HUB=1"
    if item.get_closest_marker("large") and not os.environ.get("SLICER_TEST_MODELS"):
        return "needs real models: set SLICER_TEST_MODELS to the directory that holds them"
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA device"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := why_skipped(item):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def models() -> Path:
    """Directory of real models, for tests marked `large`."""
    return Path(os.environ["SLICER_TEST_MODELS"])
