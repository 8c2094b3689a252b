"""The loss that the second-order steps lower, from the states behind a model's last layer, and its gradients there.

With p the source's distribution over the next token, q the pruned model's, and y the token that follows, in nats:

    L = (1 - MIX) KL(p || q) - MIX log q(y)

L is measured over the whole vocabulary. Its gradients are computed over a part of it: all likely tokens, and a sample
of the others, because most rows of a large head add little and take most of the time. Each sampled token is weighted by
the number of tokens that it represents, so the sum over the others is unbiased, and the loss still
penalises probability on tokens that occur in no text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slicer.model.states import States
from slicer.model.walk import Walk

MIX = 0.25  # share of the text itself in the loss
STRIDE = 2  # one position in this many of the held-out sequences is judged
LIKELY = 12288  # most likely tokens that are all included; more only where the text has more tokens
SAMPLE = 4096  # tokens that are sampled from the others
_Piece = tuple[slice, slice]  # sequences of a batch, positions
LOGITS = 1 << 23  # numbers: logits are computed for as many tokens at a time as have no more


class Objective:
    """L of the model of `walk`.

    Args:
        target: the states of the source behind its last layer, and the tokens.
        held: the batches that L is judged on.
    """

    def __init__(self, walk: Walk, target: States, held: Sequence[int]) -> None:
        self._walk, self._target, self._held = walk, target, held
        self._size = int(walk.model.config.get_text_config().vocab_size)
        self._certainty = 0.0  # sum of p log p over the positions judged
        likelihood: Any = 0.0
        for b in held:
            for at in self._pieces(b, STRIDE, self._size):
                p = self._source(b, at)
                self._certainty -= float(torch.special.entr(p).double().sum())
                likelihood += p.sum((0, 1))
        self._vocabulary = choose(likelihood, torch.cat([tokens.flatten() for tokens in target.tokens]))

    @torch.no_grad()
    def judge(self, models: Sequence[Mapping[int, torch.Tensor]]) -> list[tuple[float, float]]:
        """L and KL(p || q) of each of `models`: by held-out batch, its stream behind the last layer [batch, seq, d]."""
        far, text, count = [self._certainty] * len(models), [0.0] * len(models), 0
        for b in self._held:
            for at in self._pieces(b, STRIDE, self._size):
                p = self._source(b, at)
                following, there = (t.to(p.device) for t in self._following(b, at))
                count += p.shape[:-1].numel()
                for k, model in enumerate(models):
                    logits = self._walk.head(self._target.tokens[b][at], model[b][at]).float()
                    size = logits.logsumexp(-1)
                    far[k] += float((size - torch.linalg.vecdot(p, logits)).double().sum())
                    right = logits.gather(-1, following)[..., 0]
                    text[k] += float(((size - right) * there).double().sum())
        return [(((1 - MIX) * f + MIX * t) / count, f / count) for f, t in zip(far, text, strict=True)]

    def slopes(
        self, b: int, last: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of L, and of the log likelihood of tokens drawn from q, along `last`, [batch, seq, d].

        The latter are zero without a generator. A sum over positions, not a mean.
        """
        asked, drawn = torch.zeros_like(last), torch.zeros_like(last)
        tokens = self._target.tokens[b]
        with narrowed(self._walk.model, self._vocabulary) as part:
            offset = self._vocabulary.offset if part else None
            for at in self._pieces(b, 1, len(self._vocabulary.tokens) if part else self._size):
                wanted = self._wanted(b, at, offset)
                x = last[at].detach().requires_grad_()
                logits = self._walk.head(tokens[at], x, gradient=True)
                q = _chances(logits.detach(), offset)
                keep = generator is not None
                asked[at] = torch.autograd.grad(logits, x, wanted.neg_().add_(q).to(logits.dtype), retain_graph=keep)[0]
                if generator is not None:
                    point = torch.rand((*q.shape[:-1], 1), generator=generator).to(q.device)
                    token = torch.searchsorted(q.cumsum(-1), point).clamp_(max=q.shape[-1] - 1)
                    slope = q.scatter_add_(-1, token, -torch.ones_like(point)).to(logits.dtype)
                    drawn[at] = torch.autograd.grad(logits, x, slope)[0]
        return asked, drawn

    def _pieces(self, b: int, stride: int, vocabulary: int) -> Iterator[_Piece]:
        """The tokens of a batch, every `stride`-th of each sequence, as many at a time as `LOGITS` allows."""
        rows, length = self._target.tokens[b].shape
        most = max(1, LOGITS // vocabulary)
        together = max(1, most * stride // length)
        for row in range(0, rows, together):
            for first in range(0, length, most * stride):
                yield slice(row, row + together), slice(first, min(first + most * stride, length), stride)

    def _source(self, b: int, at: _Piece, offset: torch.Tensor | None = None) -> torch.Tensor:
        """p of the tokens `at`: float32 [sequences, positions, vocabulary]."""
        with torch.no_grad():
            return _chances(self._walk.head(self._target.tokens[b][at], self._target[b][at]), offset)

    def _following(self, b: int, at: _Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """The token after each of `at`, int64 [sequences, positions, 1]; and 1 where there is one, else 0,
        [positions]."""
        tokens, positions = self._target.tokens[b][at[0]], torch.arange(at[1].start, at[1].stop, at[1].step) + 1
        there = (positions < tokens.shape[1]).float()
        return tokens[:, positions.clamp(max=tokens.shape[1] - 1)][..., None], there

    def _wanted(self, b: int, at: _Piece, offset: torch.Tensor | None) -> torch.Tensor:
        """(1 - MIX) p + MIX (the token that follows): dL/dlogits is q less this. In the narrowed vocabulary where there
        is an offset."""
        p = self._source(b, at, offset)
        following, there = self._following(b, at)
        if offset is not None:
            following = self._vocabulary.index(following)
        share = (MIX * there).to(p.device)[None, :, None].expand(len(p), -1, 1)
        return p.mul_(1 - share).scatter_add_(-1, following.to(p.device), share.contiguous())


def _chances(logits: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """q = softmax(logits + offset), float32; `offset`: that of `Vocabulary`, or None."""
    return (logits.float() if offset is None else logits.float() + offset.to(logits.device)).softmax(-1)


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`: int64 [v], ascending. `offset`: float32 [v], added to their logits: the log of how many tokens each
    represents."""

    tokens: torch.Tensor
    offset: torch.Tensor

    def index(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions in the vocabulary of `tokens`, which it must contain: int64 of the same shape."""
        return torch.searchsorted(self.tokens, tokens)


def choose(likelihood: torch.Tensor, wanted: torch.Tensor, seed: int = 0) -> Vocabulary:
    """The `wanted` tokens, the most likely others by `likelihood` [V], and a sample of the rest; or the complete
    vocabulary if a part of it would save little."""
    size = len(likelihood)
    likelihood = likelihood.detach().float().cpu().clone()
    likelihood[wanted.flatten().cpu()] = float("inf")
    if size <= 2 * (LIKELY + SAMPLE) or int(likelihood.isinf().sum()) + SAMPLE > size // 2:
        return Vocabulary(torch.arange(size), torch.zeros(size))
    count = max(LIKELY, int(likelihood.isinf().sum()))
    order = torch.argsort(likelihood, descending=True, stable=True)
    likely, rest = order[:count], order[count:]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:SAMPLE]]
    weight = torch.full((len(drawn),), math.log(len(rest) / len(drawn)))
    tokens, places = torch.cat([likely, drawn]).sort()
    return Vocabulary(tokens, torch.cat([torch.zeros(count), weight])[places])


@contextlib.contextmanager
def narrowed(model: Any, vocabulary: Vocabulary) -> Iterator[bool]:
    """Inside the block the head of `model` computes logits for the vocabulary's tokens only.

    Gives False, and changes nothing, if the head is not a plain matrix or the vocabulary is complete.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or len(vocabulary.tokens) == head.weight.shape[0]:
        yield False
        return
    weight, bias = head.weight, head.bias
    at = vocabulary.tokens.to(weight.device)
    try:  # other parameters than before: a tied embedding keeps its own
        head.weight = nn.Parameter(weight.data[at], requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(bias.data[at], requires_grad=False)
        yield True
    finally:
        head.weight = weight
        if bias is not None:
            head.bias = bias
