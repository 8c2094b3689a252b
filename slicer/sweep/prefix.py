"""Caches the outputs of the layers before a cut, so that all cuts of a sweep share them.

A sweep runs the same prompts through one model many times, and cuts differ only from the first dropped (or healed)
layer on. The output of the layers before it is kept in memory for each batch, and the next cut continues from the
deepest cached layer. The outputs are stored exactly, so the scores are those of a full run.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slicer.model.layers import decoder_layers, replaced_forwards

_HOST = torch.device("cpu")


class Prefix:
    """Cache of the outputs of layers 0 .. i of the unpruned `model` for each batch, in up to `budget` bytes."""

    def __init__(self, model: Any, budget: int) -> None:
        self._model = model
        self._layers = list(decoder_layers(model))
        self._budget = budget
        self._kept: dict[tuple[int, str], Any] = {}  # (layers run, batch) -> what the last of them returned
        self._trusted: bool | None = None
        self._takes_cache_flag = "use_cache" in inspect.signature(model.forward).parameters
        self.taken = 0  # batches that continued from a cached output

    @contextlib.contextmanager
    def shared(self, start: int) -> Iterator[None]:
        """Inside the block, cache and reuse outputs of the layers before `start`; the model may be cut only from there.
        Generation is not cached: its layers keep a key-value cache of their own."""
        if start < 1 or self._trusted is False:
            yield
            return
        batch: list[str | None] = [None]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            batch[0] = name = _name(args, kwargs)
            if name is not None and self._trusted is None:
                self._trusted = self._holds(start, args, kwargs)
            if name is not None and self._trusted:
                return args, self._uncached(kwargs)
            batch[0] = None
            return None

        def instead(i: int, real: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                name = batch[0]
                if name is None:
                    return real(*args, **kwargs)
                known = self._deepest(start, name)
                if i < known:  # these layers pass the cached output through
                    if i < known - 1:
                        return self._kept[known, name]
                    self.taken += 1
                    device = next((p.device for p in self._layers[i].parameters()), _HOST)
                    return _copy(self._kept[known, name], device)
                output = real(*args, **kwargs)
                if i == start - 1:
                    self._keep(start, name, output)
                return output

            return forward

        hook = self._model.register_forward_pre_hook(before, with_kwargs=True)
        with hook, replaced_forwards(self._layers[:start], instead):
            yield

    def _uncached(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a pass without a key-value cache."""
        return {**kwargs, "use_cache": False} if self._takes_cache_flag else kwargs

    def _deepest(self, start: int, name: str) -> int:
        """The largest number of layers, at most `start`, with a cached output for the batch."""
        return next((i for i in range(start, 0, -1) if (i, name) in self._kept), 0)

    def _keep(self, start: int, name: str, output: Any) -> None:
        size = _bytes(output)
        if size is not None and size <= self._budget:
            self._budget -= size
            self._kept[start, name] = _copy(output, _HOST)

    def _holds(self, start: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the layers pass each other only their return values; tested on one batch."""
        given, found = self._uncached(kwargs), list[Any]()
        hook = self._layers[start - 1].register_forward_hook(lambda *called: found.append(called[-1]))
        run = self._model.forward  # not the model: its hook calls this function
        with torch.no_grad():
            with hook:
                expected = run(*args, **given).logits
            if len(found) != 1 or _bytes(found[0]) is None:
                return False
            try:
                with replaced_forwards(self._layers[:start], lambda i, real: lambda *args, **kwargs: found[0]):
                    got = run(*args, **given).logits
            except Exception:  # remote code raises many kinds
                return False
        return bool(torch.equal(got, expected))


def _name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Key of the model's inputs; None if there are others than tokens and masks, as in generation."""
    digest = hashlib.sha256()
    for key, value in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(value, torch.Tensor):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype} ".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif (key == "use_cache" and value) or not isinstance(value, bool | int | str | None):
            return None
        else:
            digest.update(f"{key} {value} ".encode())
    return digest.hexdigest()


def _bytes(output: Any) -> int | None:
    """Bytes of a layer's output; None if it contains anything but tensors."""
    if isinstance(output, torch.Tensor):
        return output.nbytes
    if isinstance(output, tuple):
        sizes = [0 if part is None else _bytes(part) for part in output]
        return None if any(size is None for size in sizes) else sum(size or 0 for size in sizes)
    return None


def _copy(output: Any, device: torch.device) -> Any:
    """A copy of a layer's output on `device`; a copy, because the next layer may write in place."""
    if isinstance(output, torch.Tensor):
        return output.detach().to(device, copy=True)
    return None if output is None else tuple(_copy(part, device) for part in output)
