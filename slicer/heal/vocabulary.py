"""A part of the vocabulary that stands for all of it.

Where only the slope of a loss is asked for, most rows of a large head say nothing and take most of the time.

Likely tokens are taken as they are. The others are stood for by a sample of them, whose chances count as many times as
there are tokens to each of the sample: their sum is right on average, so that the loss still holds the model back from
giving chances to tokens that no text has.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LIKELY = 12288  # tokens taken as they are, at most, but for those that must be among them
SAMPLE = 4096  # tokens that stand for the others


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`: int64 [v], ascending. `offset`: float32 [v], to be added to their logits: the log of the number of
    tokens that each stands for."""

    tokens: torch.Tensor
    offset: torch.Tensor

    def index(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where `tokens`, which must be among them, stand: int64 of the same shape."""
        return torch.searchsorted(self.tokens, tokens)


def choose(likelihood: torch.Tensor, wanted: torch.Tensor, seed: int = 0) -> Vocabulary:
    """The `wanted` tokens and the most likely others, by `likelihood` [V], and a sample of the rest.

    All of the vocabulary where that saves little.
    """
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
    """Inside the block the head of `model` gives the logits of the vocabulary's tokens alone.

    False, and the head as it is, where that is no plain matrix or the vocabulary is whole.
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
