"""Metrics that need the loss: blocks left out, greedy removal, gradients. Each takes passes of its own.

Candidates share the work before their cut: one pass carries the states of all candidates, which branch off the full
model's states at their cut. Each layer is read once per pass and run once for every candidate that keeps it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from slicer.measure.analysis import Distances
from slicer.measure.distances import table_of_rows, table_of_sums
from slicer.measure.recorder import Portion
from slicer.model.states import Batches, States
from slicer.model.walk import Walk, next_token_loss
from slicer.progress import SILENT, Progress
from slicer.runtime.workdir import Notebook

Layers = Collection[int]


def block_losses(
    walk: Walk, portion: Portion, sizes: Sequence[int], book: Notebook, progress: Progress
) -> tuple[dict[str, Distances], float]:
    """(tables "loss" and "kl": the rise of the loss without each block of the `sizes` (at least one), and the KL
    divergence from the full model; loss of the full model, nats per token).

    Passes that `book` holds from an earlier run are not run again.
    """
    depth = walk.depth
    rows: dict[str, dict[int, torch.Tensor]] = {"loss": {}, "kl": {}}
    for n in sizes:
        blocks = [frozenset(range(start, start + n)) for start in range(depth - n + 1)]
        progress.stage(f"Loss without each block of {n}", depth, "layers")
        make = partial(leave_out, walk, portion.batches, blocks, progress=progress)
        base, loss, kl = portion.join(*_taken(book, f"leave-{n}", make))
        rows["loss"][n], rows["kl"][n] = loss - base[:, None], kl
    tables = {
        name: table_of_rows(name, found, depth, seq_len=portion.seq_len, samples=portion.samples)
        for name, found in rows.items()
    }
    return tables, float(base.mean())


def greedy_order(
    walk: Walk, portion: Portion, count: int, book: Notebook, progress: Progress
) -> tuple[tuple[dict[str, float], ...], float]:
    """SLEB: (the `count` layers to remove one after another, "layer" and the "loss" without it and those before; loss
    of the full model), nats per token. Each step removes the layer without which the loss is least."""
    steps: list[dict[str, float]] = []
    removed: list[int] = []
    whole = math.nan
    for number in range(count):
        left = [i for i in range(walk.depth) if i not in removed]
        progress.stage(f"Greedy removal, {number + 1} of {count}", walk.depth, "layers")
        candidates, gone = [frozenset((i,)) for i in left], frozenset(removed)
        make = partial(leave_out, walk, portion.batches, candidates, gone, progress=progress)
        base, loss, _ = portion.join(*_taken(book, f"greedy-{','.join(map(str, removed))}", make))
        whole = whole if removed else float(base.mean())
        least, best = loss.mean(0).min(0)
        removed.append(left[int(best)])
        steps.append({"layer": removed[-1], "loss": float(least)})
    return tuple(steps), whole


def taylor_table(walk: Walk, portion: Portion, book: Notebook, progress: Progress) -> Distances:
    """The first-order importance of every block: the sum of its layers' `taylor_scores`."""
    progress.stage("Gradients", 2 * walk.depth, "layers")
    make = partial(taylor_scores, walk, portion.batches, progress=progress)
    (scores,) = portion.join(*_taken(book, "taylor", lambda: (make(),)))
    return table_of_sums("taylor", scores, seq_len=portion.seq_len, samples=portion.samples)


