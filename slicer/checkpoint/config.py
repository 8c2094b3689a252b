"""Rewrites config.json for fewer layers: depth and per-layer fields, by the table of architectures, with checks.

Standard library only: the caller passes in how transformers reads a config.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from slicer.checkpoint import blockwise, sublayers
from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.architectures.rules import Fields, check_length, positions
from slicer.checkpoint.architectures.table import DEPTH_NAMES, Architecture, depth, lookup, text_config
from slicer.checkpoint.reader import Checkpoint, inside
from slicer.errors import ArchitectureError, PlanError, SourceError, reason_of
from slicer.plan.plan import Plan

_ALIASES = {"layer_types": "layers_block_type", "layers_block_type": "layer_types"}
_MTP_NAMES = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# Lists that never have one entry per layer, even if their length equals the depth.
_NOT_PER_LAYER = {
    *("architectures", "attention_types", "block_types", "mlp_only_layers", "moe_layers"),
    *("mtp_layers_block_type", "mtp_layer_types", "time_step_limit"),
}
_BY_LAYER_KEYS = ("per_layer_config", "pruned_heads")


def rewrite_config(config: Mapping[str, Any], expanded: Mapping[str, Any], kept: Sequence[int]) -> Fields:
    """The config.json of the sliced checkpoint.

    `config` is the raw one, `expanded` how transformers reads it (`AutoConfig(...).to_dict()`), `kept` the layers that
    stay. Rewrites depth and per-layer fields and writes out implied per-layer lists; all other fields keep their value
    and their order. Raises ArchitectureError for a field that cannot express the cut or does not match the depth.
    """
    row, old_depth = lookup(config), depth(config)
    new: Fields = copy.deepcopy(dict(config))
    part, old = text_config(new), text_config(expanded)
    read = _expanded_depth(row, old)
    if read is not None and read != old_depth:
        raise ArchitectureError(
            f"config.json: transformers reads {read} layers, but {row.depth_field} is {old_depth}; correct the config"
        )
    for where in (new, part):
        for name in DEPTH_NAMES:
            if where.get(name) == old_depth:
                where[name] = len(kept)
        for name in _MTP_NAMES:
            if where.get(name):
                where[name] = 0
    if row.depth_field in DEPTH_NAMES:
        part.setdefault(row.depth_field, len(kept))
    if row.mtp and not any(name in part for name in _MTP_NAMES):
        part["num_nextn_predict_layers"] = 0
    _slice_lists(part, old, row, kept, old_depth)
    given = {name: part[name] if part.get(name) is not None else old.get(name) for name in row.reindexes + row.counts}
    for name, value in given.items():
        if value is not None:
            part[name] = positions(value, kept) if name in row.reindexes else bisect_left(kept, value)
    for name in _BY_LAYER_KEYS:
        if isinstance(part.get(name), dict):
            by_layer = {int(i): value for i, value in part[name].items()}
            part[name] = {str(at): by_layer[i] for at, i in enumerate(kept) if i in by_layer}
    if row.rule:
        row.rule(part, old, kept, old_depth)
    return new


def is_explicit(config: Mapping[str, Any]) -> bool:
    """Whether the raw config has an explicit depth and no other per-layer field.

    Then transformers' defaults are not needed, and `rewrite_config(config, config, kept)` is enough.
    """
    row = lookup(config)
    rewritten = row.slices or row.reindexes or row.counts or row.rule or row.mtp or row.text_config
    lists = [k for k, v in config.items() if isinstance(v, list) and k != "architectures" and "token" not in k]
    return not rewritten and row.depth_field in config and not lists and "per_layer_config" not in config


def check_rewritten(expanded: Mapping[str, Any], again: Mapping[str, Any], kept: Sequence[int]) -> None:
    """Compare how transformers reads the rewritten config (`again`) with how it read the old one.

    Raises ArchitectureError for a field that changes a kept layer, for example if a config class overrides its file.
    """
    row, old, new = lookup(expanded), text_config(expanded), text_config(again)
    old_depth, new_depth = _expanded_depth(row, old), _expanded_depth(row, new)
    if new_depth != len(kept) and new_depth is not None:
        raise ArchitectureError(f"{row.depth_field}: transformers reads {new_depth} layers, but {len(kept)} were kept")
    for name in _per_layer(old, row, old_depth or 0):
        if list(new.get(name) or ()) != [old[name][i] for i in kept]:
            raise ArchitectureError(
                f"{name}: transformers would read {new.get(name)} for the kept layers; choose another cut"
            )


def warnings(config: Mapping[str, Any], kept: Sequence[int], rewritten: Mapping[str, Any]) -> list[str]:
    """Warnings about sliced checkpoints that load but do not work everywhere, with what to choose instead.

    `config`: raw config.json of the source; `rewritten`: the result of `rewrite_config`.
    """
    row, found = lookup(config), []
    if not _attends(text_config(rewritten)):
        # transformers counts the cached tokens in an attention layer
        found.append(
            "no attention layer is kept, and transformers cannot generate with a cache from such a hybrid: "
            "keep at least one attention layer"
        )
    if row.note and (note := row.note(text_config(config), kept, depth(config))):
        found.append(note)
    return found


def _attends(part: Mapping[str, Any]) -> bool:
    """Whether a hybrid has an attention layer; True for models that are no hybrids."""
    if isinstance(part.get("attn_layer_indices"), list):
        return bool(part["attn_layer_indices"])
    fields = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    kinds = next((part[name] for name in fields if part.get(name)), ["*"])
    return any(kind == "*" or ("attention" in kind and kind != "linear_attention") for kind in kinds)


def _expanded_depth(row: Architecture, old: Mapping[str, Any]) -> int | None:
    value = old.get(row.depth_field)
    return len(value) if isinstance(value, list) else value


def _slice_lists(part: Fields, old: Mapping[str, Any], row: Architecture, kept: Sequence[int], depth: int) -> None:
    for name in row.slices:
        names = [n for n in (name, _ALIASES.get(name, name)) if part.get(n)]
        for given in names:
            check_length(given, part[given], depth)
        implied = old.get(name) or old.get(_ALIASES.get(name, name))
        if not names and implied and not isinstance(part.get("hybrid_override_pattern"), str):
            check_length(name, implied, depth)
            part[name] = list(implied)
    for name in _per_layer(part, row, depth):
        part[name] = [part[name][i] for i in kept]


def _per_layer(config: Mapping[str, Any], row: Architecture, depth: int) -> list[str]:
    """Fields with one entry per layer: those in the table, and any other list of that length."""
    other = {*_NOT_PER_LAYER, *row.reindexes}
    return [
        name
        for name, value in config.items()
        if isinstance(value, list | tuple) and len(value) == depth and name not in other and "token" not in name
    ]


def expand_config(path: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """config.json as transformers reads it, with all defaults and per-layer lists.

    Raises SourceError with transformers' reason if it rejects the config.
    """
    return copy.deepcopy(_expanded(path, (path / "config.json").read_bytes(), trust_remote_code))


@lru_cache(maxsize=4)  # asked of every cut that is tried
def _expanded(path: Path, content: bytes, trust_remote_code: bool) -> dict[str, Any]:
    """config.json of `path` as transformers reads it. `content` is the file's: where it changes, it is read again."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
        return dict(config.to_dict())
    except Exception as error:  # config classes raise many kinds
        if "trust_remote_code" in str(error):
            raise ArchitectureError(
                f"{path}: needs the checkpoint's own code; review it, then pass --trust-remote-code"
            ) from None
        raise SourceError(f"{path}/config.json: transformers rejects it: {reason_of(error)}") from None


