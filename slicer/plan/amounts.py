"""Amounts as users write them: how many layers or sublayers to drop, which ones, or how large the result may be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from slicer.errors import PlanError, UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_AMOUNTS = "a fraction like 0.4, a count like 8, a block like 24-31 or a list like 3,7,9-12"
_MOST_LAYERS = 100_000  # a typing error is refused before a range of that length is made
DAY = 86400.0  # seconds
SUBLAYERS = {"attention": "attention sublayers", "ffn": "feed-forward sublayers", "sublayers": "sublayers"}


@dataclass(frozen=True)
class Amount:
    """How much to drop: exactly one of a fraction of the depth, a count, or named layers."""

    fraction: float | None = None
    count: int | None = None
    layers: tuple[int, ...] | None = None

    def resolve(self, depth: int) -> int:
        """The number of layers to drop out of `depth`. Raises PlanError if it is none or all of them."""
        check_layers(self.layers or (), depth)
        n = self._number(depth, "layers")
        if n >= depth:
            raise PlanError(f"dropping {n} of {depth} layers leaves none; drop at most {depth - 1}")
        return n

    def resolve_sublayers(self, depth: int, what: str) -> int:
        """The number of sublayers to drop in a model of `depth` layers; `what`: a key of `SUBLAYERS`.

        All may be dropped. Raises PlanError if the number is 0, or larger than the number of such sublayers.
        """
        total, name = depth * (2 if what == "sublayers" else 1), SUBLAYERS[what]
        n = self._number(total, name)
        if n > total:
            raise PlanError(f"dropping {n} of {total} {name}: there are not so many; drop at most {total}")
        return n

    def _number(self, total: int, what: str) -> int:
        if self.layers is not None:
            return len(self.layers)
        n = self.count if self.count is not None else round((self.fraction or 0.0) * total)
        if n == 0:
            raise PlanError(
                f"a fraction of {self.fraction:g} of {total} {what} rounds to none; "
                f"the least that drops one is {math.ceil(1000 * 0.51 / total) / 1000:g}"
            )
        return n


@dataclass(frozen=True)
class Goal:
    """How deep to cut.

    At most one of `drop`, `keep`, `max_params` and `max_bytes` sets the number of layers to drop. The last two are
    budgets: the fewest layers that meet them are dropped. `drop_attention`, `drop_ffn` and `drop_sublayers` (of either
    kind) set the number of sublayers to drop in the other layers; give them alone, or with `drop` or `keep`.
    """

    drop: Amount | None = None
    keep: int | None = None
    max_params: int | None = None
    max_bytes: int | None = None
    drop_attention: Amount | None = None
    drop_ffn: Amount | None = None
    drop_sublayers: Amount | None = None

    def __post_init__(self) -> None:
        given = sum(v is not None for v in (self.drop, self.keep, self.max_params, self.max_bytes))
        if given > 1 or (not given and not self.sublayers):
            raise UsageError(
                "give exactly one of --drop, --keep-layers, --max-params and --max-bytes"
                + ("" if given > 1 else ", or --drop-attention, --drop-ffn or --drop-sublayers")
            )
        if self.sublayers and self.budget:
            raise UsageError(
                "a budget (--max-params, --max-bytes) counts whole layers; give --drop-attention, --drop-ffn and "
                "--drop-sublayers alone, or with --drop or --keep-layers"
            )
        if self.drop_sublayers is not None and self.drop_sublayers.layers is not None:
            raise UsageError(
                "--drop-sublayers: give a fraction or a count; name layers with --drop-attention and --drop-ffn"
            )

    @property
    def sublayers(self) -> dict[str, Amount]:
        """The sublayers to drop: "attention", "ffn" or "sublayers" -> amount."""
        amounts = {"attention": self.drop_attention, "ffn": self.drop_ffn, "sublayers": self.drop_sublayers}
        return {name: amount for name, amount in amounts.items() if amount is not None}

    @property
    def layers(self) -> bool:
        """Whether whole layers are dropped."""
        return self.drop is not None or self.keep is not None or self.budget

    @property
    def budget(self) -> bool:
        """Whether the number of layers follows from a size."""
        return self.max_params is not None or self.max_bytes is not None

    @property
    def named(self) -> tuple[int, ...] | None:
        """The layers to drop, if they are named."""
        return self.drop.layers if self.drop is not None else None

    def measured(self, strategy: str) -> bool:
        """Whether a choice by `strategy` needs measurements of the model."""
        by_distance = self.layers and self.named is None and strategy == "similarity"
        return by_distance or any(amount.layers is None for amount in self.sublayers.values())

    def count(self, depth: int) -> int:
        """The number of whole layers to drop out of `depth`; of a budget, the first one to try. Raises PlanError."""
        if self.drop is not None:
            return self.drop.resolve(depth)
        if self.keep is not None:
            if not 0 < self.keep < depth:
                raise PlanError(
                    f"--keep-layers {self.keep}: the model has {depth} layers; keep between 1 and {depth - 1}"
                )
            return depth - self.keep
        return int(self.budget)

    def met(self, parameters: int, total_bytes: int) -> bool:
        """Whether a model with this number of parameters and bytes of weights is within the budget."""
        within_parameters = self.max_params is None or parameters <= self.max_params
        return within_parameters and (self.max_bytes is None or total_bytes <= self.max_bytes)

    def __str__(self) -> str:
        return next(f"--{k.replace('_', '-')} {v}" for k, v in asdict(self).items() if v is not None)


def check_layers(layers: Iterable[int], depth: int, given: str = "") -> None:
    """Raise PlanError for a layer that a model of `depth` layers does not have; the message starts with `given`."""
    for i in sorted(layers):
        if not 0 <= i < depth:
            raise PlanError(f"{given}layer {i} is not in the model, whose layers are 0-{depth - 1}")


def parse_amount(text: str, option: str = "--drop") -> Amount:
    """Read `0.4` (a fraction), `8` (a count), `24-31` (a block, inclusive) or `3,7,9-12` (a list).

    Raises UsageError for what no model could satisfy.
    """
    text = text.strip()
    if re.fullmatch(r"[+-]?\d+", text):
        count = int(text)
        if count < 1:
            raise UsageError(f"{option} {text}: drop at least one ({_AMOUNTS})")
        return Amount(count=count)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?|[+-]?\d+[eE][+-]?\d+", text):
        fraction = float(text)
        if not 0 < fraction < 1:
            raise UsageError(f"{option} {text}: a fraction must lie between 0 and 1, both excluded ({_AMOUNTS})")
        return Amount(fraction=fraction)
    layers = _layers(text, option, _AMOUNTS)
    if len(set(layers)) < len(layers):
        raise UsageError(f"{option} {text}: names a layer twice")
    return Amount(layers=tuple(sorted(layers)))


def parse_goal(*, keep: int | None = None, **texts: str | None) -> Goal | None:
    """The goal, from options that are named like the fields of `Goal`; None if none is given. Raises UsageError."""
    given: dict[str, Any] = {} if keep is None else {"keep": keep}
    for name, text in texts.items():
        if text is not None:
            read = parse_size if name.startswith("max_") else parse_amount
            given[name] = read(text, f"--{name.replace('_', '-')}")
    return Goal(**given) if given else None


def parse_protected(text: str, depth: int) -> frozenset[int]:
    """Read `0,1,-1` or `0-3,-2`: layers that must stay, negative ones counted from the end.

    Raises UsageError if it is not a list of layers, PlanError for a layer that is not in the model.
    """
    layers = _layers(text, "--protect", "layers like 0,1,-1 or 0-3", depth)
    check_layers(layers, depth, f"--protect {text}: ")
    return frozenset(layers)


def _layers(text: str, option: str, forms: str, depth: int | None = None) -> list[int]:
    """The layers of a list such as `3,7,9-12`; with `depth`, negative ones are counted from the end."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[1].startswith("-") and (depth is None or match[2])):
            raise UsageError(f"{option} {text}: {part.strip()!r} is not understood; give {forms}")
        first, last = int(match[1]), int(match[2] or match[1])
        if depth is not None and first < 0:
            first = last = first + depth
        if last < first:
            raise UsageError(f"{option} {text}: the block {part.strip()} ends before it starts; write {last}-{first}")
        if last > _MOST_LAYERS:
            raise UsageError(f"{option} {text}: no model has a layer {last}")
        layers += range(first, last + 1)
    return layers


