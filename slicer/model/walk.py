"""Runs a model layer by layer, all batches through one layer before the next: loaded, or streamed from disk.

Masks, position embeddings and other arguments of a layer are those of the model's own forward pass: it is run with
every layer's `forward` replaced by a recorder. So any class works unchanged whose layers pass each other only hidden
states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ArchitectureError, PlanError
from slicer.model.layers import decoder_layers, hidden_in, hidden_of, replaced_forwards
from slicer.model.load import load_model
from slicer.model.offload import OffloadedModel
from slicer.model.precision import in_float32, outside_in_float32
from slicer.model.states import Batches, StateBudget, States
from slicer.runtime import memory
from slicer.runtime.compute import Compute

Listener = Callable[[int, torch.Tensor], None]
_Call = Callable[[nn.Module, torch.Tensor], Any]  # calls a layer on hidden states, with recorded other arguments


class _Captured(BaseException):
    """Ends a forward pass once every layer's arguments are recorded; a BaseException, so no handler stops it."""


class Walk:
    """Runs the decoder layers of a model one by one. Create with `open_walk`, `in_memory` or `out_of_core`.

        walk = Walk.out_of_core(path)
        states = walk.start(batches)              # x(0)
        for i in range(walk.depth):
            walk.advance(i, states)               # x(i) -> x(i+1), in place
        logits = walk.logits(states, 0)

    Gradients are off by default. To skip a layer, do not call `advance` for it; to run the rest of the model after a
    cut, use `states.copy()` and `along`.

    Attributes:
        model: the transformers model; out of core, only the layer in use has weights.
        layers: its decoder layers.
        depth: L.
        trust_remote_code: whether the checkpoint's own Python code may run, for its tokenizer too.
        activations: cache for the folds of many cuts on one text; None: every fold runs the source itself.
        directory: for states beyond the budget, and for finished stages of a fold; None: a temporary one, no stages.
    """

    def __init__(self, model: Any, offloaded: OffloadedModel | None, budget: StateBudget) -> None:
        self.model, self._offloaded, self._budget = model, offloaded, budget
        self.layers = decoder_layers(model)
        self.depth = len(self.layers)
        self.trust_remote_code = False
        self.activations: SourceActivations | None = None
        self.directory = budget.directory
        self._order: tuple[int, ...] = tuple(range(self.depth))
        self._calls: list[list[_Call]] = []  # by batch, then by layer
        self._known: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        self._open: dict[int, int] = {}  # loaded layers -> number of `layer` blocks that use them
        self._casts = False  # whether layers in use are float32
        self._shape: Callable[[torch.Tensor], Any] | None = None
        self._passed_on: list[int] = []  # ids of the values that a layer returns besides its states

    @classmethod
    def in_memory(cls, model: Any, *, memory_bytes: int | None = None, directory: Path | None = None) -> Self:
        """Walk over a loaded model, on its own devices. States beyond `memory_bytes` go to files in `directory`."""
        return cls(model, None, StateBudget(memory_bytes, directory))

    @classmethod
    def out_of_core(
        cls,
        checkpoint: Checkpoint | Path,
        compute: Compute = Compute(),  # noqa: B008 (frozen)
        *,
        directory: Path | None = None,
        **changed: Any,
    ) -> Self:
        """Walk over a checkpoint on disk, with one layer in memory while the next one is read.

        `changed` are fields of `compute` with another value. Its `memory` limits weights and states together: states
        get what the layers leave. If it is too small for two layers, the next one is not read ahead; None: no limit.
        Raises SourceError.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint.open(checkpoint)
        compute = replace(compute, **changed)
        offloaded, limit = OffloadedModel(checkpoint, compute), compute.memory
        largest = max(map(offloaded.layer_bytes, range(len(offloaded.layers))))
        ahead = limit is None or limit >= 3 * largest
        if limit is not None:
            limit = max(0, limit - (2 if ahead else 1) * largest)
        offloaded.reads_ahead = ahead
        return cls(offloaded.model, offloaded, StateBudget(limit, directory))

    def close(self) -> None:
        """Release the model. A closed walk cannot run; a name that still refers to it keeps no memory."""
        if self._offloaded is not None:
            self._offloaded.close()
        self.__dict__.clear()

    @property
    def loaded(self) -> bool:
        """Whether the full model is in memory; else its layers are read from disk, each time that they run."""
        return self._offloaded is None

    @property
    def bytes_read(self) -> int:
        """Bytes of layers read from disk so far."""
        return self._offloaded.bytes_read if self._offloaded is not None else 0

    @property
    def device(self) -> torch.device:
        """The device of the model's input tokens."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def layer_bytes(self, i: int) -> int:
        """Bytes to read from disk for layer i; 0 for a loaded model."""
        return self._offloaded.layer_bytes(i) if self._offloaded is not None else 0

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Inside the block, a 16-bit model computes in float32, loaded or streamed; each layer is cast while it is in
        use."""
        before, self._casts = self._casts, True
        try:
            with outside_in_float32(self.model, self.layers):
                yield
        finally:
            self._casts = before

    @contextlib.contextmanager
    def reserved(self, nbytes: int) -> Iterator[None]:
        """Inside the block states leave so much more of the host's memory free; a block on a GPU needs none of it."""
        limit = self._budget.limit
        if limit is not None and self.device.type == "cpu":
            self._budget.limit = max(0, limit - nbytes)
        try:
            yield
        finally:
            self._budget.limit = limit

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host: in memory up to the budget, else in a file. Raises OutputError."""
        return self._budget.tensor(tensor.shape, tensor.dtype, pin=tensor.is_cuda).copy_(tensor)

    @contextlib.contextmanager
    def along(self, order: Sequence[int]) -> Iterator[None]:
        """Read layers ahead in this order inside the block. The default order is all layers."""
        before, self._order = self._order, tuple(order)
        try:
            yield
        finally:
            self._order = before

    def start(self, batches: Batches) -> States:
        """Record the arguments of every layer and return x(0) of every batch (int64 [batch, seq], no padding).

        Raises ArchitectureError if the layers pass each other more than hidden states.
        """
        states = States(list(batches), self._budget)
        self._calls, self._known = [], {}
        with torch.no_grad():
            for at, tokens in enumerate(batches):
                if self._shape is None:
                    self._shape = self._learn_shape(tokens)
                calls, first = self._capture(tokens)
                self._calls.append(calls)
                states[at] = first
        return states

    @contextlib.contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """Layer i with its weights on the device; they are freed when the outermost block for i ends."""
        if self._offloaded is not None and not self._open.get(i):
            after = self._order[self._order.index(i) + 1] if i in self._order[:-1] else None
            self._offloaded.place(i, self._offloaded.fetch(i, after))
        precision = self._precision(i)
        self._open[i] = self._open.get(i, 0) + 1
        try:
            with precision:
                yield self.layers[i]
        finally:
            self._open[i] -= 1
            if self._offloaded is not None and not self._open[i]:
                self._offloaded.release(i)

    def _precision(self, i: int) -> contextlib.AbstractContextManager[None]:
        """For layer i, whose weights are in place: float32 inside `in_float32`, unless the layer is open already."""
        casts = self._casts and not self._open.get(i)
        return in_float32(self.layers[i].parameters()) if casts else contextlib.nullcontext()

    def advance(
        self, i: int, states: States, listener: Listener | None = None, *, only: Iterable[int] | None = None
    ) -> None:
        """Run layer i over all batches; replaces `states` in place by x(i+1).

        `only`: the batches to run, if the others are no longer needed. `listener(b, x)` gets the new states of each
        batch, [batch, seq, d], on the device. Hooks on the module of `layer(i)` are active. States of any earlier layer
        are accepted: the layers between are skipped. Raises PlanError for states past layer i.
        """
        if states.layer > i:
            raise PlanError(f"the states are at layer {states.layer}, past layer {i}; start again")
        with self.layer(i), torch.no_grad():
            for b in range(len(states)) if only is None else only:
                new = self.call(i, b, states[b])
                if listener is not None:
                    listener(b, new)
                states[b] = new
        states.layer = i + 1

    def call(self, i: int, batch: int, states: torch.Tensor, *, gradient: bool = False) -> torch.Tensor:
        """Output of layer i for `states`, [batch, seq, d], as x(i) of that batch; stores nothing.

        With `gradient`, the output is differentiable.
        """
        with self.layer(i) as layer, torch.set_grad_enabled(gradient):
            states = states.to(self.device_of(layer), non_blocking=states.is_pinned())
            return hidden_of(self._calls[batch][i](layer, states))

    def device_of(self, layer: nn.Module) -> torch.device:
        """The device of a layer in use."""
        return next((p.device for p in layer.parameters()), self.device)

    def run(self, states: States, layers: Sequence[int]) -> States:
        """Advance through `layers` (ascending), reading ahead along them."""
        with self.along(layers):
            for i in layers:
                self.advance(i, states)
        return states

    def logits(self, states: States, batch: int) -> torch.Tensor:
        """Logits of a batch, [batch, seq, vocabulary], on the device, with its states as x(L)."""
        return self.head(states.tokens[batch], states[batch])

    def head(self, tokens: torch.Tensor, last: torch.Tensor, *, gradient: bool = False) -> torch.Tensor:
        """Logits from `last`, [batch, seq, d], as x(L) of `tokens`: the final norm, the head, and whatever else the
        model does there. With `gradient`, they are differentiable."""
        shape = self._shape = self._shape or self._learn_shape(tokens)
        device = self.device
        output = shape(last.to(device))
        passing = replaced_forwards(self.layers, lambda i, _: lambda *args, **kwargs: output)
        with torch.set_grad_enabled(gradient), passing:
            logits: torch.Tensor = self.model(input_ids=tokens.to(device), use_cache=False).logits
        return logits

    def log_probabilities(self, tokens: torch.Tensor, last: torch.Tensor, *, gradient: bool = False) -> torch.Tensor:
        """Log probabilities [seq, vocabulary], float32, of the token after each one of a sequence [1, seq], from `last`
        [1, seq, d] taken as its x(L)."""
        return self.head(tokens, last, gradient=gradient)[0].float().log_softmax(-1)

    def _learn_shape(self, tokens: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        """Find out from the first layer, on a few tokens, whether layers return states alone or first in a tuple."""
        found: list[Any] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            found.append((args, kwargs))
            raise _Captured

        few = tokens[:1, : min(8, tokens.shape[1])]
        with torch.no_grad():
            with replaced_forwards(self.layers, lambda i, _: record), contextlib.suppress(_Captured):
                self._decoder(few)
            args, kwargs = found[0]
            reads = self._offloaded if not self._open.get(0) else None
            if reads is not None:
                stored = reads.fetch(0, None)
                reads.place(0, stored)
            with self._precision(0):
                output = self.layers[0](*args, **kwargs)
            if reads is not None:
                reads.release(0)
                reads.keep(0, stored)  # layer 0 is most likely used next
        if isinstance(output, torch.Tensor):
            return lambda states: states
        rest = output[1:]
        self._passed_on = [id(value) for value in rest if isinstance(value, torch.Tensor)]
        return lambda states: (states, *rest)

    def _capture(self, tokens: torch.Tensor) -> tuple[list[_Call], torch.Tensor]:
        """Arguments of every layer, and x(0), for one batch."""
        calls: list[_Call] = []
        first: list[torch.Tensor] = []
        shape = self._shape
        assert shape is not None

        def record(i: int, *args: Any, **kwargs: Any) -> Any:
            states = hidden_in(args, kwargs)
            first.append(states)
            calls.append(self._call(args, kwargs))
            if i == self.depth - 1:
                raise _Captured
            return shape(states)

        with replaced_forwards(self.layers, lambda i, _: partial(record, i)), contextlib.suppress(_Captured):
            self._decoder(tokens)
        if len(calls) != self.depth:
            raise ArchitectureError(
                f"{type(self.model).__name__}: the forward pass calls {len(calls)} of its {self.depth} decoder layers"
            )
        return calls, first[0]

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        rest = self._kept(args[1:])
        named = {k: self._kept(v) for k, v in kwargs.items() if args or k != "hidden_states"}
        if args:
            return lambda layer, states: layer(states, *rest, **named)
        return lambda layer, states: layer(hidden_states=states, **named)

    def _kept(self, value: Any) -> Any:
        """`value` with its tensors replaced by equal stored ones: batches of one length share their masks."""
        if isinstance(value, tuple | list):
            return type(value)(map(self._kept, value))
        if isinstance(value, dict):
            return {k: self._kept(v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in self._passed_on:
            raise ArchitectureError(
                f"{type(self.model).__name__}: its layers pass each other more than hidden states, so they cannot be "
                "run one by one; use enough memory to load the model"
            )
        alike = self._known.setdefault((value.shape, value.dtype, value.device), [])
        for known in alike:
            if known is value or torch.equal(known, value):
                return known
        if len(alike) < 16:
            alike.append(value)
        return value

    def _decoder(self, tokens: torch.Tensor) -> Any:
        """Run the model without its head."""
        return self.model.base_model(input_ids=tokens.to(self.device), use_cache=False)


@contextlib.contextmanager
def open_walk(
    checkpoint: Checkpoint, compute: Compute, *, loads: bool, directory: Path | None = None
) -> Iterator[Walk]:
    """A walk over the model of `checkpoint`, in the precision and on the device of `compute`.

    `loads`: whether the whole model is loaded; else its layers are read from disk one at a time. Weights and states
    take up to `compute.memory` bytes of the host; further states go to files in `directory`. The walk is closed when
    the block ends, so a name that outlives the block keeps no model. Raises SourceError.
    """
    limit = memory.budget(compute)
    if loads:
        model = load_model(checkpoint.path, compute)
        on_host = checkpoint.bytes_as(compute.dtype) if model.device.type == "cpu" else 0
        walk = Walk.in_memory(model, memory_bytes=max(0, limit - on_host), directory=directory)
        del model
    else:
        walk = Walk.out_of_core(checkpoint, compute, memory=limit, directory=directory)
    walk.trust_remote_code = compute.trust_remote_code
    try:
        yield walk
    finally:
        walk.close()
        memory.release()


def next_token_loss(log_probabilities: torch.Tensor, tokens: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy in nats of the tokens of one sequence [seq] after its first, from log probabilities
    [seq, vocabulary] of the token after each: the mean over tokens, or their "sum"."""
    following = tokens[1:].to(log_probabilities.device)
    return nn.functional.nll_loss(log_probabilities[:-1], following, reduction=reduction)