def _taken(book: Notebook, name: str, make: Callable[[], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """What `make` returned under this name, now or in an earlier run."""
    found = book.take(name, lambda: [part.tolist() for part in make()])
    return [torch.tensor(values, dtype=torch.float64) for values in found]


def leave_out(
    walk: Walk, batches: Batches, candidates: Sequence[Layers], without: Layers = (), *, progress: Progress = SILENT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Measure the model without the layers `without`, and without these and the layers of each candidate.

    Returns float64, one row per sample: the loss of the former in nats per token [samples], the loss of each candidate
    [samples, candidates], and the KL divergence of each candidate's next-token distribution from the former's, mean
    over tokens [samples, candidates].
    """
    states = walk.start(batches)
    streams: dict[int, States] = {}
    order = [i for i in range(walk.depth) if i not in without]
    with walk.along(order):
        for i in order:
            for c, gone in enumerate(candidates):
                if min(gone) == i:
                    streams[c] = states.copy()
            with walk.layer(i):
                walk.advance(i, states)
                for c, stream in streams.items():
                    if i not in candidates[c]:
                        walk.advance(i, stream)
            progress.advance()
    base = torch.zeros(sum(map(len, states.tokens)), dtype=torch.float64)
    losses, divergences = base.new_zeros(2, len(base), len(candidates))
    rows = ((b, s, row) for b, tokens in enumerate(states.tokens) for s, row in enumerate(torch.split(tokens, 1)))
    for at, (b, s, row) in enumerate(rows):
        full = walk.log_probabilities(row, states[b][s : s + 1])
        base[at] = next_token_loss(full, row[0])
        for c in range(len(candidates)):
            cut = walk.log_probabilities(row, streams[c][b][s : s + 1])
            losses[at, c], divergences[at, c] = next_token_loss(cut, row[0]), kl_divergence(full, cut)
    return base, losses, divergences


def kl_divergence(full: torch.Tensor, cut: torch.Tensor) -> float:
    """KL(full || cut), nats per token, of log probabilities [seq, vocabulary]."""
    return float((full.exp() * (full - cut)).sum(-1).mean())


def taylor_scores(walk: Walk, batches: Batches, *, progress: Progress = SILENT) -> torch.Tensor:
    """First-order importance of each layer: the sum of |dL/dw * w| over its weights w, per sample: [samples, L].

    L is the loss of one sequence in nats per token. The backward pass recomputes each layer from its stored input, so
    only one layer is in memory at a time.
    """
    rows = [row[None] for batch in batches for row in batch]
    states = walk.start(rows)
    kept = []  # x(0)..x(L-1), inputs of the layers
    for i in range(walk.depth):
        kept.append(states.copy())
        walk.advance(i, states)
        progress.advance()
    gradients = []
    for b, tokens in enumerate(rows):
        last = states[b].to(walk.device).requires_grad_()
        with torch.enable_grad():
            loss = next_token_loss(walk.log_probabilities(tokens, last, gradient=True), tokens[0])
        gradients.append(torch.autograd.grad(loss, last)[0].cpu())
    scores = torch.zeros(len(rows), walk.depth, dtype=torch.float64)
    backwards = range(walk.depth - 1, -1, -1)
    with walk.along(backwards):
        for i in backwards:
            with walk.layer(i) as layer:
                scores[:, i] = _backward(walk, layer, i, kept.pop(), gradients)
            progress.advance()
    return scores


def _backward(
    walk: Walk, layer: torch.nn.Module, i: int, entering: States, gradients: list[torch.Tensor]
) -> torch.Tensor:
    """Scores of layer i by sample; replaces `gradients` of its output by those of its input, in place."""
    weights = [p for p in layer.parameters() if p.is_floating_point()]
    scores = torch.zeros(len(gradients), dtype=torch.float64)
    for weight in weights:
        weight.requires_grad_()
    for b, gradient in enumerate(gradients):
        x = entering[b].clone().requires_grad_()
        new = walk.call(i, b, x, gradient=True)
        found = torch.autograd.grad(new, [x, *weights], gradient.to(new.device), allow_unused=True)
        gradients[b] = found[0]
        scores[b] = sum(
            float((g.float() * w.detach().float()).abs().sum(dtype=torch.float64))
            for g, w in zip(found[1:], weights, strict=True)
            if g is not None
        )
    for weight in weights:
        weight.requires_grad_(False)
    return scores


@dataclass(frozen=True)
class Choice:
    """A possible answer: `tokens` follow the last len(tokens) positions of sequence `batch`."""

    batch: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """Questions with their choices, tokenized.

    Attributes:
        name: of the task.
        batches: int64 [1, seq] each: question and choice without the last token; choices that differ only in the last
            token share one.
        choices: by question.
        right: by question, the indices of the correct choices.
    """

    name: str
    batches: Batches
    choices: Sequence[Sequence[Choice]]
    right: Sequence[frozenset[int]]

    @property
    def guessing(self) -> float:
        """The share of wrong answers of a random guess."""
        chances = [len(right) / len(choices) for right, choices in zip(self.right, self.choices, strict=True)]
        return 1 - sum(chances) / len(chances)

    def errors(self, chances: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """1 for each wrong answer, else 0: [questions], float64.

        `chances(b, n)`: log probabilities [n, vocabulary] of the tokens after the last n positions of sequence b.
        """
        by_batch: defaultdict[int, set[Choice]] = defaultdict(set)
        for choice in chain(*self.choices):
            by_batch[choice.batch].add(choice)
        likelihood: dict[Choice, float] = {}
        for b, mine in by_batch.items():
            found = chances(b, max(len(choice.tokens) for choice in mine)).float()
            for choice in mine:
                tokens = torch.tensor(choice.tokens, device=found.device)
                likelihood[choice] = float(found[-len(tokens) :].gather(1, tokens[:, None]).sum())
        rows = ([likelihood[choice] for choice in choices] for choices in self.choices)
        wrong = [row.index(max(row)) not in right for row, right in zip(rows, self.right, strict=True)]
        return torch.tensor(wrong, dtype=torch.float64)