def parse_depths(text: str, depth: int, option: str = "--drop") -> list[int]:
    """Numbers of layers to drop, 0 being the whole model: `0,2,4`, `0:8:2` (the end included), `0:0.5:0.05` or
    `0.1,0.25`; ascending, each once. Raises UsageError if it is not such a list, PlanError for `depth` or more."""
    found: set[int] = set()
    for part in text.split(","):
        numbers = part.strip().split(":")
        if len(numbers) not in (1, 3) or not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", x) for x in numbers):
            raise UsageError(
                f"{option} {text}: {part.strip()!r} is not understood; write counts (0,2,4 or 0:8:2) or fractions "
                "(0.1,0.25 or 0:0.5:0.05)"
            )
        values = [float(x) for x in numbers]
        if len(values) == 3:
            start, stop, step = values
            if step <= 0 or stop < start:
                raise UsageError(f"{option} {text}: START:STOP:STEP must go up")
            values = [start + step * i for i in range(int((stop - start) / step + 1e-9) + 1)]
        fractions = any("." in x for x in numbers)
        if fractions and max(values) >= 1:
            raise UsageError(f"{option} {text}: fractions lie below 1; write counts without a point")
        found.update(round(value * depth if fractions else value) for value in values)
    if max(found) >= depth:
        raise PlanError(f"{option} {text}: the model has {depth} layers; drop at most {depth - 1}")
    return sorted(found)


