"""Leave-one-out and Shapley values of layers or sublayers.

The players are the layers, or their attention and feed-forward sublayers. The cost of a coalition (the model without
some players) is the loss on the calibration text, or the KL divergence of its next-token distributions from the full
model's, in nats per token, at most log V (a uniform guess); or the share of wrong answers to a task, at most that of
guessing. A player's Shapley value is the mean, over all orders of removal, of the rise in cost when it is removed
(Castro et al. 2009), called adaptive importance in "A deeper look at depth pruning of LLMs".

Orders are drawn at random, each with its reverse (antithetic). An order ends when the cost reaches that of guessing:
later removals change nothing (truncation). A model that differs from the previous one by one more removed player reuses
all states before that player.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slicer.errors import ArchitectureError, UsageError
from slicer.measure.losses import Questions, kl_divergence
from slicer.model.states import Batches, States
from slicer.model.sublayers import attention_outputs, ffn_outputs, without_sublayers
from slicer.model.walk import Walk, next_token_loss
from slicer.progress import SILENT, Progress

AGAINST = ("loss", "kl")


@dataclass(frozen=True)
class Values:
    """Values of the players, in order of depth (attention before feed-forward).

    Attributes:
        samples: [samples, players], float64: one row per pair of orders (Shapley), or per sequence or question
            (leave-one-out).
        base: the cost of the full model.
        passes: number of forward passes of the full model with the same work.
    """

    samples: torch.Tensor
    base: float
    passes: float

    @property
    def mean(self) -> list[float]:
        """The value of each player."""
        return list(map(float, self.samples.mean(0)))

    @property
    def standard_error(self) -> list[float]:
        """Standard error of each value; NaN for a single sample."""
        return list(map(float, self.samples.std(0) / math.sqrt(len(self.samples))))


class Coalitions:
    """Costs of the model without some players: loss or KL divergence on batches, or errors on `Questions`.

    `sublayers`: whether the players are sublayers: 2i is attention i, 2i + 1 is feed-forward i.

    Attributes:
        players: number of players.
        base: the cost of the full model, by sequence or question.
        ceiling: the cost of guessing: log V, or the share of wrong answers; infinite if the full model is no better
            than guessing, and then orders are not truncated.

    Raises UsageError for an unknown `against`, ArchitectureError for a layer without one of the sublayers.
    """

    def __init__(self, walk: Walk, of: Batches | Questions, *, sublayers: bool, against: str = "loss") -> None:
        if against not in AGAINST:
            raise UsageError(f"--against {against!r}: choose from {', '.join(AGAINST)}")
        self._questions = of if isinstance(of, Questions) else None
        batches = of.batches if isinstance(of, Questions) else of
        self._walk, self._sublayers, self._against = walk, sublayers, against
        self.players = walk.depth * (2 if sublayers else 1)
        if sublayers:
            for i, layer in enumerate(walk.layers):
                if not attention_outputs(layer) or not ffn_outputs(layer):
                    raise ArchitectureError(
                        f"layer {i} of {type(walk.model).__name__} does not have both attention and feed-forward "
                        "sublayers; measure whole layers"
                    )
        self.layer_runs = 0
        self._trail: list[States] = [walk.start(batches)]  # x(0)..x(L) of the latest model
        self._run(frozenset(), 0)
        self._whole = list(self._trail)
        self._gone: frozenset[int] = frozenset()
        self._last = self._whole[-1]
        self.base = self._costs(self._last)
        self.ceiling = math.log(walk.model.config.get_text_config().vocab_size)
        if self._questions is not None:
            guessing = self._questions.guessing
            self.ceiling = guessing if float(self.base.mean()) < guessing else math.inf
        self._known: dict[frozenset[int], float] = {}

    @property
    def passes(self) -> float:
        """Forward passes so far, in units of the full model."""
        return self.layer_runs / self._walk.depth

    def without(self, gone: frozenset[int]) -> float:
        """The cost without the players `gone`, at most `ceiling`."""
        if gone not in self._known:
            self._known[gone] = min(float(self.samples_without(gone).mean()), self.ceiling)
        return self._known[gone]

    def samples_without(self, gone: frozenset[int]) -> torch.Tensor:
        """The cost without the players `gone` for each sequence or question: [samples], float64."""
        new = gone - self._gone if self._gone <= gone else gone
        if not self._gone <= gone:
            self._trail, self._gone = list(self._whole), frozenset()
        if new:
            self._run(gone, min(p // 2 if self._sublayers else p for p in new))
            self._gone = gone
        return self._costs(self._trail[-1])

    def _run(self, gone: frozenset[int], first: int) -> None:
        """Run the layers from `first` on and store their states in the trail."""
        walk = self._walk
        del self._trail[first + 1 :]
        with walk.along(range(first, walk.depth)):
            for i in range(first, walk.depth):
                no_attention, no_ffn = (2 * i in gone, 2 * i + 1 in gone) if self._sublayers else (i in gone, i in gone)
                if no_attention and no_ffn:
                    self._trail.append(self._trail[-1])  # shared: states in the trail are never written to
                    continue
                states = self._trail[-1].copy()
                states.layer = min(states.layer, i)
                with walk.layer(i) as layer, without_sublayers(layer, no_attention, no_ffn):
                    walk.advance(i, states)
                self.layer_runs += 1
                self._trail.append(states)

    def _costs(self, last: States) -> torch.Tensor:
        def following(b: int, n: int) -> torch.Tensor:
            return self._walk.log_probabilities(last.tokens[b][:, -n:], last[b][:, -n:])

        if self._questions is not None:
            return self._questions.errors(following)
        if self._against == "kl" and last is self._last:
            return torch.zeros(sum(map(len, last.tokens)), dtype=torch.float64)
        found = []
        for b, tokens in enumerate(last.tokens):
            for s, row in enumerate(torch.split(tokens, 1)):
                chances = self._walk.log_probabilities(row, last[b][s : s + 1])
                if self._against == "kl":
                    full = self._walk.log_probabilities(row, self._last[b][s : s + 1])
                    found.append(kl_divergence(full, chances))
                else:
                    found.append(float(next_token_loss(chances, row[0])))
        return torch.tensor(found, dtype=torch.float64)


def leave_one_out(coalitions: Coalitions, progress: Progress = SILENT) -> Values:
    """The rise in cost without each single player, one sample per sequence or question."""
    progress.stage("Leaving out each player", coalitions.players, "players")
    columns = []
    for p in range(coalitions.players):
        columns.append(coalitions.samples_without(frozenset((p,))) - coalitions.base)
        progress.advance()
    return Values(torch.stack(columns, 1), float(coalitions.base.mean()), coalitions.passes)


def shapley(coalitions: Coalitions, budget: float, *, seed: int = 0, progress: Progress = SILENT) -> Values:
    """Shapley values of all players, from pairs of opposite orders until `budget` forward passes are used.

    Runs at least one pair; standard errors need two. Raises UsageError for a budget below 1.
    """
    if budget <= 0:
        raise UsageError(f"--shapley {budget:g}: pass a number of forward passes of at least 1")
    progress.stage("Shapley values", math.ceil(budget), "passes")
    draw, before = random.Random(seed), coalitions.passes
    pairs: list[torch.Tensor] = []
    reported, longest, spent = 0, 1.0, 0.0
    while not pairs or spent + longest <= budget:
        started = coalitions.passes
        order = draw.sample(range(coalitions.players), coalitions.players)
        both = [_marginals(coalitions, way) for way in (order, order[::-1])]
        pairs.append((both[0] + both[1]) / 2)
        took = max(1.0, coalitions.passes - started)  # cached costs make a pair cheaper, but not every pair
        longest, spent = max(longest, took), spent + took
        now = min(int(spent), math.ceil(budget))
        progress.advance(now - reported)
        reported = now
    return Values(torch.stack(pairs), float(coalitions.base.mean()), coalitions.passes - before)


def _marginals(coalitions: Coalitions, order: Sequence[int]) -> torch.Tensor:
    """By player, the rise in cost when it is removed in this order."""
    values = torch.zeros(coalitions.players, dtype=torch.float64)
    cost, gone = min(float(coalitions.base.mean()), coalitions.ceiling), frozenset[int]()
    for player in order:
        if cost >= coalitions.ceiling:
            break
        gone |= {player}
        new = coalitions.without(gone)
        values[player] = new - cost
        cost = new
    return values
