"""Safetensors shards that are copied, not loaded: neighbours on disk as one run. Standard library only."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from slicer.checkpoint.reader import INDEX, SINGLE
from slicer.checkpoint.tensors import TensorSpan, chunks
from slicer.runtime.files import BLOCK, copy_range, reserve, shares_blocks

DEFAULT_SHARD_BYTES = 5 * 10**9
Progress = Callable[[int], None]


def plan_shards(
    tensors: Mapping[str, TensorSpan], max_shard_bytes: int, cast: str | None = None
) -> list[dict[str, TensorSpan]]:
    """Fill shards in order; a tensor larger than a shard gets one of its own."""
    shards: list[dict[str, TensorSpan]] = [{}]
    filled = 0
    for key, span in tensors.items():
        _, nbytes = span.cast(cast)
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = span
        filled += nbytes
    return shards


def write_tensors(
    directory: Path,
    tensors: Mapping[str, TensorSpan],
    metadata: Mapping[str, str],
    *,
    cast: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Copy `tensors` (new key -> span of the source) into safetensors shards in `directory`.

    One shard is `model.safetensors`; several come with `model.safetensors.index.json`. Floating-point tensors are
    cast to `cast` (a safetensors dtype) where one is given. `progress` gets the bytes of every piece written.
    Returns the shard files.
    """
    shards = plan_shards(tensors, max_shard_bytes, cast)
    total = len(shards)
    names = [SINGLE] if total == 1 else [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard, {"format": "pt", **metadata}, cast, progress or (lambda _: None))
    if total > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        sizes = {
            "total_parameters": sum(span.numel for span in tensors.values()),
            "total_size": sum(span.cast(cast)[1] for span in tensors.values()),
        }
        index = {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return [directory / name for name in names]


def _write_shard(
    file: Path, shard: Mapping[str, TensorSpan], metadata: Mapping[str, str], cast: str | None, progress: Progress
) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, span in shard.items():
        dtype, nbytes = span.cast(cast)
        header[key] = {"dtype": dtype, "shape": list(span.shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    first = next(iter(shard.values()))
    # The header is padded so that the first tensor keeps its place within a block, and blocks can be shared.
    encoded += b" " * (-(8 + len(encoded)) % 8)
    if first.key is None and first.start % 8 == 0:
        encoded += b" " * ((first.start - 8 - len(encoded)) % BLOCK)
    with open(file, "wb", buffering=0) as out:
        target, position = out.fileno(), 8 + len(encoded)
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        shared = first.key is None and shares_blocks(first.file, target, position)
        if not shared:
            reserve(target, position + offset)
        for first, end in _runs(shard, cast):
            dtype = first.cast(cast)[0]
            if first.key is not None or dtype != first.dtype:
                position = _write_through_torch(first, dtype, target, position, progress)
            else:
                place = (first.file, first.start, end, target, position)
                position = copy_range(*place, shared=shared, progress=progress)


def _runs(shard: Mapping[str, TensorSpan], cast: str | None) -> Iterator[tuple[TensorSpan, int]]:
    """(first span, end offset) of the pieces of a shard: neighbours that are copied as they are become one."""
    current: tuple[TensorSpan, int] | None = None
    for span in shard.values():
        plain = span.key is None and span.cast(cast)[0] == span.dtype
        if current and plain and (current[0].file, current[1]) == (span.file, span.start):
            current = (current[0], span.end)
            continue
        if current:
            yield current
        current = (span, span.end if plain else -1)
    if current:
        yield current


def _write_through_torch(span: TensorSpan, dtype: str, target: int, position: int, progress: Progress) -> int:
    """Write the tensor as `dtype` at `position`; returns where it ends."""
    for block in chunks(span, dtype):
        written = 0
        while written < len(block):
            written += os.pwrite(target, block[written:], position + written)
        position += written
        progress(written)
    return position