def walk_loss(walk: Walk, tokens: Batches, last: Callable[[int], torch.Tensor], batches: Iterable[int]) -> float:
    """Mean next-token cross entropy of these `batches` of `tokens`, nats, from `last(b)`, [batch, seq, d], taken as
    x(L) of batch b. Computes the logits of one sequence at a time, because they are large."""
    total, count = 0.0, 0
    for b in batches:
        states, nats = last(b), 0.0
        for row in range(len(states)):
            chances = walk.log_probabilities(tokens[b][row : row + 1], states[row : row + 1])
            nats += float(next_token_loss(chances, tokens[b][row], "sum"))
        total, count = total + nats, count + len(states) * (states.shape[1] - 1)
    return total / count


class SourceActivations:
    """Caches the output of every layer for a fixed set of batches, so repeated passes through the source are skipped.

    Uses up to `budget` bytes; layers that do not fit are run again.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._tokens: list[torch.Tensor] | None = None

    def advance(self, walk: Walk, i: int, states: States) -> None:
        """Replace `states` x(i) of the unpruned model by x(i+1). Raises ValueError for other batches than before."""
        self._tokens = known = self._tokens or states.tokens
        if known is not states.tokens and not all(map(torch.equal, known, states.tokens)):
            raise ValueError("the batches differ from the cached ones")
        kept = self._kept.get(i)
        if kept is not None and kept[0].dtype == states[0].dtype:
            for b, state in enumerate(kept):
                states[b] = state
            states.layer = i + 1
            return
        walk.advance(i, states)
        if kept is None and states.nbytes <= self._budget:
            self._budget -= states.nbytes
            self._kept[i] = [state.clone() for state in states]
