"""Documents of several kinds, on which a repair is reported: texts that come with slicer, and Python's own sources.

A document of calibration text has one purpose, by a hash of its words (`slicer.data.packing.purpose_of`): to fit, to
choose strengths and lengths of steps, or to report. A copy of a document has the same purpose.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from slicer.data.packing import encoded, mark_of
from slicer.data.sources import Document

SHIPPED = ("prose", "dialogue", "mathematics", "languages")
_MODULES = ("bisect", "colorsys", "fnmatch", "heapq", "netrc", "sched", "shlex", "statistics", "textwrap", "timeit")
DOCUMENTS = 8  # of a kind; tokens: the first ones of each, with BOS
TOKENS = 128
_FEWEST = 16  # tokens of a document


@dataclass(frozen=True)
class KindText:
    """Documents of one kind: int64 [1, tokens] each, at most `TOKENS`. `seen`: whether the fit reads such text."""

    kind: str
    documents: tuple[torch.Tensor, ...]
    seen: bool = False

    @classmethod
    def of(cls, kind: str, documents: Iterable[Document], tokenizer: Any, *, seen: bool = False) -> KindText:
        """The first `DOCUMENTS` that are long enough."""
        found = []
        for document in documents:
            tokens = encoded(document, tokenizer)[:TOKENS]
            if len(tokens) >= _FEWEST:
                found.append(torch.tensor([tokens], dtype=torch.int64))
            if len(found) == DOCUMENTS:
                break
        return cls(kind, tuple(found), seen)


def of_all_kinds(tokenizer: Any) -> list[KindText]:
    """Text of every kind that comes with slicer, and code; no fit reads it (see `is_reported`)."""
    return [KindText.of(kind, documents, tokenizer) for kind, documents in _documents().items()]


def is_reported(document: Document) -> bool:
    """Whether it is one of these documents."""
    return mark_of(document) in _marks()


@cache
def _documents() -> dict[str, list[str]]:
    shipped = {
        kind: [
            str(json.loads(line)["text"])
            for line in (files("slicer.data") / f"{kind}.jsonl").read_text("utf-8").splitlines()
        ]
        for kind in SHIPPED
    }
    return {**shipped, "code": list(_code())}


def _code() -> Iterator[str]:
    """Python's own sources, from the first function or class on."""
    for name in _MODULES:
        file = Path(sysconfig.get_path("stdlib"), f"{name}.py")
        if file.is_file():
            text = file.read_text("utf-8")
            first = re.search(r"^(def|class) ", text, re.MULTILINE)
            yield text[first.start() if first else 0 :][: 16 * TOKENS]


@cache
def _marks() -> frozenset[str]:
    return frozenset(mark_of(text) for documents in _documents().values() for text in documents)