def why_not(checkpoint: Checkpoint, plan: Plan, *, trust_remote_code: bool = False) -> str | None:
    """The reason why config.json cannot express the cut of `plan`; None if it can. Raises as `sliced_config`."""
    try:
        sliced_config(checkpoint, plan, trust_remote_code=trust_remote_code)
    except ArchitectureError as error:
        return str(error)
    return None


def sliced_config(
    checkpoint: Checkpoint, plan: Plan, *, dtype: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The new config.json. Raises ArchitectureError if its fields cannot express the cut."""
    if plan.depth != checkpoint.depth:
        raise PlanError(f"the plan is for {plan.depth} layers, but {checkpoint.path} has {checkpoint.depth}")
    config = kept_config(checkpoint, plan.kept, dtype=dtype, trust_remote_code=trust_remote_code)
    if not plan.below_layers:
        return config
    sublayers.check_there(checkpoint, plan)
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
    checkpoint: Checkpoint, kept: Sequence[int], *, dtype: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The config.json of the layers `kept` (possibly all). Raises ArchitectureError as `sliced_config`."""
    if is_explicit(checkpoint.config):
        # transformers, whose import takes seconds, is not needed.
        config = rewrite_config(checkpoint.config, checkpoint.config, kept)
    else:
        expanded = expand_config(checkpoint.path, trust_remote_code=trust_remote_code)
        config = rewrite_config(checkpoint.config, expanded, kept)
        check_rewritten(expanded, _read_again(checkpoint, config, trust_remote_code), kept)
    if dtype:
        for part in (config, architectures.text_config(config)):
            for name in ("dtype", "torch_dtype"):
                if name in part:
                    part[name] = dtype
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = dtype
    return config


def _read_again(checkpoint: Checkpoint, config: Fields, trust_remote_code: bool) -> dict[str, Any]:
    """The new config.json as transformers reads it. Raises ArchitectureError if it rejects it."""
    with tempfile.TemporaryDirectory(prefix="slicer-config-") as scratch:
        if trust_remote_code:  # the config class may be the checkpoint's own code
            for file in checkpoint.path.glob("*.py"):
                shutil.copyfile(inside(checkpoint.path, file.name), Path(scratch) / file.name)
        (Path(scratch) / "config.json").write_text(json.dumps(config), "utf-8")
        try:
            return expand_config(Path(scratch), trust_remote_code=trust_remote_code)
        except SourceError as error:
            reason = str(error).rsplit("rejects it: ", 1)[-1]
            raise ArchitectureError(f"transformers rejects the config of this cut: {reason}") from None
