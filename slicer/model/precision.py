"""16-bit models that compute in float32, of which only what is in use takes the memory of float32."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from slicer.model.layers import attached, replaced_forwards
from slicer.model.load import Model

HALVES = (torch.bfloat16, torch.float16)
_ROWS = 4096  # of a head that are float32 at a time


@contextlib.contextmanager
def in_float32(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block, 16-bit `parameters` hold float32 copies; afterwards their own tensors again."""
    halves = [(p, p.data) for p in parameters if p.dtype in HALVES]
    try:
        for parameter, data in halves:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in halves:
            parameter.data = data


@contextlib.contextmanager
def outside_in_float32(model: Model, layers: nn.ModuleList) -> Iterator[None]:
    """Inside the block, the 16-bit modules outside `layers` compute in float32.

    Embeddings stay as they are: the rows in use are cast. Of a head that is a plain matrix, a few rows at a time are.
    """
    within = {id(module) for module in layers.modules()}
    head = model.get_output_embeddings()
    heads = [head] if type(head) is nn.Linear and head.weight.dtype in HALVES else []
    embeddings = [m for m in model.modules() if id(m) not in within and _looks_up(m)]
    apart = {id(m.weight) for m in (*heads, *embeddings)} | {id(p) for p in layers.parameters()}
    with (
        in_float32(p for p in model.parameters() if id(p) not in apart),
        attached(handle for each in embeddings for handle in _casting_rows(each)),
        replaced_forwards(heads, lambda i, real: lambda states: _multiplied(heads[i], states)),
    ):
        yield


def _looks_up(module: nn.Module) -> bool:
    """Whether this is a 16-bit embedding that is called with the numbers of its rows."""
    takes_rows = next(iter(inspect.signature(module.forward).parameters), None) in ("input", "input_ids")
    return isinstance(module, nn.Embedding) and takes_rows and module.weight.dtype in HALVES


def _casting_rows(module: nn.Embedding) -> Iterator[Any]:
    """The handles of hooks with which `module` looks up float32 rows."""
    stored: list[tuple[torch.Tensor, int | None]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        wanted = args[0] if args else next(iter(kwargs.values()))
        rows, places = wanted.unique(return_inverse=True)
        stored[:] = [(module.weight.data, module.padding_idx)]
        module.padding_idx = None  # a number of the whole table, which matters for gradients only
        module.weight.data = module.weight.data[rows.to(module.weight.device)].float()
        return (places,), {}

    def after(*_: Any) -> None:
        module.weight.data, module.padding_idx = stored.pop()

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after, always_call=True)


def _multiplied(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """What `head` returns for `states`, in float32."""
    states = states.to(head.weight.device)  # as the forward replaced does, in a spread model
    parts = [functional.linear(states, rows.float()) for rows in torch.split(head.weight, _ROWS)]
    logits = torch.cat(parts, -1)
    return logits if head.bias is None else logits + head.bias.float()
