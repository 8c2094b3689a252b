"""What a checkpoint directory holds (`Contents`), and writing it: tensors, config, companion files.

Builds no model. Tensor bytes are copied unchanged; config.json keeps every field that does not refer to layers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from slicer.checkpoint import sublayers
from slicer.checkpoint.hub import COMPANIONS
from slicer.checkpoint.reader import BIN_INDEX, INDEX, Checkpoint, inside
from slicer.checkpoint.tensors import DTYPES, TensorSpan
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES, Progress, write_tensors
from slicer.errors import OutputError
from slicer.plan.plan import Plan
from slicer.runtime.files import check_space

if TYPE_CHECKING:
    import torch

_NOTHING: Mapping[str, TensorSpan] = MappingProxyType({})


@dataclass(frozen=True)
class Contents:
    """What a checkpoint directory is to hold.

    Attributes:
        tensors: key -> tensor, in the order in which they are written.
        config: of config.json.
        origin: directory whose companion files (tokenizer, code, licence) are copied.
        metadata: of the safetensors files.
        changed: key -> maker of the tensor that must be there bit for bit, of those that are in memory.
        cast: safetensors dtype that floating-point tensors are written in; None: as they are.
        continues: whether `origin` is a cut that is changed again: the files of its slicer/ are copied too.
    """

    tensors: Mapping[str, TensorSpan]
    config: Mapping[str, object]
    origin: Path
    metadata: Mapping[str, str]
    changed: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    cast: str | None = None
    continues: bool = False

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as they are written."""
        return sum(span.cast(self.cast)[1] for span in self.tensors.values())


def sliced(
    checkpoint: Checkpoint,
    plan: Plan,
    config: Mapping[str, object],
    replaced: Mapping[str, TensorSpan] = _NOTHING,
    added: Mapping[str, TensorSpan] = _NOTHING,
) -> Contents:
    """The cut of `plan` from the source `checkpoint`, written in the dtype of the plan.

    `config`: its config.json (`slicer.checkpoint.config.sliced_config`). `replaced`: raw key of the source -> tensor in
    its place; `added`: key of the result -> tensor that the source lacks. Raises SourceError for a replaced tensor of
    another shape.
    """
    tensors = {**sublayers.tensors_of(checkpoint.replacing(replaced), plan), **added}
    names = sublayers.names_of(checkpoint, plan)
    repaired = {**{new: replaced[key] for key, new in names.items() if key in replaced}, **added}
    changed = {key: span.make for key, span in repaired.items() if span.make is not None}
    cast = DTYPES[plan.dtype] if plan.dtype else None
    return Contents(tensors, config, checkpoint.path, checkpoint.metadata, changed, cast)


def unchanged(checkpoint: Checkpoint, replaced: Mapping[str, TensorSpan] = _NOTHING) -> Contents:
    """`checkpoint` itself, with its slicer/, but for the tensors `replaced` (by raw key)."""
    tensors = checkpoint.replacing(replaced).tensors
    return Contents(tensors, checkpoint.config, checkpoint.path, checkpoint.metadata, continues=True)


def write(
    contents: Contents, directory: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, progress: Progress | None = None
) -> None:
    """Fill the empty `directory` with weights, config.json and companion files. `progress` gets the bytes of pieces.

    Raises OutputError where the space does not suffice.
    """
    check_space(directory, contents.total_bytes + (1 << 20))
    copy_companions(contents.origin, directory)
    text = json.dumps(contents.config, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, "utf-8")
    for file in sorted((contents.origin / "slicer").glob("*")) if contents.continues else ():
        if inside(contents.origin, f"slicer/{file.name}").is_file():
            (directory / "slicer").mkdir(exist_ok=True)
            shutil.copyfile(file, directory / "slicer" / file.name)
    write_tensors(
        directory,
        contents.tensors,
        contents.metadata,
        cast=contents.cast,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer, chat template, generation config, code and licence; not weights or the model card."""
    skipped = {"config.json", "README.md", INDEX, BIN_INDEX}
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        nested = len(relative.parts) > 1
        if any(part.startswith(".") or part in ("slicer", "__pycache__", "original") for part in relative.parts):
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


def check_output(out: Path, source: Path, *, overwrite: bool = False) -> None:
    """Raise OutputError if `out` may not be written: occupied, not replaceable, or overlapping with `source`."""
    real, real_source = out.resolve(), source.resolve()
    if real == real_source or real.is_relative_to(real_source):
        raise OutputError(f"{out}: inside the source directory; choose another directory with -o")
    if real_source.is_relative_to(real):
        raise OutputError(f"{out}: contains the source directory; choose another directory with -o")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: not a directory; choose another one with -o")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise OutputError(f"{out}: not empty; choose another directory with -o, or replace it with --overwrite")
        if not (out / "config.json").is_file():
            raise OutputError(
                f"{out}: --overwrite replaces only checkpoints, and this has no config.json; remove it yourself"
            )
