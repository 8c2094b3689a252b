"""The models of a depth sweep: existing checkpoints, or the shapes of cuts of a config.json.

A shape is a directory with the rewritten config.json and a tokenizer. The engines fill it with random weights, because
speed and memory do not depend on the values; no checkpoint is written or needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slicer.checkpoint import config as configs
from slicer.checkpoint import hub
from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.blockwise import MODEL_TYPE
from slicer.checkpoint.config import expand_config, sliced_config
from slicer.checkpoint.export import copy_companions
from slicer.checkpoint.reader import Checkpoint, has_weights, read_config, refuse_quantized
from slicer.checkpoint.sizes import measure_sizes
from slicer.errors import ArchitectureError, BenchError, SourceError, unreadable
from slicer.model.load import blueprint
from slicer.plan.amounts import Amount, Goal, parse_depths
from slicer.plan.choose import choose
from slicer.plan.plan import Plan

_STORED = {"float32": "F32", "float": "F32", "float16": "F16", "half": "F16", "bfloat16": "BF16"}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class Contestant:
    """One model of the sweep.

    Attributes:
        label: its name in tables.
        path: the directory that the engine opens.
        dummy: whether its weights are random.
        dropped: dropped source layers, if known.
        weight_bytes, kv_bytes_per_token, flops_per_token: from its tensor shapes, in the dtype served.
        read_bytes: bytes of weights that a token reads (without embedding lookups).
        fingerprint: hash of its config.json.
    """

    label: str
    path: str
    layers: int
    dummy: bool
    dropped: tuple[int, ...] | None
    weight_bytes: int
    checkpoint_bytes: int
    parameters: int
    kv_bytes_per_token: int
    flops_per_token: int
    read_bytes: int
    vocabulary: int
    context: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """For bench.json, without `path`, which may be temporary."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


def checkpoints(base: str, sliced: Sequence[str], dtype: str) -> list[Contestant]:
    """`base` and its cuts, with their own weights. Raises SourceError, or BenchError for cuts of another model."""
    opened = [(source, Checkpoint.open(hub.resolve(source).path)) for source in (base, *sliced)]
    first = architectures.text_config(opened[0][1].config)
    for source, checkpoint in opened:
        refuse_quantized(checkpoint)
        checkpoint.check_layers()
        config = architectures.text_config(checkpoint.config)
        if config.get("model_type") == MODEL_TYPE and (checkpoint.path / "slicer" / "plan.json").is_file():
            config = {**config, "model_type": Plan.load(checkpoint.path).model_type}  # of its source
        for name in ("model_type", "hidden_size", "vocab_size"):
            if config.get(name) != first.get(name):
                raise BenchError(f"{source}: not a cut of {base}: {name} is {config.get(name)}, not {first.get(name)}")
    labels = _distinct([_short(source) for source, _ in opened])
    return [_contestant(label, c, c.path, dtype, dummy=False) for label, (_, c) in zip(labels, opened, strict=True)]


