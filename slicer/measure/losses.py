"""Metrics that need the loss: blocks left out, greedy removal, gradients. Each takes passes of its own.

Candidates share the work before their cut: one pass carries the states of all candidates, which branch off the full
model's states at their cut. Each layer is read once per pass and run once for every candidate that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from slicer.measure.analysis import Distances
from slicer.measure.distances import table_of_rows
from slicer.model.states import States
from slicer.model.walk import Walk
from slicer.progress import Progress
from slicer.runtime.distributed import Processes
from slicer.runtime.workdir import Notebook


@dataclass(frozen=True)
class LossTables:
    """Results: tables by metric, loss of the full model (nats per token), SLEB's removal order."""

    tables: dict[str, Distances] = field(default_factory=dict)
    base: float | None = None
    greedy: tuple[dict[str, float], ...] = ()


def measure(
    walk: Walk,
    batches: Sequence[torch.Tensor],
    processes: Processes,
    first: int,
    samples: int,
    *,
    sizes: Sequence[int] = (),
    greedy: int = 0,
    taylor: bool = False,
    notebook: Path | None = None,
    progress: Progress | None = None,
) -> LossTables:
    """Measure the requested metrics. `batches` are this process's; `first`: number of its first sample among `samples`.

    `sizes`: block sizes n to leave out ("loss" and "kl"). `greedy`: layers to remove one by one. The results of
    finished passes are stored in `notebook` and reused by later calls.
    """
    progress = progress or Progress()
    book = Notebook(notebook)
    depth, seq_len = walk.depth, batches[0].shape[1]
    rows: dict[str, dict[int, torch.Tensor]] = {"loss": {}, "kl": {}}
    base: torch.Tensor | None = None
    for n in sizes:
        starts = [frozenset(range(l, l + n)) for l in range(depth - n + 1)]  # noqa: E741
        progress.stage(f"Loss without each block of {n}", depth, "layers")
        whole, loss, kl = _taken(
            book, f"leave-{n}", partial(leave_out, walk, batches, starts, progress=progress)
        )
        whole, loss, kl = processes.join([whole, loss, kl], first, samples)
        rows["loss"][n], rows["kl"][n], base = loss - whole[:, None], kl, whole
    tables = {
        name: table_of_rows(name, found, depth, seq_len=seq_len, samples=samples)
        for name, found in rows.items()
        if found
    }
    steps: list[dict[str, float]] = []
    removed: list[int] = []
    for number in range(greedy):
        left = [i for i in range(depth) if i not in removed]
        progress.stage(f"Greedy removal, {number + 1} of {greedy}", depth, "layers")
        candidates = [frozenset((i,)) for i in left]
        whole, loss, kl = _taken(
            book,
            f"greedy-{','.join(map(str, removed))}",
            partial(leave_out, walk, batches, candidates, frozenset(removed), progress=progress),
        )
        whole, loss = processes.join([whole, loss], first, samples)
        base = whole if base is None and not removed else base
        mean = loss.mean(0)
        best = int(mean.argmin())
        removed.append(left[best])
        steps.append({"layer": left[best], "loss": float(mean[best])})
    if taylor:
        progress.stage("Gradients", 2 * depth, "layers")
        (scores,) = _taken(book, "taylor", lambda: (taylor_scores(walk, batches, progress=progress),))
        (scores,) = processes.join([scores], first, samples)
        sums = {n: scores.unfold(1, n, 1).sum(-1) for n in range(1, depth + 1)}
        tables["taylor"] = table_of_rows("taylor", sums, depth, seq_len=seq_len, samples=samples)
    return LossTables(tables, None if base is None else float(base.mean()), tuple(steps))


def _taken(book: Notebook, name: str, make: Callable[[], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """What `make` returned under this name, now or in an earlier run."""
    found = book.take(name, lambda: [part.tolist() for part in make()])
    return [torch.tensor(values, dtype=torch.float64) for values in found]


def leave_out(
    walk: Walk,
    batches: Sequence[torch.Tensor],
    candidates: Sequence[Collection[int]],
    without: Collection[int] = (),
    *,
    progress: Progress | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Measure the model less `without`, and the same less each candidate's layers too.

    Returns float64, one row per sample: the loss of the former in nats per token [samples], the loss of each candidate
    [samples, candidates], and the KL divergence of each candidate's next-token distribution from the former's, mean
    over tokens [samples, candidates].
    """
    progress = progress or Progress()
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
    base, losses, divergences = [], [], []
    for b, tokens in enumerate(states.tokens):
        for s in range(len(tokens)):
            row = tokens[s : s + 1]
            full = walk.head(row, states[b][s : s + 1])[0].float().log_softmax(-1)
            base.append(_loss(full, row[0]))
            mine, apart = [], []
            for c in range(len(candidates)):
                cut = walk.head(row, streams[c][b][s : s + 1])[0].float().log_softmax(-1)
                mine.append(_loss(cut, row[0]))
                apart.append(float((full.exp() * (full - cut)).sum(-1).mean()))
            losses.append(mine)
            divergences.append(apart)
    return (
        torch.tensor(base, dtype=torch.float64),
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(divergences, dtype=torch.float64),
    )


def _loss(chances: torch.Tensor, tokens: torch.Tensor) -> float:
    """Nats per token; `chances` [seq, vocabulary]: log probabilities of the next token."""
    return float(torch.nn.functional.nll_loss(chances[:-1], tokens[1:].to(chances.device)))


def taylor_scores(
    walk: Walk, batches: Sequence[torch.Tensor], *, progress: Progress | None = None
) -> torch.Tensor:
    """First-order importance of each layer: the sum of |dL/dw * w| over its weights w, per sample: [samples, L].

    L is the loss of one sequence in nats per token. The backward pass recomputes each layer from its stored input, so
    only one layer is in memory at a time.
    """
    progress = progress or Progress()
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
            chances = walk.head(tokens, last, gradient=True)[0].float().log_softmax(-1)
            loss = torch.nn.functional.nll_loss(chances[:-1], tokens[0, 1:].to(chances.device))
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
    batches: Sequence[torch.Tensor]
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
        by_batch: dict[int, set[Choice]] = {}
        for choice in (c for choices in self.choices for c in choices):
            by_batch.setdefault(choice.batch, set()).add(choice)
        likelihood: dict[Choice, float] = {}
        for b, mine in by_batch.items():
            found = chances(b, max(len(choice.tokens) for choice in mine)).float()
            for choice in mine:
                tokens = torch.tensor(choice.tokens, device=found.device)
                likelihood[choice] = float(found[-len(tokens) :].gather(1, tokens[:, None]).sum())
        wrong = []
        for choices, right in zip(self.choices, self.right, strict=True):
            row = [likelihood[choice] for choice in choices]
            wrong.append(row.index(max(row)) not in right)
        return torch.tensor(wrong, dtype=torch.float64)
