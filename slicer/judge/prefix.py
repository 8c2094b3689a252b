"""The layers before a cut, run once for all the cuts of a sweep that have them in common.

A sweep puts the same prompts to one model again and again, and cuts differ only from the first dropped (or healed)
layer on. What the layers before it make of a batch is kept in memory; the next cut takes it up, at the deepest layer
known. What is kept is what the layers returned, so every score is the one that running them again would give.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slicer.checkpoint.model import decoder_layers
from slicer.runtime.memory import KEPT_SHARE, available


class Prefix:
    """What layers 0 .. i of `model`, which is whole, return for the batches that it is given.

    `room` is the number of bytes that may be kept; None: a quarter of what is free.
    """

    def __init__(self, model: Any, room: int | None = None) -> None:
        self._model = model
        self._layers = list(decoder_layers(model))
        self._room = int(KEPT_SHARE * available()) if room is None else room
        self._kept: dict[tuple[int, str], Any] = {}  # (layers run, batch) -> what the last of them returned
        self._trusted: bool | None = None
        self._takes_cache_flag = "use_cache" in inspect.signature(model.forward).parameters
        self.taken = 0  # batches that a layer's output was taken up for

    @contextlib.contextmanager
    def shared(self, start: int) -> Iterator[None]:
        """Inside the block, with the model cut and healed only from layer `start` on, its first layers' outputs are
        kept and taken up. Text that is being written is left alone: there the layers keep a cache of their own."""
        if start < 1 or self._trusted is False:
            yield
            return
        batch: list[str | None] = [None]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            batch[0] = _name(args, kwargs)
            if batch[0] is None:
                return None
            if self._trusted is None:
                self._trusted = self._holds(start, args, kwargs)
            if not self._trusted:
                batch[0] = None
                return None
            return args, ({**kwargs, "use_cache": False} if self._takes_cache_flag else kwargs)

        def instead(i: int, real: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                name = batch[0]
                if name is None:
                    return real(*args, **kwargs)
                known = self._deepest(start, name)
                if i < known:  # the layers up to it only hand its output on
                    if i < known - 1:
                        return self._kept[known, name]
                    self.taken += 1
                    return _on(self._kept[known, name], self._layers[i])
                output = real(*args, **kwargs)
                if i == start - 1:
                    self._keep(start, name, output)
                return output

            return forward

        with _forwards(self._layers[:start], instead):
            hook = self._model.register_forward_pre_hook(before, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()

    def _deepest(self, start: int, name: str) -> int:
        """The most layers, at most `start`, whose output for a batch is known."""
        return next((i for i in range(start, 0, -1) if (i, name) in self._kept), 0)

    def _keep(self, start: int, name: str, output: Any) -> None:
        size = _bytes(output)
        if size is not None and size <= self._room:
            self._room -= size
            self._kept[start, name] = _off(output)

    def _holds(self, start: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the model's layers hand each other nothing but what they return: tried on one batch."""
        given = {**kwargs, "use_cache": False} if self._takes_cache_flag else kwargs
        found: list[Any] = []

        def noting(i: int, real: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = real(*args, **kwargs)
                if i == start - 1:
                    found.append(output)
                return output

            return forward

        def handing_on(i: int, real: Any) -> Any:
            return lambda *args, **kwargs: found[0]

        run = self._model.forward  # not the model itself: its hook is what asks
        with torch.no_grad():
            with _forwards(self._layers[:start], noting):
                expected = run(*args, **given).logits
            if len(found) != 1 or _bytes(found[0]) is None:
                return False
            try:
                with _forwards(self._layers[:start], handing_on):
                    got = run(*args, **given).logits
            except Exception:  # remote code raises anything
                return False
        return bool(torch.equal(got, expected))


@contextlib.contextmanager
def _forwards(layers: list[nn.Module], instead: Any) -> Iterator[None]:
    """Inside the block, calling layer i is `instead(i, its forward)`."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for i, layer in enumerate(layers):
            layer.forward = instead(i, layer.forward)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            if old is None:
                del layer.forward
            else:
                layer.forward = old


def _name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """A name for what the model is called with; None where that is more than tokens and masks, as in writing text."""
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
    """Bytes of what a layer returned; None where it is more than tensors."""
    if isinstance(output, torch.Tensor):
        return output.nbytes
    if isinstance(output, tuple):
        sizes = [0 if part is None else _bytes(part) for part in output]
        return None if any(size is None for size in sizes) else sum(size or 0 for size in sizes)
    return None


def _off(output: Any) -> Any:
    """A copy in the host's memory."""
    if isinstance(output, torch.Tensor):
        return output.detach().to("cpu", copy=True)
    return None if output is None else tuple(_off(part) for part in output)


def _on(output: Any, layer: nn.Module) -> Any:
    """A copy of what was kept, on the device of `layer`: the next one may write into it."""
    if isinstance(output, torch.Tensor):
        device = next((parameter.device for parameter in layer.parameters()), output.device)
        return output.to(device, copy=True)
    return None if output is None else tuple(_on(part, layer) for part in output)
