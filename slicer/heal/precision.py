"""The precision that a fold computes in.

A 16-bit model's gradients and losses are too coarse for the small steps of a fold; see docs/experiments/healing.md.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from slicer.runtime import memory


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[bool]:
    """Inside the block a loaded 16-bit `model` computes in float32, where there is memory for a copy of it.

    Afterwards its parameters are the very tensors that they were.
    """
    halves = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    needed: Counter[torch.device] = Counter()
    for parameter in halves:
        needed[parameter.device] += 4 * parameter.numel()
    if not halves or any(
        device.type == "meta" or size > memory.COPY_SHARE * memory.free(device)
        for device, size in needed.items()
    ):
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
