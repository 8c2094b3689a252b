"""What parts of the model are worth in company: leave-one-out and Shapley values of layers, or of sublayers.

Players are the layers, or their attention and feed-forward parts. A coalition is a model without some of them, and its
cost the loss on the calibration text, or the KL divergence of its next-token distributions from the full model's, in
nats a token, at most log V (guessing); or the share of a task's questions that it answers wrongly, at most that of
guessing. A player's Shapley value is the mean, over all orders in which players can
leave, of how much the cost rises when it leaves (Castro et al. 2009): what "A deeper look at depth pruning of LLMs"
calls an adaptive importance.

Orders are drawn at random, each with its reverse (antithetic). An order ends where the cost is that of guessing: who
leaves later changes nothing (truncation). A model that differs from the one before it by one more player gone shares
all layers before that player with it, and starts there.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slicer.errors import ArchitectureError, UsageError
from slicer.measure.analysis import Distances
from slicer.measure.questions import Questions
from slicer.measure.states import States
from slicer.measure.stream import Walk
from slicer.measure.summary import table_of_rows
from slicer.model.sublayers import attention_outputs, ffn_outputs, without_sublayers
from slicer.progress import Progress

AGAINST = ("loss", "kl")


@dataclass(frozen=True)
class Values:
    """What was measured of each player, in order of depth (attention before feed-forward part).

    Attributes:
        samples: [samples, players], float64: a pair of orders each (Shapley), or a sequence or question
            (leave-one-out).
        base: the cost of the whole model.
        passes: forward passes that were made, in whole models.
    """

    samples: torch.Tensor
    base: float
    passes: float

    @property
    def mean(self) -> list[float]:
        """The value of each player."""
        return [float(v) for v in self.samples.mean(0)]

    @property
    def standard_error(self) -> list[float]:
        """Of each value; NaN for a single sample."""
        if len(self.samples) < 2:
            return [math.nan] * self.samples.shape[1]
        return [float(v) for v in self.samples.std(0) / math.sqrt(len(self.samples))]


class Coalitions:
    """Costs of the model without some players: its loss or KL divergence on batches, or its errors on `Questions`.

    `parts`: whether the players are sublayers, 2i and 2i + 1 those of layer i.

    Attributes:
        players: how many there are.
        base: the cost of the whole model, by sequence or question.
        ceiling: the cost of guessing: log V, or of questions its share of errors; where the whole model answers no
            better than that, infinite, and no order is cut short.
    """

    def __init__(
        self,
        walk: Walk,
        of: Sequence[torch.Tensor] | Questions,
        *,
        parts: bool,
        against: str = "loss",
    ) -> None:
        if against not in AGAINST:
            raise UsageError(f"against {against!r}: choose one of {', '.join(AGAINST)}")
        self._questions = of if isinstance(of, Questions) else None
        batches = of.batches if isinstance(of, Questions) else of
        self._walk, self._parts, self._against = walk, parts, against
        self.players = walk.depth * (2 if parts else 1)
        if parts:
            for i, layer in enumerate(walk.layers):
                if not attention_outputs(layer) or not ffn_outputs(layer):
                    raise ArchitectureError(
                        f"layer {i} of {type(walk.model).__name__} has not both attention and feed-forward part, as "
                        "far as slicer knows; measure whole layers"
                    )
        self.layer_runs = 0
        start = walk.start(batches)
        self._trail: list[States] = [start]  # x(0)..x(L) of the latest model
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
        """Forward passes made so far, in whole models."""
        return self.layer_runs / self._walk.depth

    def without(self, gone: frozenset[int]) -> float:
        """The cost without these players, at most `ceiling`."""
        if gone not in self._known:
            self._known[gone] = min(float(self.samples_without(gone).mean()), self.ceiling)
        return self._known[gone]

    def samples_without(self, gone: frozenset[int]) -> torch.Tensor:
        """The cost of each sequence or question, [samples], float64."""
        new = gone - self._gone if self._gone <= gone else gone
        if not self._gone <= gone:
            self._trail, self._gone = list(self._whole), frozenset()
        if new:
            self._run(gone, min(p // 2 if self._parts else p for p in new))
            self._gone = gone
        return self._costs(self._trail[-1])

    def _run(self, gone: frozenset[int], first: int) -> None:
        """The layers from `first` on, and the trail they leave."""
        walk = self._walk
        del self._trail[first + 1 :]
        with walk.along(range(first, walk.depth)):
            for i in range(first, walk.depth):
                no_attention, no_ffn = (
                    (2 * i in gone, 2 * i + 1 in gone) if self._parts else (i in gone, i in gone)
                )
                if no_attention and no_ffn:
                    self._trail.append(self._trail[-1])  # the same states: nothing writes into them again
                    continue
                states = self._trail[-1].copy()
                states.layer = min(states.layer, i)
                with walk.layer(i) as layer, contextlib.ExitStack() as stack:
                    stack.enter_context(without_sublayers(layer, no_attention, no_ffn))
                    walk.advance(i, states)
                self.layer_runs += 1
                self._trail.append(states)

    def _costs(self, last: States) -> torch.Tensor:
        def following(b: int, n: int) -> torch.Tensor:
            return self._walk.head(last.tokens[b][:, -n:], last[b][:, -n:])[0].float().log_softmax(-1)

        if self._questions is not None:
            return self._questions.errors(following)
        found = []
        for b, tokens in enumerate(last.tokens):
            for s in range(len(tokens)):
                row = tokens[s : s + 1]
                chances = self._walk.head(row, last[b][s : s + 1])[0].float().log_softmax(-1)
                if self._against == "kl":
                    if last is self._last:
                        found.append(0.0)
                        continue
                    full = self._walk.head(row, self._last[b][s : s + 1])[0].float().log_softmax(-1)
                    found.append(float((full.exp() * (full - chances)).sum(-1).mean()))
                else:
                    target = row[0, 1:].to(chances.device)
                    found.append(float(torch.nn.functional.nll_loss(chances[:-1], target)))
        return torch.tensor(found, dtype=torch.float64)


def leave_one_out(coalitions: Coalitions, progress: Progress | None = None) -> Values:
    """How much the cost rises without each player alone, a sequence or question a sample."""
    progress = progress or Progress()
    progress.stage("Leaving out each part", coalitions.players, "parts")
    columns = []
    for p in range(coalitions.players):
        columns.append(coalitions.samples_without(frozenset((p,))) - coalitions.base)
        progress.advance()
    return Values(torch.stack(columns, 1), float(coalitions.base.mean()), coalitions.passes)


def shapley(
    coalitions: Coalitions, budget: float, *, seed: int = 0, progress: Progress | None = None
) -> Values:
    """Shapley values of all players, by pairs of opposite orders until `budget` forward passes are made.

    At least one pair is made whatever the budget; two are needed for standard errors.
    """
    if budget <= 0:
        raise UsageError(f"--shapley {budget:g}: give a number of forward passes of at least 1")
    progress = progress or Progress()
    progress.stage("Shapley values", math.ceil(budget), "passes")
    draw, before = random.Random(seed), coalitions.passes
    pairs: list[torch.Tensor] = []
    told = 0
    longest, spent = 1.0, 0.0
    while not pairs or spent + longest <= budget:
        started = coalitions.passes
        order = draw.sample(range(coalitions.players), coalitions.players)
        both = [_marginals(coalitions, way) for way in (order, order[::-1])]
        pairs.append((both[0] + both[1]) / 2)
        took = max(1.0, coalitions.passes - started)  # costs known already are not free for ever
        longest, spent = max(longest, took), spent + took
        now = min(int(spent), math.ceil(budget))
        progress.advance(now - told)
        told = now
    return Values(torch.stack(pairs), float(coalitions.base.mean()), coalitions.passes - before)


def _marginals(coalitions: Coalitions, order: Sequence[int]) -> torch.Tensor:
    """By player, what its leaving in this order adds to the cost."""
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


def table_of(name: str, values: Values, seq_len: int, samples: int, most: int | None = None) -> Distances:
    """The values as a metric's table, those of a block of several added up, as Shapley values may be; blocks of at most
    `most` players (None: all)."""
    players = values.samples.shape[1]
    rows = {n: values.samples.unfold(1, n, 1).sum(-1) for n in range(1, (most or players) + 1)}
    return table_of_rows(name, rows, players, seq_len=seq_len, samples=samples)
