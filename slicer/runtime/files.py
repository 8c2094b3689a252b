"""Files and directories that appear whole or not at all, disk space, and the fastest copy of the file system.

A range of a file is copied by sharing its blocks (a reflink) if the file system supports it; else by the
kernel (copy_file_range) into a file with reserved blocks; else through one small buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from slicer.errors import DiskFull, OutputError, SlicerError
from slicer.plan.amounts import spell_size

BLOCK = 4096  # file systems share blocks of this size, and only between equal offsets within one
_BUFFER = 1 << 16
_KERNEL_BYTES = 1 << 23  # of one call to the kernel: small enough to report progress and to be interrupted
_NO_KERNEL_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TORCH_CANNOT_WRITE = re.compile(r"PytorchStreamWriter failed writing|inline_container.* unexpected pos", re.DOTALL)


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`; what lies there becomes `file` when the block ends without an exception.

    A reader, or a process killed at any moment, leaves or sees the old content or the new one. Raises OutputError where
    the file cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(file)
    except Exception as error:
        if (reason := _system_error(error)) is None:
            raise
        raise not_writable(file, reason) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(file: Path, text: str) -> None:
    """Write `text`, whole or not at all. Raises OutputError."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, "utf-8")


@contextlib.contextmanager
def atomic_directory(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `out` and rename it to `out` when the block ends without an exception.

    After an exception nothing is left: neither the sibling nor the parent directories made for it. A sibling that was
    left by a killed process is removed by the next run. With `replace` an existing `out` is exchanged in one step.
    Raises OutputError if the place cannot be written.
    """
    parent = out.parent
    made = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, out.name)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.slicer-{os.getpid()}-", dir=parent))
    except OSError as error:
        remove_empty(made)
        raise not_writable(out, error) from None
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # else the renamed directory would keep mkdtemp's 0700
        yield temporary
        _put(temporary, out, replace)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
        denied = (*_DISK_FULL, errno.EACCES, errno.EROFS, errno.EPERM)
        if (reason := _system_error(error)) is not None and reason.errno in denied:
            raise _disk_full(error, out) or not_writable(out, reason) from None
        if isinstance(error, SlicerError):  # it may name a file in the sibling
            error.args = (str(error).replace(str(temporary), str(out)),)
        raise


def _system_error(error: BaseException) -> OSError | None:
    """The error of the system behind `error`: safetensors raises its own, with the number in the message; torch one
    without, where a disk is full."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else errno.ENOSPC if _TORCH_CANNOT_WRITE.search(str(error)) else None
    return None if number is None else OSError(number, os.strerror(number))


@contextlib.contextmanager
def within_disk(*places: Path) -> Iterator[None]:
    """A full disk inside the block, of one of `places` or of temporary files, is raised as DiskFull: libraries raise
    errors of their own."""
    try:
        yield
    except Exception as error:
        if (full := _disk_full(error, *places)) is None:
            raise
        raise full from None


def _disk_full(error: BaseException, *places: Path) -> DiskFull | None:
    """The error to raise if `error` means that a disk is full. Most such errors do not name a file: then it is the
    place with the least free space."""
    reason, temporary = _system_error(error), Path(tempfile.gettempdir())
    if reason is None or reason.errno not in _DISK_FULL:
        return None
    named = [Path(str(reason.filename))] if reason.filename else []
    place = min(named or [*places, temporary], key=_free)
    if place == temporary:
        return DiskFull(f"{place}: the disk is full; free some space or set TMPDIR to a directory on another disk")
    full = not_writable(place, reason)
    assert isinstance(full, DiskFull)
    return full


def _free(place: Path) -> int:
    """Bytes free on the disk of `place`, which need not be there yet."""
    return shutil.disk_usage(next(p for p in (place, *place.absolute().parents) if p.exists())).free


def not_writable(place: Path, error: OSError) -> OutputError:
    """The error to raise if `place` could not be written."""
    if error.errno in _DISK_FULL:
        return DiskFull(f"{place}: the disk is full; free some space or choose another place with -o")
    return OutputError(f"{place}: cannot be written ({error.strerror}); choose another place with -o")


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
    """Swap two directories in one step, if the system supports it (Linux renameat2); else return False."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove what a killed run for the same output left behind."""
    pattern = re.compile(rf"\.{re.escape(name)}\.slicer-(\d+)-\w+(-old)?")
    for entry in parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not match[2] and not _alive(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # it may be another user's
    return True


def remove_empty(directories: Iterable[Path]) -> None:
    """Remove those of `directories` that are empty, in order."""
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def check_space(place: Path, needed_bytes: int) -> None:
    """Raise DiskFull if the disk of `place` has less than `needed_bytes` free."""
    free = _free(place)
    if free < needed_bytes:
        raise DiskFull(
            f"{place}: needs {spell_size(needed_bytes, up=True)} but the disk has {spell_size(free)} free; free some "
            "space or choose another place with -o"
        )


def check_disk(needed: Mapping[Path, int]) -> None:
    """Raise DiskFull if a disk has too little free for all the bytes that are `needed` in directories on it.

    Unfinished work that a directory holds already counts; a checkpoint there does not, because the new one is written
    before it is removed.
    """
    by_disk: dict[int, dict[Path, int]] = {}
    for place, nbytes in needed.items():
        probe = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        continues = not (place / "config.json").is_file()
        held = sum(f.lstat().st_blocks * 512 for f in place.rglob("*") if f.is_file()) if continues else 0
        by_disk.setdefault(probe.stat().st_dev, {})[place] = max(0, nbytes - held)
    for places in by_disk.values():
        check_space(max(places, key=places.__getitem__), sum(places.values()))


def digest_of(files: Iterable[Path]) -> str | None:
    """A hash of the contents of `files` and of their names; None if there are none. Raises OutputError."""
    total = hashlib.sha256()
    names = sorted(set(files))
    for file in names:
        try:
            with open(file, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise OutputError(f"{file}: cannot be read ({error.strerror})") from None
        total.update(f"{file.name} {content}\n".encode())
    return total.hexdigest()[:16] if names else None


def link_or_copy(old: str | Path, new: str | Path) -> None:
    """Give the file `old` a second name, or copy it if the file system has no hard links."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def shares_blocks(source: Path, target: int, position: int) -> bool:
    """Whether the open file `target` can share blocks with `source` on this file system; tried on one block, which is
    written at the first block border from `position` on."""
    with open(source, "rb", buffering=0) as stream:
        return os.fstat(stream.fileno()).st_size >= BLOCK and _share(
            stream.fileno(), 0, target, -(-position // BLOCK) * BLOCK, BLOCK
        )


def reserve(target: int, length: int) -> None:
    """Allocate all blocks of the open file `target` at once: no fragments, a full disk found at the start, and writing
    takes half the time. Does nothing where the system or the file system cannot (Linux fallocate)."""
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return
    offset, size = ctypes.c_int64(0), ctypes.c_int64(length)
    if fallocate(target, 0, offset, size) and ctypes.get_errno() in _DISK_FULL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def copy_range(
    source: Path, start: int, end: int, target: int, position: int, *, shared: bool, progress: Callable[[int], None]
) -> int:
    """Copy `source[start:end]` to `position` in the open file `target`; returns the position behind it.

    Whole blocks are shared with the source where `shared`. `progress` is called with the bytes of every piece. Raises
    OSError, also where the source is shorter than `end`.
    """
    buffer = memoryview(bytearray(_BUFFER))
    with open(source, "rb", buffering=0) as stream:
        while start < end:
            size = end - start
            if shared and start % BLOCK == position % BLOCK:
                lead, whole = -start % BLOCK, size // BLOCK * BLOCK
                if lead:
                    size = min(size, lead)  # up to the block border
                elif whole and _share(stream.fileno(), start, target, position, whole):
                    start, position = start + whole, position + whole
                    progress(whole)
                    continue
            moved = _move(stream.fileno(), start, target, position, size, buffer)
            start, position = start + moved, position + moved
            progress(moved)
    return position


def _share(source: int, start: int, target: int, position: int, length: int) -> bool:
    """Share whole blocks between two files, or return False if that is not supported (Linux FICLONERANGE)."""
    ficlonerange = 0x4020940D
    try:
        fcntl.ioctl(target, ficlonerange, struct.pack("=qQQQ", source, start, length, position))
    except OSError as error:
        if error.errno in (*_DISK_FULL, errno.EIO):
            raise
        return False
    return True


def _move(source: int, start: int, target: int, position: int, size: int, buffer: memoryview) -> int:
    """Copy up to `size` bytes, in the kernel if possible, else through `buffer`; returns the number copied."""
    try:
        moved = os.copy_file_range(source, target, min(size, _KERNEL_BYTES), start, position)
    except (OSError, AttributeError) as error:  # another system, or two file systems
        if isinstance(error, OSError) and error.errno not in _NO_KERNEL_COPY:
            raise
        size = min(size, len(buffer) - position % len(buffer))  # pieces that fill whole pages
        moved = os.pwrite(target, buffer[: os.preadv(source, [buffer[:size]], start)], position)
    if not moved:
        raise OSError(errno.EIO, "the source file became shorter while it was copied")
    return moved
