"""The Plan: which layers and sublayers of a source stay, why, and what was done to the cut. plan.json in and out.

Pure standard library. A Plan is made by `slicer.plan.choose` or read from a file, and is all that writing needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from slicer.errors import ArchitectureError, PlanError, unreadable
from slicer.plan.amounts import check_layers, spell_layers
from slicer.plan.records import HealingRecord, MemoryRecord, MergeRecord, Record, RunnerUp, TextRecord, plain

FORMAT = 3  # 1 (whole layers) and 2 (below the layer) are read as well
FORMS = ("native", "blockwise", "zeroed")
METRIC = "angular_last_token"  # what cuts are chosen by, unless another metric is named


@dataclass(frozen=True)
class Plan(Record):
    """Which layers stay, where that choice came from, and what was done to the cut.

    Attributes:
        depth: layers in the source.
        kept: indices of the layers that stay, ascending, in the source's numbering.
        no_attention: kept layers without attention; no_ffn: kept layers without feed-forward. Both give the layer of
            the source that the sublayer belongs to.
        joined: (i, j) for each half-offset cut: the kept layer i runs its own attention and the feed-forward of layer
            j, i < j; all sublayers between the two are dropped.
        form: how missing sublayers are written: "native" (none is missing), "blockwise" or "zeroed".
        strategy: "similarity", "deepest", "tail", "random" or "explicit".
        distance: of what is dropped, by `metric` (summed over several blocks or sublayers), if it was measured.
        metric: a metric of `slicer analyze`; None in older plans: the angular distance (units of pi) of last tokens.
        calibration: the text that the distances were measured on.
        source: the Hub id or directory as the user gave it; revision: the Hub commit, if any.
        parent: the plan of the source, when the source was itself sliced.
        healing: how the cut was repaired; None: it was not.
        merged: the adapters that were merged in, one after another.
        memory: the budgets with which the source was run; a replay uses them too. None: it was not run.
    """

    depth: int
    kept: tuple[int, ...]
    strategy: str = "explicit"
    source: str | None = None
    revision: str | None = None
    model_type: str | None = None
    distance: float | None = None
    metric: str | None = None
    runners_up: tuple[RunnerUp, ...] = ()
    calibration: TextRecord | None = None
    seed: int | None = None
    dtype: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    parent: Plan | None = None
    healing: HealingRecord | None = None
    merged: tuple[MergeRecord, ...] = ()
    no_attention: tuple[int, ...] = ()
    no_ffn: tuple[int, ...] = ()
    joined: tuple[tuple[int, int], ...] = ()
    form: str = "native"
    memory: MemoryRecord | None = None

    def __post_init__(self) -> None:
        if list(self.kept) != sorted(set(self.kept)) or any(not 0 <= i < self.depth for i in self.kept):
            raise PlanError(f"the plan keeps {list(self.kept)}, which is no ascending choice of {self.depth} layers")
        if not self.kept:
            raise PlanError(f"the plan drops all {self.depth} layers; keep at least one")
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
            ("attention", self.no_attention, [i for i, _ in self.sublayers]),
            ("feed-forward", self.no_ffn, [j for _, j in self.sublayers]),
        ):
            if list(gone) != sorted(set(gone)):
                raise PlanError(f"the plan drops the {what} of a layer twice: {list(gone)}; name each once")
            if strange := [i for i in gone if i not in there]:
                raise PlanError(
                    f"the {what} of layer {strange[0]} is dropped twice: its layer is dropped too; name it once"
                    if strange[0] < self.depth
                    else f"layer {strange[0]} is not in the model, whose layers are 0-{self.depth - 1}"
                )
        if both := [i for i, j in self.sublayers if i in self.no_attention and j in self.no_ffn]:
            raise PlanError(
                f"the plan keeps layer {both[0]} without attention and without feed-forward; drop the layer instead"
            )

    @property
    def sublayers(self) -> tuple[tuple[int, int], ...]:
        """For every layer of the result: (source layer of its attention, source layer of its feed-forward)."""
        other = dict(self.joined)
        return tuple((i, other.get(i, i)) for i in self.kept)

    @property
    def size_name(self) -> str:
        """ "20L", or "24L-16A" if sublayers are missing: the layers, those with attention, those with feed-forward."""
        layers = len(self.kept)
        attention = f"-{layers - len(self.no_attention)}A" if self.no_attention else ""
        return f"{layers}L{attention}" + (f"-{layers - len(self.no_ffn)}F" if self.no_ffn else "")

    @property
    def below_layers(self) -> bool:
        """Whether the plan also joins layers, or drops or replaces single sublayers."""
        return bool(self.joined) or not self.complete

    @property
    def half_offset(self) -> tuple[int, int, float] | None:
        """(i, j, distance) if one measured block is dropped, from after attention i to after attention j; else None."""
        if len(self.joined) != 1 or self.distance is None:
            return None
        i, j = self.joined[0]
        return (i, j, self.distance) if len(self.dropped) == j - i else None

    @property
    def complete(self) -> bool:
        """Whether every layer of the result has both sublayers, whole or joined, and no map is added behind one."""
        adds_maps = self.healing is not None and self.healing.adds_maps
        return self.form == "native" and not (self.no_attention or self.no_ffn or adds_maps)

    @property
    def gone(self) -> tuple[frozenset[int], frozenset[int]]:
        """(attention, feed-forward) sublayers of the source that the result lacks, also those of dropped layers."""
        attention = {i for i, _ in self.sublayers if i not in self.no_attention}
        ffn = {j for _, j in self.sublayers if j not in self.no_ffn}
        every = frozenset(range(self.depth))
        return every - attention, every - ffn

    @property
    def dropped(self) -> tuple[int, ...]:
        """Source indices of the layers that go, ascending."""
        return tuple(sorted(set(range(self.depth)) - set(self.kept)))

    @classmethod
    def whole(cls, depth: int) -> Plan:
        """The plan that drops nothing."""
        return cls(depth, tuple(range(depth)))

    @classmethod
    def dropping(cls, depth: int, dropped: Iterable[int]) -> Plan:
        """The plan that drops `dropped` (source indices) of `depth` layers. Raises PlanError if it is empty."""
        gone = set(dropped)
        check_layers(gone, depth)
        if not gone:
            raise PlanError(f"the plan drops nothing: all {depth} layers stay; drop at least one")
        return cls(depth, tuple(i for i in range(depth) if i not in gone))

    def without(self, attention: Iterable[int], ffn: Iterable[int]) -> Plan:
        """This plan, also without these sublayers; a layer that would lose both is dropped."""
        attention, ffn = {*attention, *self.no_attention}, {*ffn, *self.no_ffn}
        check_layers(attention | ffn, self.depth)
        empty = [(i, j) for i, j in self.sublayers if i in attention and j in ffn]
        heads, tails = {i for i, _ in empty}, {j for _, j in empty}
        kept = tuple(i for i in self.kept if i not in heads)
        joined = tuple(pair for pair in self.joined if pair not in empty)
        no_attention, no_ffn = tuple(sorted(attention - heads)), tuple(sorted(ffn - tails))
        return replace(self, kept=kept, joined=joined, no_attention=no_attention, no_ffn=no_ffn)

    def in_form(self, asked: str | None) -> Plan:
        """This plan in the form `asked`; None: "blockwise" if a sublayer is missing, else "native".

        Raises ArchitectureError if that form cannot leave a sublayer out.
        """
        missing = bool(self.no_attention or self.no_ffn)
        if asked == "native" and missing:
            raise ArchitectureError(
                "--format native: every layer needs attention and feed-forward, and this cut removes one of "
                "them; use --format blockwise or zeroed"
            )
        if asked == "zeroed" and not missing:
            asked = "native"
        return replace(self, form=asked or ("blockwise" if missing else "native"))

    def to_dict(self) -> dict[str, object]:
        """JSON values: all fields of the plan, and (for readers) what it drops."""
        every = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        return {"format": FORMAT, **every, "dropped": list(self.dropped)}

    def to_json(self) -> str:
        """The plan as JSON, the same bytes for the same plan."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def upgraded(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Formats 1 and 2 had maps as "emulated", and one adapter or null as "merged"; "dropped" alone is enough."""
        if record.get("format", FORMAT) not in (1, 2, FORMAT):
            raise PlanError(f"plan format {record['format']!r} is not 1 to {FORMAT}; use the slicer that wrote it")
        depth, dropped = record.get("depth"), record.get("dropped")
        if record.get("kept") is None and isinstance(depth, int) and isinstance(dropped, list):
            record["kept"] = [i for i in range(depth) if i not in dropped]
        merged = record.get("merged") or []
        record["merged"] = [merged] if isinstance(merged, Mapping) else merged
        record["healing"] = record.get("healing") or record.get("emulated")
        return record

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Read what `to_json` wrote. Raises PlanError naming `where` and the field at fault."""
        try:
            plan = cls.of(json.loads(text), "plan")
            if plan.gone == (frozenset(), frozenset()):
                raise PlanError(f"the plan drops nothing: all {plan.depth} layers stay; drop at least one")
        except ValueError as error:
            raise PlanError(f"{where}: not JSON ({error}); give a plan.json that slicer wrote") from None
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from None
        return plan

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file, or the plan of a sliced checkpoint directory."""
        file = path / "slicer" / "plan.json" if path.is_dir() else path
        try:
            return cls.from_json(file.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{path}: cannot read the plan ({unreadable(error)}); give a plan.json that slicer wrote"
            ) from None


def spell_left(plan: Plan) -> str:
    """How many kept layers have attention or feed-forward, if some lack it: ", 18 with attention"."""
    lacking = {"attention": plan.no_attention, "feed-forward": plan.no_ffn}
    return "".join(f", {len(plan.kept) - len(gone)} with {what}" for what, gone in lacking.items() if gone)


def spell_dropped(plan: Plan) -> str:
    """What a plan drops, in words: "layers 10-13", "attention of layers 3, 7"."""
    joined = dict(plan.joined)
    whole = set(plan.dropped) - {k for i, j in joined.items() for k in range(i + 1, j + 1)}
    words = [f"half-offset block from after attention {i} to after attention {j}" for i, j in plan.joined]
    if whole:
        words.append(f"layer{'s' if len(whole) > 1 else ''} {spell_layers(whole)}")
    for what, gone in (("attention", plan.no_attention), ("feed-forward", plan.no_ffn)):
        if gone:
            words.append(f"{what} of layer{'s' if len(gone) > 1 else ''} {spell_layers(gone)}")
    return "; ".join(words)
