"""Writes the sliced checkpoint: kept tensors under new names, rewritten config, companion files.

Builds no model. Tensor bytes are copied unchanged; config.json keeps every field that does not refer to layers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from slicer.checkpoint import architectures, blockwise, rewrite, sublayers
from slicer.checkpoint.hub import COMPANIONS
from slicer.checkpoint.reader import BIN_INDEX, INDEX, Checkpoint, TensorSpan, inside
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES, Progress, write_tensors
from slicer.errors import ArchitectureError, OutputError, PlanError, SourceError
from slicer.plan.plan import Plan
from slicer.runtime.files import atomic_directory, check_space

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def expand_config(path: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """config.json as transformers reads it, with all defaults and per-layer lists.

    Raises SourceError with transformers' reason if it rejects the config.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
        return dict(config.to_dict())
    except Exception as error:  # config classes raise many kinds
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ArchitectureError(
                f"{path}: needs the checkpoint's own code; review it, then pass --trust-remote-code"
            ) from None
        raise SourceError(f"{path}/config.json: transformers rejects it: {reason[:300]}") from None


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise SourceError for a checkpoint whose weights are quantized."""
    for part in (checkpoint.config, architectures.text_config(checkpoint.config)):
        quantization = part.get("quantization_config")
        if quantization:
            method = (
                quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            )
            raise SourceError(
                f"{checkpoint.path}: quantized ({method}), but only float32, float16 and bfloat16 checkpoints "
                "are supported: slice the original and quantize the result"
            )


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


def sliced_config(
    checkpoint: Checkpoint, plan: Plan, *, dtype: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The new config.json. Raises ArchitectureError if its fields cannot express the cut."""
    if plan.depth != checkpoint.depth:
        raise PlanError(f"the plan is for {plan.depth} layers, but {checkpoint.path} has {checkpoint.depth}")
    config = kept_config(checkpoint, plan.kept, dtype=dtype, trust_remote_code=trust_remote_code)
    if not plan.below_layers:
        return config
    sublayers.check_there(checkpoint, plan.no_attention, plan.no_ffn)
    sublayers.check_joined(checkpoint, plan)
    if plan.form == "blockwise":
        expanded = expand_config(checkpoint.path, trust_remote_code=trust_remote_code)
        blockwise.check(checkpoint, expanded, plan)
        return blockwise.config_of(config, expanded, plan)
    if plan.form == "zeroed":
        sublayers.zeroed_keys(checkpoint, plan)
    elif plan.no_attention or plan.no_ffn:
        raise PlanError("the plan removes single sublayers; its form must be blockwise or zeroed")
    return config


def kept_config(
    checkpoint: Checkpoint,
    kept: Sequence[int],
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The config.json of the layers `kept` (possibly all). Raises ArchitectureError as `sliced_config`."""
    if rewrite.is_explicit(checkpoint.config):
        # transformers, whose import takes seconds, is not needed.
        config = rewrite.rewrite_config(checkpoint.config, checkpoint.config, kept)
    else:
        expanded = expand_config(checkpoint.path, trust_remote_code=trust_remote_code)
        config = rewrite.rewrite_config(checkpoint.config, expanded, kept)
        _check_expressed(checkpoint, expanded, config, kept, trust_remote_code)
    if dtype:
        for part in (config, architectures.text_config(config)):
            for name in ("dtype", "torch_dtype"):
                if name in part:
                    part[name] = dtype
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = dtype
    return config


def _check_expressed(
    checkpoint: Checkpoint,
    expanded: Mapping[str, Any],
    config: Mapping[str, Any],
    kept: Sequence[int],
    trust_remote_code: bool,
) -> None:
    """Let transformers read the new config and compare the kept layers' fields with the old ones."""
    with tempfile.TemporaryDirectory(prefix="slicer-config-") as scratch:
        if trust_remote_code:  # the config class may be the checkpoint's own code
            for file in checkpoint.path.glob("*.py"):
                shutil.copyfile(inside(checkpoint.path, file.name), Path(scratch) / file.name)
        (Path(scratch) / "config.json").write_text(json.dumps(config), "utf-8")
        try:
            again = expand_config(Path(scratch), trust_remote_code=trust_remote_code)
        except SourceError as error:
            reason = str(error).rsplit("refuses it: ", 1)[-1]
            raise ArchitectureError(f"transformers rejects the config of this cut: {reason}") from None
    rewrite.check_rewritten(expanded, again, kept)


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
