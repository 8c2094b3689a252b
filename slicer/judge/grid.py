"""Which cells a sweep has: how many layers, chosen how, healed how. Pure: no torch, no files.

The paper's figures and ablations are presets of the same axes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from slicer.errors import UsageError
from slicer.plan.amounts import parse_depths

STRATEGIES = ("similarity", "deepest", "tail", "random")
HEALS = ("none", "fold", "qlora")  # cheapest first
# Figures 1d, 2, 3, 5 and 6: both strategies before and after healing, on the paper's three measures.
_PAPER: dict[str, Any] = {
    "drop": "0:0.5:0.05", "strategies": ("similarity", "deepest"), "heals": ("none", "qlora"),
    "tasks": ("mmlu@5", "boolq@0", "c4"),
}  # fmt: skip
# Figures 7, 8 and 9: one axis more, on the similarity strategy.
_ABLATIONS: dict[str, dict[str, Any]] = {
    "prompt": {"tasks": ("mmlu@5", "mmlu@5:1", "mmlu@5:2"), "heals": ("none",)},
    "shots": {"tasks": ("mmlu@0", "mmlu@1", "mmlu@3", "mmlu@5"), "heals": ("none",)},
    "seed": {"seeds": (0, 1, 2), "heals": ("qlora",)},
    "rank": {"heals": ("qlora@2", "qlora@8", "qlora@64")},
}
ABLATIONS = tuple(_ABLATIONS)


@dataclass(frozen=True)
class Grid:
    """The axes of a sweep.

    Attributes:
        drop: amounts as given: fractions or counts, 0 being the whole model.
        heals: "none", "fold", "qlora", or "qlora@RANK".
        seeds: of the random strategy and of healing that trains.
    """

    drop: str = "0:0.5:0.05"
    strategies: tuple[str, ...] = ("similarity", "deepest")
    heals: tuple[str, ...] = ("none",)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for kind, given, known in (("strategies", self.strategies, STRATEGIES), ("heal", self.heals, HEALS)):
            for name in given:
                if (name.split("@")[0] if kind == "heal" else name) not in known:
                    raise UsageError(f"--{kind} {name}: choose among {', '.join(known)}")
            if not given:
                raise UsageError(f"--{kind}: name at least one of {', '.join(known)}")
        if not self.seeds:
            raise UsageError("--seeds: give at least one")
        for heal in self.heals:
            if "@" in heal and not re.fullmatch(r"qlora@[1-9]\d*", heal):
                raise UsageError(f"--heal {heal}: only qlora takes a rank, as in qlora@8")


@dataclass(frozen=True)
class Cell:
    """One point of the grid. `seed` is 0 where nothing is random."""

    n: int
    strategy: str
    heal: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique within a sweep, and fit for a file name."""
        if self.n == 0:
            return "unpruned"
        seed = f"-s{self.seed}" if self.seed or self.strategy == "random" else ""
        return f"{self.n:03d}-{self.strategy}-{self.heal.replace('@', '')}{seed}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


UNPRUNED = Cell(0, "none", "none")


def cells(grid: Grid, depth: int) -> list[Cell]:
    """All cells of a model of `depth` layers, cheap first: the whole model, then by healing, shallow cuts last.

    Raises UsageError or PlanError for amounts the model cannot have.
    """
    found = {UNPRUNED: None}
    counts = [n for n in parse_depths(grid.drop, depth) if n]
    for heal in sorted(grid.heals, key=lambda h: (HEALS.index(h.split("@")[0]), h)):
        for n in sorted(counts, reverse=True):
            for strategy in grid.strategies:
                for seed in grid.seeds if is_random(strategy, heal) else (0,):
                    found[Cell(n, strategy, heal, seed)] = None
    return list(found)


def is_random(strategy: str, heal: str) -> bool:
    """Whether such a cell is another one with another seed."""
    return strategy == "random" or heal.startswith("qlora")


def paper(ablate: str | None, grid: Grid, given: Iterable[str]) -> tuple[Grid, tuple[str, ...]]:
    """(grid, tasks) of `--suite paper`; axes whose names are in `given` stay as they are in `grid`."""
    preset: dict[str, Any] = dict(_PAPER)
    if ablate is not None:
        preset |= {"strategies": ("similarity",), "tasks": ("mmlu@5",), **_ABLATIONS[ablate]}
    tasks = preset.pop("tasks")
    keep = set(given)
    return replace(grid, **{k: v for k, v in preset.items() if k not in keep}), tuple(tasks)
