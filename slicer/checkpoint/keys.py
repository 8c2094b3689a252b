"""Maps tensor names of a loaded model to raw keys on disk, which may have other prefixes.

A checkpoint of the bare model lacks the outermost name, one of a wrapper may have an extra one, and old multimodal
checkpoints store the decoder elsewhere. Numbered layers of other towers are not decoder layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from slicer.checkpoint.reader import Checkpoint

_NUMBERED = re.compile(r"((?:[^.]+\.)*?)(\d+)\.(.+)")
_TOWERS = ("vision", "visual", "image", "audio", "mtp")  # towers other than the decoder


class KeyMap:
    """Raw keys in `checkpoint` of the tensors and modules of a loaded model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._keys = checkpoint.tensors.keys()
        self._layers = checkpoint.layer_prefix
        self._lists = {match[1] for key in self._keys if (match := _NUMBERED.match(key))}
        self._outermost = sorted({key.partition(".")[0] for key in self._keys if "." in key})

    def layer(self, name: str) -> tuple[int, str] | None:
        """(i, name within the layer) of a tensor or module of decoder layer i; None for everything else.

        Layer i need not exist: the name may come from an adapter of another cut.
        """
        match = _NUMBERED.match(name)
        if match is None:
            return None
        inside = int(match[2]), match[3]
        for home in self._homes(match[1]):
            if home == self._layers:
                return inside
            if home in self._lists:
                return None
        return None if any(word in match[1] for word in _TOWERS) else inside

    def key(self, name: str) -> str | None:
        """The raw key of the loaded model's tensor `name`; None if there is none."""
        found = self.layer(name)
        places = self._homes(name) if found is None else iter([self.in_layer(*found)])
        return next((place for place in places if place in self._keys), None)

    def in_layer(self, index: int, name: str) -> str:
        """The raw key of a decoder layer's tensor, whether it exists or not."""
        return f"{self._layers}{index}.{name}"

    def _homes(self, name: str) -> Iterator[str]:
        yield name
        if inner := name.partition(".")[2]:
            yield inner
        for outer in self._outermost:
            yield f"{outer}.{name}"
