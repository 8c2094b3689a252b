"""For all tests: offline unless a test asks for the Hub, one thread a process, and the markers' conditions.

gpu     runs where there is a CUDA device
hub     runs with SLICER_TEST_HUB=1 (it talks to the real Hugging Face Hub)
large   runs with SLICER_TEST_MODELS=DIRECTORY, the directory that holds real models
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import ForkServer

if os.environ.get("SLICER_TEST_HUB") != "1":
    # Before huggingface_hub is imported anywhere: a test that reaches for the network fails at once.
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only costs
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

pytest_plugins = ("demo_fixtures", "device_fixtures", "task_fixtures")  # of several folders

gc.set_threshold(50_000, 20, 20)  # the default takes a fifth of the time of importing torch and transformers


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
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))  # its fixtures are made once


@pytest.fixture(scope="session")
def models() -> Path:
    """Directory of real models, for tests marked `large`."""
    return Path(os.environ["SLICER_TEST_MODELS"])


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts slicer's command in processes of its own."""
    server = ForkServer(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def own_tasks_read_once() -> Iterator[None]:
    """lm-eval reads the 14,000 files of its own tasks once, and not for each of its task managers."""
    manager = pytest.importorskip("lm_eval.tasks.manager")
    index: Any = manager.TaskIndex
    root = Path(manager.__file__).parent
    own: dict[str, Any] = {}

    class ReadOnce(index):  # type: ignore[misc]
        @staticmethod
        def build(paths: Any, **given: Any) -> dict[str, Any]:
            if root in paths and not own:
                own.update(index.build([root], **given))
            more = index.build([path for path in paths if path != root], **given)
            return {**(own if root in paths else {}), **more}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "TaskIndex", ReadOnce)
        yield
