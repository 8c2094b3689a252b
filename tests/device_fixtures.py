"""Fixtures of the tests that need pretended CUDA devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fake_device import FakeCuda


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """Two devices of a gigabyte."""
    from fake_device import fake_cuda  # compiles a library

    with fake_cuda(devices=2, memory=1e9) as fake:
        yield fake