def shapes(
    source: str | None, config: Path | None, drops: str | None, dtype: str, scratch: Path,
    *, trust_remote_code: bool = False,
) -> list[Contestant]:  # fmt: skip
    """Make a directory in `scratch` for every number of layers to drop (0: the whole model).

    `source` names a checkpoint of which only config.json and the tokenizer are needed; else `config` is a
    config.json. `drops` are counts or fractions (`parse_depths`); None takes 0, 1/6, 1/3 and 1/2 of the layers.
    """
    original = _original(source, config, scratch)
    whole = blueprint(original, trust_remote_code=trust_remote_code)
    if has_weights(original):
        whole = Checkpoint.open(original)
        refuse_quantized(whole)
        whole.check_layers()
    name = _short(source) if source is not None else _config_name(config or original)
    made, depth = [], whole.depth
    usual = sorted({0, round(depth / 6), round(depth / 3), depth // 2})
    for n in usual if drops is None else parse_depths(drops, depth):
        plan, rewritten = _cut(whole, n, trust_remote_code)
        directory = scratch / f"{name}-{depth - n}L"
        directory.mkdir()
        copy_companions(original, directory)
        (directory / "config.json").write_text(json.dumps(rewritten, indent=2), "utf-8")
        write_tokenizer(directory, _vocabulary(rewritten, directory))
        shape = Checkpoint(directory, rewritten, whole.sliced(plan.kept), {"format": "pt"}) if n else whole
        made.append(_contestant(directory.name, shape, directory, dtype, dummy=True, dropped=plan.dropped))
    return made


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """Write a tokenizer with `vocabulary` words if the directory has none: the engines need one."""
    if has_tokenizer(directory):
        return
    words = {f"w{i}": i for i in range(vocabulary)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    tokenizer = {"version": "1.0", **empty, "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
                 "decoder": None, "model": model}  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w1"}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory has a tokenizer."""
    return any((directory / name).exists() for name in _TOKENIZERS)


def _original(source: str | None, config: Path | None, scratch: Path) -> Path:
    """The directory with the unsliced config.json."""
    if source is not None:
        path = hub.resolve(source, weights=False).path
        read_config(path)
        return path
    assert config is not None
    file = config / "config.json" if config.is_dir() else config
    directory = scratch / "original"
    directory.mkdir()
    try:
        (directory / "config.json").write_text(file.read_text("utf-8"), "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: cannot be read ({unreadable(error)}); pass a config.json") from None
    try:
        read_config(directory)
    except SourceError:
        raise SourceError(f"{file}: not a JSON object; pass a config.json") from None
    return directory


def _cut(whole: Checkpoint, n: int, trust_remote_code: bool) -> tuple[Plan, dict[str, Any]]:
    """The deepest cut of n layers that config and vLLM can express; keeps the final layer if possible."""
    if n == 0:
        architectures.lookup(whole.config)
        return Plan(whole.depth, tuple(range(whole.depth))), dict(whole.config)

    def why_not(plan: Plan, *, strict: bool = True) -> str | None:
        try:
            rewritten = sliced_config(whole, plan, trust_remote_code=trust_remote_code)
        except ArchitectureError as error:
            return str(error)
        found = configs.warnings(whole.config, plan.kept, rewritten) if strict else ()
        return found[0] if found else None

    chosen = partial(choose, Goal(drop=Amount(count=n)), whole.depth, None, strategy="deepest_expressible")
    try:
        plan = chosen(why_not).plan
    except ArchitectureError:
        plan = chosen(partial(why_not, strict=False)).plan
    return plan, sliced_config(whole, plan, trust_remote_code=trust_remote_code)


def _contestant(
    label: str, checkpoint: Checkpoint, path: Path, dtype: str, *, dummy: bool, dropped: tuple[int, ...] | None = None
) -> Contestant:
    cast = _STORED.get(dtype)
    if cast is None:  # as stored; vLLM serves float32 as bfloat16
        stored = {span.dtype for span in checkpoint.tensors.values()}
        cast = "F16" if stored == {"F16"} else "BF16"
    served = measure_sizes(checkpoint, cast=cast)
    config = architectures.text_config(checkpoint.config)
    if dropped is None and (path / "slicer" / "plan.json").is_file():
        dropped = Plan.load(path).dropped
    text = json.dumps([checkpoint.config, checkpoint.total_bytes], sort_keys=True)
    return Contestant(
        label=label,
        path=str(path),
        layers=checkpoint.depth,
        dummy=dummy,
        dropped=dropped,
        weight_bytes=served.total_bytes,
        checkpoint_bytes=measure_sizes(checkpoint).total_bytes,
        parameters=served.parameters,
        kv_bytes_per_token=served.kv_bytes_per_token,
        flops_per_token=served.flops_per_token,
        read_bytes=served.flops_per_token // 2 * (4 if cast == "F32" else 2),
        vocabulary=_vocabulary(checkpoint.config, path),
        context=int(config.get("max_position_embeddings") or config.get("n_positions") or 2048),
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def _vocabulary(config: Mapping[str, Any], path: Path) -> int:
    size = architectures.text_config(config).get("vocab_size") or config.get("vocab_size")
    if size is None:  # use the default of the config class
        size = architectures.text_config(expand_config(path)).get("vocab_size")
    if not isinstance(size, int) or size < 16:
        raise SourceError(f"config.json: vocab_size must be a number of tokens of at least 16, not {size!r}")
    return size


def _short(source: str) -> str:
    name = str(Path(source).resolve()) if Path(source).exists() else source.rsplit("@", 1)[0]
    return Path(name).name or "model"


def _config_name(file: Path) -> str:
    """Name of a model: config.json takes its directory's name, llama-2-7b.json its own."""
    return file.resolve().parent.name if file.stem == "config" else file.resolve().stem


def _distinct(labels: Sequence[str]) -> list[str]:
    """Number repeated labels."""
    return [
        name if labels.count(name) == 1 else f"{name} ({labels[: at + 1].count(name)})"
        for at, name in enumerate(labels)
    ]
