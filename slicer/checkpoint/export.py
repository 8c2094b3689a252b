"""Writes the sliced checkpoint: kept tensors under new names, rewritten config, companion files.

Builds no model. Tensor bytes are copied unchanged; config.json keeps every field that does not refer to layers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from slicer.checkpoint import sublayers
from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.hub import COMPANIONS
from slicer.checkpoint.reader import BIN_INDEX, INDEX, Checkpoint, inside
from slicer.checkpoint.tensors import DTYPES, TensorSpan
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES, Progress, write_tensors
from slicer.errors import OutputError
from slicer.plan.plan import Plan
from slicer.runtime.files import atomic_directory, check_space


def export(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write the checkpoint that keeps `plan.kept`, with its plan, atomically; returns `out`.

    Raises PlanError, ArchitectureError, SourceError or OutputError, and then leaves `out` unchanged.
    """
    check_output(out, checkpoint.path, force=force)
    config = sliced_config(checkpoint, plan, dtype=dtype, trust_remote_code=trust_remote_code)
    with atomic_directory(out, replace=force) as directory:
        write_checkpoint(checkpoint, plan, config, directory, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return out


def write_checkpoint(
    checkpoint: Checkpoint,
    plan: Plan,
    config: Mapping[str, Any],
    directory: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    replaced: Mapping[str, TensorSpan] | None = None,
    added: Mapping[str, TensorSpan] | None = None,
) -> None:
    """Fill the empty `directory`: weights, config.json, companion files and slicer/plan.json.

    `replaced`: raw source key -> tensor to write in its place; `added`: result key -> tensor that the source lacks.
    """
    tensors = {**sublayers.tensors_of(checkpoint.replacing(replaced or {}), plan), **(added or {})}
    cast = DTYPES[dtype] if dtype else None
    check_space(directory, sum(span.cast(cast)[1] for span in tensors.values()) + (1 << 20))
    copy_companions(checkpoint.path, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (directory / "slicer").mkdir()
    (directory / "slicer" / "plan.json").write_text(plan.to_json(), "utf-8")
    write_tensors(
        directory, tensors, checkpoint.metadata, cast=cast, max_shard_bytes=max_shard_bytes, progress=progress
    )


def copy_unchanged(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    replaced: Mapping[str, TensorSpan],
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Fill the empty `directory` with a copy of `checkpoint` and its slicer/, except for the tensors `replaced`."""
    tensors = checkpoint.replacing(replaced).tensors
    cast = DTYPES[dtype] if dtype else None
    check_space(directory, sum(span.cast(cast)[1] for span in tensors.values()) + (1 << 20))
    copy_companions(checkpoint.path, directory)
    shutil.copyfile(inside(checkpoint.path, "config.json"), directory / "config.json")
    for file in sorted((checkpoint.path / "slicer").glob("*")):
        if file.is_file() and inside(checkpoint.path, f"slicer/{file.name}"):
            (directory / "slicer").mkdir(exist_ok=True)
            shutil.copyfile(file, directory / "slicer" / file.name)
    write_tensors(
        directory, tensors, checkpoint.metadata, cast=cast, max_shard_bytes=max_shard_bytes, progress=progress
    )


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer, chat template, generation config, code and licence; not weights or the model card."""
    skipped = {"config.json", "README.md", INDEX, BIN_INDEX}
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        nested = len(relative.parts) > 1
        if any(
            part.startswith(".") or part in ("slicer", "__pycache__", "original") for part in relative.parts
        ):
            continue
        if relative.name in skipped or not any(fnmatch(relative.name, pattern) for pattern in COMPANIONS):
            continue
        if nested and file.suffix not in (".py", ".jinja", ".json"):
            continue
        if relative.name.endswith(".index.json") or not inside(source, relative.as_posix()).is_file():
            continue
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def check_output(out: Path, source: Path, *, force: bool = False) -> None:
    """Raise OutputError if `out` may not be written: occupied, not replaceable, or overlapping with `source`."""
    real, real_source = out.resolve(), source.resolve()
    if real == real_source or real.is_relative_to(real_source):
        raise OutputError(f"{out}: inside the source directory; choose another directory with -o")
    if real_source.is_relative_to(real):
        raise OutputError(f"{out}: contains the source directory; choose another directory with -o")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: not a directory; choose another one with -o")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise OutputError(
                f"{out}: not empty; choose another directory with -o, or replace it with --force"
            )
        if not (out / "config.json").is_file():
            raise OutputError(
                f"{out}: --force replaces only checkpoints, and this has no config.json; remove it yourself"
            )