def parse_counts(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """Read `1,4,16`: whole numbers of at least `least`, in the order given, each once. Raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise UsageError(f"{option} {text}: write whole numbers from {least} on, such as 1,4,16")
    return tuple(dict.fromkeys(map(int, words)))


def parse_size(text: str, option: str) -> int:
    """Read `5B`, `16GB`, `1.5GiB`, `800M` or a plain number into units or bytes. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]I|[KMGBT]?)B?", text.strip().upper())
    if match is None:
        raise UsageError(f"{option} {text}: not a size; write for example 5B, 800M, 16GB or 1.5GiB")
    size = int(float(match[1]) * (_BINARY.get(match[2]) or _UNITS[match[2]]))
    if size < 1:
        raise UsageError(f"{option} {text}: must be more than zero")
    return size


def spell_size(nbytes: float, *, up: bool = False) -> str:
    """Bytes in three digits, rounded down (or `up`), as `parse_size` reads them: "16.2GB"."""
    unit = next((unit for unit in "TGM" if nbytes >= _UNITS[unit]), "K")
    count = nbytes / _UNITS[unit]
    step = 10.0 ** (len(str(int(count))) - 3)
    return f"{round((math.ceil if up else math.floor)(count / step) * step, 2):g}{unit}B"


def spell_seconds(seconds: float) -> str:
    """ "40 s", "6 min", "2.5 h", "4 days", "1.5 years": two digits."""
    for unit, name in ((365 * DAY, "years"), (DAY, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * unit:
            return f"{float(f'{seconds / unit:.2g}'):g} {name}"
    return f"{seconds:.0f} s"


def runs(layers: Iterable[int]) -> list[tuple[int, int]]:
    """[start, end) of each run of neighbours among `layers`, ascending."""
    found: list[tuple[int, int]] = []
    for i in sorted(layers):
        if found and found[-1][1] == i:
            found[-1] = found[-1][0], i + 1
        else:
            found.append((i, i + 1))
    return found


def spell_layers(layers: Iterable[int]) -> str:
    """`3, 7, 9-12` for (3, 7, 9, 10, 11, 12): the grammar of `--drop`, spaced for reading."""
    return ", ".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in runs(layers))
