"""Opens a checkpoint on disk without reading tensors: config, index, and the byte range of every tensor.

Checks headers against file sizes, the index against the headers, and that every file is inside the directory. Standard
library only, except for `.bin` files, which need torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

from slicer.checkpoint import tensors
from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.tensors import DTYPE_BITS, TensorSpan
from slicer.errors import SourceError
from slicer.plan.plan import Plan

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory.

    Attributes:
        path: the directory.
        config: config.json, unchanged.
        tensors: raw key -> span, in the order of the bytes on disk.
        metadata: `__metadata__` of the first safetensors file.
        is_bin: whether the weights are pickled `.bin` files.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSpan]
    metadata: dict[str, str]
    is_bin: bool = False

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open and check a checkpoint directory, without reading tensors.

        Raises SourceError for anything but a complete, consistent checkpoint.
        """
        if not path.exists():
            raise SourceError(f"{path}: no such directory; pass a checkpoint directory or a Hub id like org/name")
        if not path.is_dir():
            raise SourceError(f"{path}: not a directory; pass the directory that contains config.json")
        config = read_config(path)
        known = (SINGLE, INDEX, BIN, BIN_INDEX)
        name = next((n for n in known if (path / n).exists() or (path / n).is_symlink()), None)
        is_bin = name in (BIN, BIN_INDEX)
        weight_map = _read_index(path, name) if name in (INDEX, BIN_INDEX) else {}
        files = sorted(set(weight_map.values())) or (_loose_files(path) if name is None else [name])
        if is_bin:
            by_file, metadata = {file: _bin_tensors(inside(path, file)) for file in files}, {"format": "pt"}
        else:
            headers = {file: read_header(inside(path, file)) for file in files}
            by_file = {file: spans for file, (spans, _) in headers.items()}
            metadata = next((found for _, found in headers.values() if found), {})
        found = _merge(path, by_file, weight_map)
        if not found:
            raise SourceError(f"{path}: no tensors in the weight files; fetch the checkpoint again")
        return cls(path, config, found, metadata, is_bin)

    @cached_property
    def architecture(self) -> architectures.Architecture:
        """The row of the table. Raises ArchitectureError for an unknown or refused model type."""
        return architectures.lookup(self.config)

    @cached_property
    def depth(self) -> int:
        """The number of decoder layers, L."""
        return architectures.depth(self.config)

    @cached_property
    def layer_prefix(self) -> str:
        """Prefix of the decoder layers' raw keys, such as "model.layers."."""
        return architectures.layer_prefix(self.architecture, self.tensors)

    @cached_property
    def layers(self) -> list[dict[str, TensorSpan]]:
        """For every decoder layer: name within the layer -> span."""
        layers: list[dict[str, TensorSpan]] = [{} for _ in range(self.depth)]
        pattern = re.compile(re.escape(self.layer_prefix) + r"(\d+)\.(.*)")
        for key, span in self.tensors.items():
            if (match := pattern.match(key)) and int(match[1]) < self.depth:
                layers[int(match[1])][match[2]] = span
        return layers

    @property
    def plan(self) -> Plan | None:
        """The plan, where slicer made the checkpoint. Raises PlanError for one that cannot be read."""
        return Plan.load(self.path) if (self.path / "slicer" / "plan.json").is_file() else None

    @property
    def total_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(span.nbytes for span in self.tensors.values())

    def bytes_as(self, dtype: str | None = None) -> int:
        """Bytes of all tensors once loaded as `dtype`, a torch name; None or "auto": as stored."""
        name = None if dtype in (None, "auto") else tensors.dtype_name(dtype)
        return sum(span.cast(name)[1] for span in self.tensors.values())

    @cached_property
    def identity(self) -> str:
        """A hash of the config and of where every tensor lies, with the files' dates: no byte of them is read."""
        changed = {span.file: span.file.stat().st_mtime_ns for span in self.tensors.values()}
        spans = self.tensors.items()
        places = [[key, s.file.name, s.dtype, s.shape, s.start, changed[s.file]] for key, s in spans]
        return hashlib.sha256(json.dumps([self.config, places], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(span.numel for span in self.tensors.values())

    def sliced(self, kept: Iterable[int]) -> dict[str, TensorSpan]:
        """New key -> old tensor, for the checkpoint that keeps the layers `kept`."""
        renamed = partial(architectures.slice_key, prefix=self.layer_prefix, kept=tuple(kept), depth=self.depth)
        return {new: span for key, span in self.tensors.items() if (new := renamed(key)) is not None}

    def replacing(self, spans: Mapping[str, TensorSpan]) -> Checkpoint:
        """This checkpoint with some tensors replaced. Raises SourceError for unknown keys or other shapes."""
        for key, span in spans.items():
            if key not in self.tensors or span.shape != self.tensors[key].shape:
                raise SourceError(f"{self.path}: no tensor {key} of shape {list(span.shape)} to replace")
        return replace(self, tensors={**self.tensors, **spans})

    def check_layers(self) -> None:
        """Raise SourceError unless there are tensors of all `depth` layers."""
        for i, layer in enumerate(self.layers):
            if not layer:
                raise SourceError(
                    f"{self.path}: config.json has {self.depth} layers, but there is no tensor named "
                    f"{self.layer_prefix}{i}.*; use a config and weights that belong together"
                )


def has_weights(path: Path) -> bool:
    """Whether the directory has weight files that `Checkpoint.open` can read."""
    return any((path / name).exists() for name in (SINGLE, INDEX, BIN, BIN_INDEX)) or any(path.glob("*.safetensors"))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the directory `path`. Raises SourceError."""
    if not (path / "config.json").exists():
        hint = "pass a transformers checkpoint directory"
        if (path / "adapter_config.json").exists():
            hint = "only adapter weights; merge the adapter first"
        raise SourceError(f"{path}: no config.json ({hint})")
    return _read_json(inside(path, "config.json"))


def inside(root: Path, name: str) -> Path:
    """`root/name`, if it is inside `root`; a Hub cache snapshot may link into its own `blobs/`.

    Raises SourceError for absolute names, `..`, and links to the outside.
    """
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise SourceError(
            f"{root}: refers to file {name!r} outside the directory, which is not allowed; fetch it again"
        )
    file, real_root = root / name, root.resolve()
    target, allowed = file.resolve(), [real_root]
    if real_root.parent.name == "snapshots":
        allowed.append(real_root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise SourceError(f"{file}: links to outside the directory, which is not allowed; copy the file there")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file}: cannot be read as JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise SourceError(f"{file}: not a JSON object; fetch the file again")
    return content


def _read_index(path: Path, name: str) -> dict[str, str]:
    weight_map = _read_json(inside(path, name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path / name}: no weight_map; fetch the file again")
    for key, file in weight_map.items():
        if not isinstance(file, str):
            raise SourceError(f"{path / name}: the file name of tensor {key} is not a string; fetch the index again")
        if not inside(path, file).is_file():
            raise SourceError(f"{path / name}: lists {file}, which is missing; fetch that shard")
    return weight_map


def _loose_files(path: Path) -> list[str]:
    """The safetensors files if there is no index: one file, or a complete numbered set."""
    names = sorted(p.name for p in path.glob("*.safetensors"))
    numbered = [m for n in names if (m := re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", n))]
    if numbered:
        stem, total = numbered[0][1], int(numbered[0][3])
        shards = {int(m[2]): m[0] for m in numbered if m[1] == stem and int(m[3]) == total}
        if missing := [i for i in range(1, total + 1) if i not in shards]:
            raise SourceError(f"{path}: shard {missing[0]} of {total} is missing; fetch it")
        return list(shards.values())
    if len(names) == 1:
        return names
    if names:
        raise SourceError(f"{path}: {len(names)} safetensors files but no {INDEX}; fetch the index")
    others = sorted(p.name for p in path.iterdir() if p.suffix in {".gguf", ".pth", ".pt", ".h5", ".msgpack", ".onnx"})
    found = f"; {others[0]} is not a supported format" if others else ""
    raise SourceError(f"{path}: no weights ({SINGLE}, {INDEX} or {BIN}){found}")


def read_header(file: Path) -> tuple[dict[str, TensorSpan], dict[str, str]]:
    """(tensors of one safetensors file in byte order, its `__metadata__`).

    Raises SourceError unless the header is complete and the tensors cover the data exactly.
    """
    damaged = "the file is damaged; fetch it again"
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(8)
            if len(head) < 8:
                raise SourceError(f"{file}: {size} bytes, too short for a safetensors header; {damaged}")
            (length,) = struct.unpack("<Q", head)
            if length > size - 8 or length > MAX_HEADER_BYTES:
                raise SourceError(f"{file}: the header should have {length} bytes, but the file has {size}; {damaged}")
            header = json.loads(stream.read(length))
    except (ValueError, RecursionError):
        raise SourceError(f"{file}: the safetensors header is not JSON; {damaged}") from None
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror}); check the file") from None
    if not isinstance(header, dict):
        raise SourceError(f"{file}: the safetensors header is not a JSON object; {damaged}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SourceError(f"{file}: __metadata__ must map strings to strings; {damaged}")
    spans = [(key, _span(file, key, entry, 8 + length)) for key, entry in header.items()]
    spans.sort(key=lambda item: (item[1].start, item[1].end))
    position = 8 + length
    for key, span in spans:
        if span.start != position:
            kind = "overlaps another tensor" if span.start < position else "leaves a gap before it"
            raise SourceError(f"{file}: tensor {key} {kind} (offset {span.start}); {damaged}")
        position = span.end
        if position > size:
            raise SourceError(f"{file}: truncated: tensor {key} ends at byte {position} of {size}; fetch it again")
    if position != size:
        raise SourceError(f"{file}: {size - position} bytes after the last tensor; {damaged}")
    return dict(spans), metadata


def _span(file: Path, key: str, entry: Any, data_start: int) -> TensorSpan:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not isinstance(dtype, str) or not all(type(i) is int and i >= 0 for i in (*shape, start, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise SourceError(f"{file}: the header entry of tensor {key} is malformed; fetch the file again") from None
    if dtype not in DTYPE_BITS:
        raise SourceError(f"{file}: tensor {key} has the unknown dtype {dtype!r}; update slicer")
    if math.prod(shape) * DTYPE_BITS[dtype] != (end - start) * 8:
        raise SourceError(
            f"{file}: tensor {key} of shape {list(shape)} and dtype {dtype} does not match its "
            f"{end - start} bytes; fetch the file again"
        )
    return TensorSpan(file, dtype, shape, data_start + start, data_start + end)


def _bin_tensors(file: Path) -> dict[str, TensorSpan]:
    return {
        key: TensorSpan(file, tensors.dtype_name(tensor.dtype), tuple(tensor.shape), 0, tensor.nbytes, key)
        for key, tensor in tensors.load(file).items()
    }


def _merge(path: Path, by_file: dict[str, dict[str, TensorSpan]], weight_map: dict[str, str]) -> dict[str, TensorSpan]:
    """Key -> span over all files; an index must agree with the files."""
    merged: dict[str, TensorSpan] = {}
    for name, spans in by_file.items():
        for key, span in spans.items():
            if weight_map.get(key, name) != name:
                continue
            if key in merged:
                raise SourceError(f"{path}: tensor {key} is in {merged[key].file.name} and in {name}; keep one")
            merged[key] = span
    for key, name in weight_map.items():
        if key not in merged:
            raise SourceError(f"{path}: the index lists tensor {key} in {name}, but it is not there; fetch both")
    return merged


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise SourceError for a checkpoint whose weights are quantized."""
    for part in (checkpoint.config, architectures.text_config(checkpoint.config)):
        if quantization := part.get("quantization_config"):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise SourceError(
                f"{checkpoint.path}: quantized ({method}), but only float32, float16 and bfloat16 checkpoints "
                "are supported: slice the original and quantize the result"
            )
