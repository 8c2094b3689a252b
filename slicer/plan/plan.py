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
SUBLAYER_FORMAT = 2  # of plans that go below the layer: slicers that know only 1 must not misread them
FORMS = ("native", "blockwise", "zeroed")
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
        merged: the adapters that were merged in, one after another, and into which tensors.
        no_attention: kept layers without their attention; no_ffn: layers whose feed-forward part is gone. Both number
            the sublayers by the layer of the source they come from.
        joined: (i, j) for each half-offset cut: the kept layer i runs its own attention and the feed-forward part of
            the layer j, i < j; all between the two is gone.
        form: how missing sublayers are written: "native" (none is missing), "blockwise" or "zeroed".
        emulated: what stands for the removed parts: method, rank, data, losses before and after.
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
    merged: tuple[Mapping[str, Any], ...] = ()
    no_attention: tuple[int, ...] = ()
    no_ffn: tuple[int, ...] = ()
    joined: tuple[tuple[int, int], ...] = ()
    form: str = "native"
    emulated: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("kept", "runners_up", "no_attention", "no_ffn"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "joined", tuple((i, j) for i, j in self.joined))
        merged = self.merged or ()  # once a single record, or null
        object.__setattr__(self, "merged", (merged,) if isinstance(merged, Mapping) else tuple(merged))
        if list(self.kept) != sorted(set(self.kept)) or any(not 0 <= i < self.depth for i in self.kept):
            raise PlanError(
                f"the plan keeps {list(self.kept)}, which is no ascending choice of {self.depth} layers"
            )
        if not self.kept:
            raise PlanError(f"the plan drops all {self.depth} layers; keep at least one")
        if len(self.kept) == self.depth and not self.no_attention and not self.no_ffn:
            raise PlanError(f"the plan drops nothing: all {self.depth} layers stay; drop at least one")
        self._check_sublayers()

    def _check_sublayers(self) -> None:
        if self.form not in FORMS:
            raise PlanError(f"the plan's form {self.form!r} is unknown; it must be one of {', '.join(FORMS)}")
        stay = set(self.kept)
        for i, j in self.joined:
            if i not in stay or not i < j < self.depth or stay.intersection(range(i + 1, j + 1)):
                raise PlanError(
                    f"the plan joins attention {i} with feed-forward {j}, but a half-offset cut keeps layer {i} "
                    f"and drops all of {i + 1}-{j}"
                )
        for what, gone, there in (
            ("attention", self.no_attention, [i for i, _ in self.parts]),
            ("feed-forward part", self.no_ffn, [j for _, j in self.parts]),
        ):
            if list(gone) != sorted(set(gone)):
                raise PlanError(f"the plan drops the {what} of a layer twice: {list(gone)}; name each once")
            if strange := [i for i in gone if i not in there]:
                raise PlanError(
                    f"the {what} of layer {strange[0]} goes twice: its layer is dropped too; name it once"
                    if strange[0] < self.depth
                    else f"layer {strange[0]} is not in the model, whose layers are 0-{self.depth - 1}"
                )
        if both := [i for i, j in self.parts if i in self.no_attention and j in self.no_ffn]:
            raise PlanError(
                f"the plan keeps layer {both[0]} without attention and feed-forward part; drop the layer instead"
            )

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """For every layer of the result: (layer of the source its attention is from, that of its feed-forward part)."""
        other = dict(self.joined)
        return tuple((i, other.get(i, i)) for i in self.kept)

    @property
    def size_name(self) -> str:
        """ "20L", and what is left of attention and feed-forward parts where some are missing: "24L-16A"."""
        layers = len(self.kept)
        attention = f"-{layers - len(self.no_attention)}A" if self.no_attention else ""
        return f"{layers}L{attention}" + (f"-{layers - len(self.no_ffn)}F" if self.no_ffn else "")

    @property
    def below_layers(self) -> bool:
        """Whether this plan says more than which layers stay."""
        return bool(self.no_attention or self.no_ffn or self.joined or self.form != "native" or self.emulated)

    @property
    def half_offset(self) -> tuple[int, int, float] | None:
        """(i, j, distance) where all that goes is one measured block, from after attention i to after attention j."""
        if len(self.joined) != 1 or self.distance is None:
            return None
        (i, j), *_ = self.joined
        return (i, j, self.distance) if len(self.dropped) == j - i else None

    @property
    def ordinary(self) -> bool:
        """Whether every layer of the result has both parts, whole or joined, and nothing stands for what is gone."""
        return self.form == "native" and not (self.no_attention or self.no_ffn or self.emulated)

    @property
    def gone(self) -> tuple[frozenset[int], frozenset[int]]:
        """(attention, feed-forward parts) of the source that the result lacks, those of dropped layers included."""
        attention = {i for i, _ in self.parts if i not in self.no_attention}
        ffn = {j for _, j in self.parts if j not in self.no_ffn}
        every = range(self.depth)
        return frozenset(set(every) - attention), frozenset(set(every) - ffn)

    @classmethod
    def cutting(
        cls,
        depth: int,
        layers: Iterable[int] = (),
        attention: Iterable[int] = (),
        ffn: Iterable[int] = (),
        **provenance: Any,
    ) -> Plan:
        """The plan that drops whole `layers`, the attention of some and the feed-forward part of some (source indices).

        A layer that would lose both parts is dropped. Raises PlanError for a sublayer named twice.
        """
        whole, attention, ffn = set(layers), set(attention), set(ffn)
        for i in sorted(whole | attention | ffn):
            if not 0 <= i < depth:
                raise PlanError(f"layer {i} is not in the model, whose layers are 0-{depth - 1}")
        for what, named in (("attention", attention), ("feed-forward part", ffn)):
            if twice := sorted(whole & named):
                raise PlanError(
                    f"the {what} of layer {twice[0]} goes twice: its layer is dropped too; name it once"
                )
        whole |= attention & ffn
        return cls(
            depth,
            tuple(i for i in range(depth) if i not in whole),
            no_attention=tuple(sorted(attention - whole)),
            no_ffn=tuple(sorted(ffn - whole)),
            **provenance,
        )

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
        version = SUBLAYER_FORMAT if self.below_layers else FORMAT
        record = {"format": version, **asdict(self), "kept": list(self.kept), "dropped": list(self.dropped)}
        record["runners_up"] = list(self.runners_up)
        record["merged"] = list(self.merged) or None
        if not self.below_layers:  # the same bytes as ever
            for name in _BELOW:
                del record[name]
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
        if record.get("format", FORMAT) not in (FORMAT, SUBLAYER_FORMAT):
            raise PlanError(
                f"{where}: plan format {record['format']!r} is not {FORMAT} or {SUBLAYER_FORMAT}; use the slicer that "
                "wrote it"
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
        for name in ("no_attention", "no_ffn"):
            given = record.get(name, [])
            if not isinstance(given, list) or not all(map(_is_count, given)):
                raise PlanError(f"{where}: {name!r} must be a list of layer indices")
        if not _are_pairs(record.get("joined", [])):
            raise PlanError(f"{where}: 'joined' must be a list of pairs of layer indices")
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


def _are_pairs(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) for pair in value
    )


