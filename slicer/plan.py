"""What to drop: the grammar of amounts, and the Plan that every later stage follows.

Pure standard library. A Plan is made by `slicer.select` or read from a file, and is all that `export` needs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

from slicer.errors import PlanError, UsageError

FORMAT = 1
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Plan:
    """Which layers stay, and where that choice came from.

    Attributes:
        depth: layers in the source.
        kept: indices of the layers that stay, ascending, in the source's numbering.
        strategy: "similarity", "deepest", "tail" or "explicit".
        source: the Hub id or directory as the user gave it.
        revision: the Hub commit, if any.
        distance: what the metric says of the dropped block (or the sum over several), where it was measured.
        metric: None for the angular distance (units of pi) of last tokens; else a metric of `slicer analyze`.
        calibration: what the distances were measured on.
        parent: the plan of the source, when the source was itself sliced.
        healing: how the cut was healed: method, data, what was solved, losses before and after.
    """

    depth: int
    kept: tuple[int, ...]
    strategy: str = "explicit"
    source: str | None = None
    revision: str | None = None
    model_type: str | None = None
    distance: float | None = None
    metric: str | None = None
    runners_up: tuple[dict[str, Any], ...] = ()
    calibration: Mapping[str, Any] | None = None
    seed: int | None = None
    dtype: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    parent: Mapping[str, Any] | None = None
    healing: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", tuple(self.kept))
        object.__setattr__(self, "runners_up", tuple(self.runners_up))
        if list(self.kept) != sorted(set(self.kept)) or any(not 0 <= i < self.depth for i in self.kept):
            raise PlanError(
                f"the plan keeps {list(self.kept)}, which is no ascending choice of {self.depth} layers"
            )
        if not self.kept:
            raise PlanError(f"the plan drops all {self.depth} layers; keep at least one")
        if len(self.kept) == self.depth:
            raise PlanError(f"the plan drops nothing: all {self.depth} layers stay; drop at least one")

    @classmethod
    def dropping(cls, depth: int, dropped: Iterable[int], **provenance: Any) -> Plan:
        """The plan that drops `dropped` (source indices) of `depth` layers."""
        gone = set(dropped)
        outside = sorted(i for i in gone if not 0 <= i < depth)
        if outside:
            raise PlanError(f"layer {outside[0]} is not in the model, whose layers are 0-{depth - 1}")
        return cls(depth, tuple(i for i in range(depth) if i not in gone), **provenance)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Source indices of the layers that go, ascending."""
        stay = set(self.kept)
        return tuple(i for i in range(self.depth) if i not in stay)

    def to_json(self) -> str:
        """The plan as JSON, the same bytes for the same plan."""
        record = {"format": FORMAT, **asdict(self), "kept": list(self.kept), "dropped": list(self.dropped)}
        record["runners_up"] = list(self.runners_up)
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Read what `to_json` wrote. Raises PlanError naming `where` and the field at fault."""
        try:
            record = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{where}: not JSON ({error}); give a plan.json that slicer wrote") from None
        if not isinstance(record, dict):
            raise PlanError(f"{where}: not a JSON object; give a plan.json that slicer wrote")
        if record.get("format", FORMAT) != FORMAT:
            raise PlanError(
                f"{where}: plan format {record['format']!r} is not {FORMAT}; use the slicer that wrote it"
            )
        depth, kept = record.get("depth"), record.get("kept")
        if not _is_count(depth):
            raise PlanError(f"{where}: 'depth' must be a whole number of layers, not {depth!r}")
        if (
            kept is None
            and isinstance(record.get("dropped"), list)
            and all(map(_is_count, record["dropped"]))
        ):
            kept = [i for i in range(depth) if i not in set(record["dropped"])]
        if not isinstance(kept, list) or not all(map(_is_count, kept)):
            raise PlanError(f"{where}: 'kept' must be a list of layer indices")
        names = {f.name for f in fields(cls)} - {"depth", "kept"}
        try:
            return cls(depth, tuple(kept), **{k: v for k, v in record.items() if k in names})
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from None
        except TypeError as error:
            raise PlanError(
                f"{where}: a field has the wrong type ({error}); give a plan.json slicer wrote"
            ) from None

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file, or the plan of a sliced checkpoint directory."""
        file = path / "slicer" / "plan.json" if path.is_dir() else path
        try:
            return cls.from_json(file.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise PlanError(
                f"{path}: cannot read the plan ({reason}); give a plan.json that slicer wrote"
            ) from None


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Amount:
    """How much to drop: exactly one of a fraction of the depth, a count of layers, or named layers."""

    fraction: float | None = None
    count: int | None = None
    layers: tuple[int, ...] | None = None

    def resolve(self, depth: int) -> int:
        """n, the number of layers to drop of `depth`. Raises PlanError when that is nothing or everything."""
        if self.layers is not None:
            return len(Plan.dropping(depth, self.layers).dropped)
        n = self.count if self.count is not None else round((self.fraction or 0.0) * depth)
        if n == 0:
            raise PlanError(
                f"a fraction of {self.fraction:g} of {depth} layers rounds to none; "
                f"the least that drops one is {math.ceil(1000 * 0.51 / depth) / 1000:g}"
            )
        if n >= depth:
            raise PlanError(f"dropping {n} of {depth} layers leaves none; drop at most {depth - 1}")
        return n


def parse_amount(text: str) -> Amount:
    """Read `0.4` (a fraction), `8` (a count), `24-31` (a block, inclusive) or `3,7,9-12` (a list).

    Raises UsageError for what no model could satisfy.
    """
    text = text.strip()
    forms = "a fraction like 0.4, a count like 8, a block like 24-31 or a list like 3,7,9-12"
    if re.fullmatch(r"[+-]?\d+", text):
        count = int(text)
        if count < 1:
            raise UsageError(f"--drop {text}: drop at least one layer ({forms})")
        return Amount(count=count)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?|[+-]?\d+[eE][+-]?\d+", text):
        fraction = float(text)
        if not 0 < fraction < 1:
            raise UsageError(f"--drop {text}: a fraction must lie between 0 and 1, both excluded ({forms})")
        return Amount(fraction=fraction)
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UsageError(f"--drop {text}: {part.strip()!r} is not understood; give {forms}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(
                f"--drop {text}: the block {part.strip()} ends before it starts; write {last}-{first}"
            )
        if last > 100_000:
            raise UsageError(f"--drop {text}: no model has a layer {last}")
        if layers.intersection(range(first, last + 1)):
            raise UsageError(f"--drop {text}: {part.strip()} names a layer twice")
        layers.update(range(first, last + 1))
    return Amount(layers=tuple(sorted(layers)))


def parse_size(text: str, option: str) -> int:
    """Read `5B`, `16GB`, `1.5GiB`, `800M` or a plain number into units or bytes. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]I|[KMGBT]?)B?", text.strip().upper())
    if match is None:
        raise UsageError(f"{option} {text}: not a size; write for example 5B, 800M, 16GB or 1.5GiB")
    size = int(float(match[1]) * (_BINARY.get(match[2]) or _UNITS[match[2]]))
    if size < 1:
        raise UsageError(f"{option} {text}: must be more than zero")
    return size


def spell_layers(layers: Iterable[int]) -> str:
    """`3, 7, 9-12` for (3, 7, 9, 10, 11, 12): the grammar of `--drop`, spaced for reading."""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
