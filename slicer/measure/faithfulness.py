"""How far a cut is from its source, before and after its repair, on documents of several kinds.

With p the source's distribution over the next token, and q that of the cut, the distance is KL(p || q) in nats, the
mean over the documents of a kind of the mean over the tokens of each. The share of it that a repair closes is

    1 - KL(p || repaired) / KL(p || cut)

Errors are standard errors over the documents, by leaving each of them out (jackknife).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from slicer.data.kinds import KindText
from slicer.model.pruned import Edits, PrunedRun, given
from slicer.model.walk import Walk
from slicer.plan.plan import Plan
from slicer.plan.records import KindRecord
from slicer.progress import Progress

_LOGITS = 1 << 23  # numbers: logits are computed for as many tokens at a time as have no more


@dataclass
class _Document:
    """Sums over the tokens of one document; of models: the cut, and the repaired cut."""

    tokens: int = 0
    predicted: int = 0  # tokens that follow another one
    far: list[float] = field(default_factory=lambda: [0.0, 0.0])  # KL from the source
    agree: list[int] = field(default_factory=lambda: [0, 0])  # the same most likely token as the source
    nats: list[float] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )  # cross entropy of the text: the source's, then theirs


def faithfulness(
    walk: Walk, plan: Plan, edits: Edits, texts: Sequence[KindText], progress: Progress
) -> tuple[KindRecord, ...]:
    """The distances of the cut of `plan` without and with `edits`, on each of `texts`; computed in float32.

    Runs the source once and the rest of both cuts once, layer by layer.
    """
    batches = [document for text in texts for document in text.documents]
    progress.stage("Comparing with the source", len(batches), "documents")
    found = []
    with walk.in_float32():
        run = PrunedRun.of_source(walk, plan, batches, range(len(batches)), min(edits, default=walk.depth))
        ends = run.ends(run.held, [given({}), given(edits)])
        for b in run.held:
            found.append(_compared(walk, batches[b], run.target[b], [streams[b] for streams in ends]))
            progress.advance()
    each, records = iter(found), []
    for text in texts:
        records.append(_record(text, [next(each) for _ in text.documents]))
    return tuple(records)


@torch.no_grad()
def _compared(walk: Walk, tokens: torch.Tensor, source: torch.Tensor, cuts: Sequence[torch.Tensor]) -> _Document:
    """`source`, `cuts`: the streams behind the last layer, [1, seq, d]."""
    sums, length = _Document(tokens.shape[1], tokens.shape[1] - 1), tokens.shape[1]
    step = max(1, _LOGITS // int(walk.model.config.get_text_config().vocab_size))
    for first in range(0, length, step):
        at = slice(first, min(first + step, length))
        p, *others = (walk.log_probabilities(tokens[:, at], states[:, at]) for states in (source, *cuts))
        following = tokens[0, at.start + 1 : at.stop + 1].to(p.device)
        for k, q in enumerate((p, *others)):
            sums.nats[k] += float(functional.nll_loss(q[: len(following)], following, reduction="sum"))
        for k, q in enumerate(others):
            sums.far[k] += float(functional.kl_div(q, p, reduction="sum", log_target=True))
            sums.agree[k] += int((q.argmax(-1) == p.argmax(-1)).sum())
    return sums


def _record(text: KindText, documents: Sequence[_Document]) -> KindRecord:
    """The record of one kind."""
    bare, healed = ([document.far[k] / document.tokens for document in documents] for k in (0, 1))
    count, predicted = sum(d.tokens for d in documents), sum(d.predicted for d in documents)
    mean = [sum(values) / len(documents) for values in (bare, healed)]
    left_out = [
        [(sum(values) - values[i]) / (len(documents) - 1) for values in (bare, healed)] for i in range(len(documents))
    ]
    agree = [sum(d.agree[k] for d in documents) / count for k in (0, 1)]
    source, before, after = (math.exp(min(50.0, sum(d.nats[k] for d in documents) / predicted)) for k in range(3))
    return KindRecord(
        text.kind, text.seen, len(documents), count, mean[0], mean[1],
        _jackknife([h - b for b, h in left_out]), _jackknife([1 - h / max(b, 1e-12) for b, h in left_out]),
        agree[0], agree[1], source, before, after,
    )  # fmt: skip


def _jackknife(values: Sequence[float]) -> float:
    """The standard error of an estimate whose `values` leave one document out each."""
    n, mean = len(values), sum(values) / len(values)
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in values))