_BELOW = ("no_attention", "no_ffn", "joined", "form", "emulated")


@dataclass(frozen=True)
class Amount:
    """How much to drop: exactly one of a fraction of the depth, a count of layers, or named layers.

    Of attention or feed-forward parts there are as many as layers, and all of them may go.
    """

    fraction: float | None = None
    count: int | None = None
    layers: tuple[int, ...] | None = None

    def resolve(self, depth: int) -> int:
        """n, the number of layers to drop of `depth`. Raises PlanError when that is nothing or everything."""
        if self.layers is not None:
            return len(Plan.dropping(depth, self.layers).dropped)
        n = self._number(depth, "layers")
        if n >= depth:
            raise PlanError(f"dropping {n} of {depth} layers leaves none; drop at most {depth - 1}")
        return n

    def resolve_parts(self, depth: int, what: str) -> int:
        """n, the number to drop of `depth` parts, called `what`. Raises PlanError for nothing or more than all."""
        n = len(self.layers) if self.layers is not None else self._number(depth, what)
        if n > depth:
            raise PlanError(f"dropping {n} of {depth} {what}: there are not so many; drop at most {depth}")
        return n

    def _number(self, depth: int, what: str) -> int:
        n = self.count if self.count is not None else round((self.fraction or 0.0) * depth)
        if n == 0:
            raise PlanError(
                f"a fraction of {self.fraction:g} of {depth} {what} rounds to none; "
                f"the least that drops one is {math.ceil(1000 * 0.51 / depth) / 1000:g}"
            )
        return n


def parse_amount(text: str, option: str = "--drop") -> Amount:
    """Read `0.4` (a fraction), `8` (a count), `24-31` (a block, inclusive) or `3,7,9-12` (a list).

    Raises UsageError for what no model could satisfy.
    """
    text = text.strip()
    forms = "a fraction like 0.4, a count like 8, a block like 24-31 or a list like 3,7,9-12"
    if re.fullmatch(r"[+-]?\d+", text):
        count = int(text)
        if count < 1:
            raise UsageError(f"{option} {text}: drop at least one ({forms})")
        return Amount(count=count)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?|[+-]?\d+[eE][+-]?\d+", text):
        fraction = float(text)
        if not 0 < fraction < 1:
            raise UsageError(f"{option} {text}: a fraction must lie between 0 and 1, both excluded ({forms})")
        return Amount(fraction=fraction)
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UsageError(f"{option} {text}: {part.strip()!r} is not understood; give {forms}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(
                f"{option} {text}: the block {part.strip()} ends before it starts; write {last}-{first}"
            )
        if last > 100_000:
            raise UsageError(f"{option} {text}: no model has a layer {last}")
        if layers.intersection(range(first, last + 1)):
            raise UsageError(f"{option} {text}: {part.strip()} names a layer twice")
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


def spell_dropped(plan: Plan) -> str:
    """What a plan drops, in words: "layers 10-13", "attention of layers 3, 7"."""
    joined = dict(plan.joined)
    whole = set(plan.dropped) - {k for i, j in joined.items() for k in range(i + 1, j + 1)}
    words = [f"from after attention {i} to after attention {j} (half-offset)" for i, j in plan.joined]
    if whole:
        words.append(f"layer{'s' if len(whole) > 1 else ''} {spell_layers(whole)}")
    for what, gone in (("attention", plan.no_attention), ("feed-forward part", plan.no_ffn)):
        if gone:
            words.append(f"{what} of layer{'s' if len(gone) > 1 else ''} {spell_layers(gone)}")
    return "; ".join(words)
