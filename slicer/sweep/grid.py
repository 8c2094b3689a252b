"""The cells of a sweep: numbers of layers, strategies and healing methods. Needs neither torch nor files.

The figures and ablations of the paper are presets of the same axes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from slicer.errors import UsageError
from slicer.plan.amounts import parse_depths

STRATEGIES = ("similarity", "deepest", "tail", "random")
HEALS = ("none", "fold", "qlora")  # in order of cost
# Figures 1d, 2, 3, 5 and 6: both strategies before and after healing, on the paper's three measures.
_PAPER: dict[str, Any] = {
    "drop": "0:0.5:0.05", "strategies": ("similarity", "deepest"), "heals": ("none", "qlora"),
    "tasks": ("mmlu@5", "boolq@0", "c4"),
}  # fmt: skip
# Figures 7, 8 and 9: one more axis, with the similarity strategy.
_ABLATIONS: dict[str, dict[str, Any]] = {
    "prompt": {"tasks": ("mmlu@5", "mmlu@5:1", "mmlu@5:2"), "heals": ("none",)},
    "shots": {"tasks": ("mmlu@0", "mmlu@1", "mmlu@3", "mmlu@5"), "heals": ("none",)},
    "seed": {"seeds": (0, 1, 2), "heals": ("qlora",)},
    "rank": {"heals": ("qlora@2", "qlora@8", "qlora@64")},
}


@dataclass(frozen=True)
class Grid:
    """The axes of a sweep.

    Attributes:
        drop: amounts as given: fractions or counts; 0 is the unpruned model.
        heals: "none", "fold", "qlora", or "qlora@RANK".
        seeds: for the random strategy and for healing by training.
    """

    drop: str = "0:0.5:0.05"
    strategies: tuple[str, ...] = ("similarity", "deepest")
    heals: tuple[str, ...] = ("none",)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        methods = tuple(heal.split("@")[0] for heal in self.heals)
        for kind, given, known in (("strategies", self.strategies, STRATEGIES), ("heal", methods, HEALS)):
            for name in given:
                if name not in known:
                    raise UsageError(f"--{kind} {name}: choose from {', '.join(known)}")
            if not given:
                raise UsageError(f"--{kind}: pass at least one of {', '.join(known)}")
        if not self.seeds:
            raise UsageError("--seeds: pass at least one seed")
        for heal in self.heals:
            if "@" in heal and not re.fullmatch(r"qlora@[1-9]\d*", heal):
                raise UsageError(f"--heal {heal}: only qlora accepts a rank, as in qlora@8")


@dataclass(frozen=True)
class Cell:
    """One point of the grid. `seed` is 0 if nothing is random."""

    n: int
    strategy: str
    heal: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique within a sweep, and usable as a file name."""
        if self.n == 0:
            return "unpruned"
        seed = f"-s{self.seed}" if self.seed or self.strategy == "random" else ""
        return f"{self.n:03d}-{self.strategy}-{self.heal.replace('@', '')}{seed}"


UNPRUNED = Cell(0, "none", "none")


def cells(grid: Grid, depth: int) -> list[Cell]:
    """All cells for a model of `depth` layers: the unpruned model first, then by cost of healing, deep cuts first.
    Raises UsageError or PlanError for invalid amounts."""
    found = {UNPRUNED: None}
    counts = [n for n in parse_depths(grid.drop, depth) if n]
    for heal in sorted(grid.heals, key=lambda h: (HEALS.index(h.split("@")[0]), h)):
        for n in sorted(counts, reverse=True):
            for strategy in grid.strategies:
                for seed in grid.seeds if is_random(strategy, heal) else (0,):
                    found[Cell(n, strategy, heal, seed)] = None
    return list(found)


def is_random(strategy: str, heal: str) -> bool:
    """Whether the result of such a cell depends on the seed."""
    return strategy == "random" or heal.startswith("qlora")


def paper(ablate: str | None, grid: Grid, given: Collection[str]) -> tuple[Grid, tuple[str, ...]]:
    """(grid, tasks) of `--suite paper`; the axes named in `given` keep their values in `grid`."""
    preset: dict[str, Any] = dict(_PAPER)
    if ablate is not None:
        preset |= {"strategies": ("similarity",), "tasks": ("mmlu@5",), **_ABLATIONS[ablate]}
    tasks = preset.pop("tasks")
    return replace(grid, **{k: v for k, v in preset.items() if k not in given}), tuple(tasks)
