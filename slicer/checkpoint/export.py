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
from slicer.checkpoint.reader import Checkpoint, inside
from slicer.checkpoint.tensors import DTYPES, TensorSpan
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES, Progress, write_tensors
from slicer.errors import OutputError
from slicer.plan.plan import Plan
from slicer.runtime.files import check_space

if TYPE_CHECKING:
    import torch

_NOTHING: Mapping[str, TensorSpan] = MappingProxyType({})

FORECAST = "forecast.json"  # in slicer/: of the run that wrote a checkpoint, and of no other


@dataclass(frozen=True)
class Contents:
    """What will be in a checkpoint directory.

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

    Raises OutputError if the space does not suffice.
    """
    check_space(directory, contents.total_bytes + (1 << 20))
    copy_companions(contents.origin, directory)
    text = json.dumps(contents.config, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, "utf-8")
    for file in sorted((contents.origin / "slicer").glob("*")) if contents.continues else ():
        if file.name != FORECAST and inside(contents.origin, f"slicer/{file.name}").is_file():
            (directory / "slicer").mkdir(exist_ok=True)
            shutil.copyfile(file, directory / "slicer" / file.name)
    tensors, metadata, cast = contents.tensors, contents.metadata, contents.cast
    write_tensors(directory, tensors, metadata, cast=cast, max_shard_bytes=max_shard_bytes, progress=progress)


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer, chat template, generation config, code and licence; not weights or the model card."""
    skipped = ("config.json", "README.md", "*.index.json")
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        if any(part.startswith(".") or part in ("slicer", "__pycache__", "original") for part in relative.parts):
            continue
        wanted, unwanted = (any(fnmatch(file.name, p) for p in patterns) for patterns in (COMPANIONS, skipped))
        if unwanted or not wanted or (len(relative.parts) > 1 and file.suffix not in (".py", ".jinja", ".json")):
            continue
        if inside(source, relative.as_posix()).is_file():
            (directory / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, directory / relative)


def output_name(source: str, size: str) -> str:
    """The name of a result if none is given: "Llama-2-7b-hf-24L" of org/Llama-2-7b-hf@main and "24L"."""
    name = source.rsplit("@", 1)[0] if not Path(source).exists() else str(Path(source).resolve())
    return f"{Path(name).name or 'model'}-{size}"


def check_output(out: Path, source: Path, *, overwrite: bool = False) -> None:
    """Raise OutputError if `out` may not be written: occupied, not replaceable, or overlapping with `source`."""
    real, real_source = out.resolve(), source.resolve()
    if real.is_relative_to(real_source):
        raise OutputError(f"{out}: inside the source directory; choose another directory with -o")
    if real_source.is_relative_to(real):
        raise OutputError(f"{out}: contains the source directory; choose another directory with -o")
    check_replaceable(out, "checkpoints", "config.json", overwrite=overwrite, name=str(out), by=" with -o")


def check_replaceable(place: Path, kind: str, file: str, *, overwrite: bool, name: str, by: str = "") -> None:
    """Raise OutputError if `place` is no directory, or is full and may not be replaced: without `overwrite`, or where
    it lacks the `file` that all of the `kind` have. `name`: of the place; `by`: how to choose another."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise OutputError(f"{name}: not a directory; choose another one{by}")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise OutputError(f"{name}: not empty; choose another directory{by}, or replace it with --overwrite")
        if not (place / file).is_file():
            raise OutputError(f"{name}: --overwrite replaces only {kind}, and this has no {file}; remove it yourself")
