"""The precision that a fold computes in: a CPU without matrix instructions for 16-bit numbers is faster in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from slicer.checkpoint.verify import available_memory

_SHARE = 1 / 3  # of the free memory that a copy of the model in float32 may take


def float32_is_faster(device: torch.device) -> bool:
    """Whether this is a CPU without AMX."""
    return device.type == "cpu" and not torch.cpu._is_amx_tile_supported()


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[bool]:
    """Inside the block a loaded 16-bit `model` computes in float32, where that is faster and a copy has room.

    Afterwards its parameters are the very tensors that they were.
    """
    halves = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    wanted = bool(halves) and all(float32_is_faster(p.device) for p in model.parameters())
    if not wanted or sum(4 * p.numel() for p in halves) > _SHARE * available_memory():
        yield False
        return
    before = [p.data for p in halves]
    try:
        for parameter in halves:
            parameter.data = parameter.data.float()
        yield True
    finally:
        for parameter, data in zip(halves, before, strict=True):
            parameter.data = data
