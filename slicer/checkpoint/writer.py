"""Writing: whole directories that appear at once, and shards that are copied, not loaded.

Neighbours on disk are copied as one run: their blocks are shared (a reflink) where the file system can, else the
kernel copies them (copy_file_range) into a file whose blocks were reserved; where it cannot do that either, they go
through one small buffer. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from slicer.checkpoint.reader import INDEX, SINGLE, TensorSpan
from slicer.errors import OutputError

DEFAULT_SHARD_BYTES = 5 * 10**9
_BLOCK = 4096  # file systems share blocks of this size, and only between equal offsets within one
_BUFFER = 1 << 16
_KERNEL_BYTES = (
    1 << 23
)  # copied in one call to the kernel: small enough to tell of progress and to be stopped
_NO_KERNEL_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
Progress = Callable[[int], None]


@contextlib.contextmanager
def atomic_directory(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `out` and rename it to `out` when the block ends without an exception.

    On any exception nothing is left: not the sibling, not the parents made for it. A sibling that a killed
    process left is removed by the next run. With `replace` an existing `out` is exchanged in one step.
    Raises OutputError when the place cannot be written.
    """
    parent = out.parent
    made = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, out.name)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.slicer-{os.getpid()}-", dir=parent))
    except OSError as error:
        _remove_empty(made)
        raise OutputError(
            f"{out}: cannot be created ({error.strerror}); choose another place with -o"
        ) from None
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's 0700 would outlive the rename
        yield temporary
        _put(temporary, out, replace)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{out}: the disk is full; free some space or choose another place with -o"
            ) from None
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(
                f"{out}: cannot be written ({error.strerror}); choose another place with -o"
            ) from None
        raise


def _put(temporary: Path, out: Path, replace: bool) -> None:
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if not out.exists():
        temporary.rename(out)
        return
    if not replace:
        raise OutputError(f"{out}: appeared meanwhile and is not empty; choose another place with -o")
    if not _exchange(temporary, out):
        old = temporary.with_name(temporary.name + "-old")
        out.rename(old)
        temporary.rename(out)
        temporary = old
    shutil.rmtree(temporary)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step where the system can (Linux renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


def _sweep(parent: Path, name: str) -> None:
    """Remove what a killed run for the same output left behind."""
    pattern = re.compile(rf"\.{re.escape(name)}\.slicer-(\d+)-\w+(-old)?")
    for entry in parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not match[2] and not _alive(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def check_space(place: Path, needed_bytes: int) -> None:
    """Raise OutputError when `needed_bytes` will not fit on the disk that holds `place`."""
    probe = next(p for p in (place, *place.parents) if p.exists())
    free = shutil.disk_usage(probe).free
    if free < needed_bytes:
        raise OutputError(
            f"{place}: needs {needed_bytes / 1e9:.2f} GB but the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another place with -o"
        )


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
    cast to `cast` (a safetensors dtype) where one is given. `progress` is told the bytes of every piece written.
    Returns the shard files.
    """
    shards = plan_shards(tensors, max_shard_bytes, cast)
    total = len(shards)
    names = (
        [SINGLE] if total == 1 else [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        _write_shard(
            directory / name, shard, {"format": "pt", **metadata}, cast, progress or (lambda _: None)
        )
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
    file: Path,
    shard: Mapping[str, TensorSpan],
    metadata: Mapping[str, str],
    cast: str | None,
    progress: Progress,
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
        encoded += b" " * ((first.start - 8 - len(encoded)) % _BLOCK)
    with open(file, "wb", buffering=0) as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        position = 8 + len(encoded)
        shared = first.key is None and _shares_blocks(first.file, out.fileno(), position)
        if not shared:
            _reserve(out.fileno(), position + offset)
        buffer = memoryview(bytearray(_BUFFER))
        for first, end in _runs(shard, cast):
            if first.key is not None or first.cast(cast)[0] != first.dtype:
                position = _write_through_torch(first, first.cast(cast)[0], out.fileno(), position, progress)
                continue
            with open(first.file, "rb", buffering=0) as stream:
                copied = (stream.fileno(), first.start, out.fileno(), position, end - first.start)
                _copy(*copied, buffer, shared, progress)
            position += end - first.start


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


def _shares_blocks(source: Path, target: int, position: int) -> bool:
    """Whether the file system can let `target` share blocks with `source` (a reflink); tried on one block."""
    with open(source, "rb", buffering=0) as stream:
        return os.fstat(stream.fileno()).st_size >= _BLOCK and _share(
            stream.fileno(), 0, target, -(-position // _BLOCK) * _BLOCK, _BLOCK
        )


def _share(source: int, start: int, target: int, position: int, length: int) -> bool:
    """Share whole blocks between two files, or return False where that cannot be (Linux FICLONERANGE)."""
    ficlonerange = 0x4020940D
    try:
        fcntl.ioctl(target, ficlonerange, struct.pack("=qQQQ", source, start, length, position))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False
    return True


def _reserve(target: int, length: int) -> None:
    """Have the blocks of the whole file allocated at once: no fragments, a full disk found out at the start, and
    writing takes half the time. Left out where the system or file system cannot (Linux fallocate)."""
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return
    offset, size = ctypes.c_int64(0), ctypes.c_int64(length)
    if fallocate(target, 0, offset, size) and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _copy(
    source: int,
    start: int,
    target: int,
    position: int,
    length: int,
    buffer: memoryview,
    shared: bool,
    progress: Progress,
) -> None:
    """Copy source[start:start+length] to `position` in `target`, sharing the whole blocks where `shared`."""
    end = start + length
    while start < end:
        size = end - start
        if shared and start % _BLOCK == position % _BLOCK:
            lead, whole = -start % _BLOCK, size // _BLOCK * _BLOCK
            if lead:
                size = min(size, lead)  # up to the block border
            elif whole and _share(source, start, target, position, whole):
                start, position = start + whole, position + whole
                progress(whole)
                continue
        moved = _move(source, start, target, position, size, buffer)
        start, position = start + moved, position + moved
        progress(moved)


def _move(source: int, start: int, target: int, position: int, size: int, buffer: memoryview) -> int:
    """Copy up to `size` bytes, in the kernel where it can, else through `buffer`; returns how many."""
    try:
        moved = os.copy_file_range(source, target, min(size, _KERNEL_BYTES), start, position)
    except (
        OSError,
        AttributeError,
    ) as error:  # another system, or two file systems that do not know each other
        if isinstance(error, OSError) and error.errno not in _NO_KERNEL_COPY:
            raise
        size = min(size, len(buffer) - position % len(buffer))  # pieces that fill whole pages
        moved = os.pwrite(target, buffer[: os.preadv(source, [buffer[:size]], start)], position)
    if not moved:
        raise OSError(errno.EIO, "the source file became shorter while it was copied")
    return moved


def _write_through_torch(span: TensorSpan, dtype: str, target: int, position: int, progress: Progress) -> int:
    """Write the tensor as `dtype` at `position`; returns where it ends."""
    from slicer.checkpoint import tensors

    for block in tensors.chunks(span, dtype):
        written = 0
        while written < len(block):
            written += os.pwrite(target, block[written:], position + written)
        position += written
        progress(written)
    return position
