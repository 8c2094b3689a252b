"""Packs documents into sequences of tokens, in memory or in a file; marks which tokens of conversations are learned."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch

from slicer.data.sources import Conversation, Document, TextSpec
from slicer.errors import CalibrationError, reason_of

_PIECE = 64  # a document longer than this many characters per token of a sequence is split
_TOGETHER = 256  # documents tokenized per call
Piece = tuple[Document, bool]  # a document or a part of one, and whether the document ends with it


class TokenStream:
    """Joins documents with an end-of-text token and cuts them into sequences of `seq_len` tokens.

    Each sequence starts with BOS if the tokenizer adds it.

    Attributes:
        mark_prompts: whether tokens of conversations outside the answers are given as -1 - token.
        talks: whether there was a conversation.
        count: tokens so far, without BOS.
        body: tokens of a sequence, without BOS.
    """

    def __init__(self, tokenizer: Any, seq_len: int, *, mark_prompts: bool = False) -> None:
        self._tokenizer, self._bos, self._end = tokenizer, leading_token(tokenizer), tokenizer.eos_token_id
        self.mark_prompts, self.talks, self.count = mark_prompts, False, 0
        self.body = seq_len - (self._bos is not None)
        self._waiting: list[int] = []

    def add(self, pieces: Sequence[Piece], source: str) -> Iterator[list[int]]:
        """Append `pieces`; gives each sequence that is full. Raises CalibrationError naming `source`."""
        texts = [text for text, _ in pieces if isinstance(text, str)]
        plain = iter(self._ids(texts)) if texts else iter(())
        for text, ends in pieces:
            if isinstance(text, str):
                new = next(plain)
                if ends and self._end is not None:
                    new = [*new, self._end]
            else:  # the chat template ends a conversation
                self.talks = True
                new = self._conversation(text, source)
            self.count += len(new)
            self._waiting += new
            full = len(self._waiting) // self.body * self.body
            rows, self._waiting = self._waiting[:full], self._waiting[full:]
            for at in range(0, full, self.body):
                yield ([] if self._bos is None else [self._bos]) + rows[at : at + self.body]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _conversation(self, messages: Conversation, source: str) -> list[int]:
        if not self.mark_prompts:
            with _template_errors(source):
                return self._ids([str(self._tokenizer.apply_chat_template(messages, tokenize=False))])[0]
        ids: list[int] = []
        for text, learned in answers(messages, self._tokenizer, source):
            (part,) = self._ids([text])
            ids += part if learned else [-1 - i for i in part]
        return ids


def pack(documents: Iterable[Document], tokenizer: Any, spec: TextSpec) -> torch.Tensor:
    """The first `spec.samples` sequences of `documents`: int64 [samples, seq_len].

    Raises CalibrationError if there is too little text.
    """
    stream, rows, found = TokenStream(tokenizer, spec.seq_len), list[list[int]](), False
    for document in documents:
        if isinstance(document, str) and not document.strip():
            continue
        found = True
        rows += islice(stream.add([(document, True)], spec.name), spec.samples - len(rows))
        if len(rows) == spec.samples:
            return torch.tensor(rows, dtype=torch.int64)
    if not found:
        raise CalibrationError(f"{spec.name}: no text in it; pass a file with text, or --calibration self")
    remedy = f", or use --samples {len(rows)} or fewer" if rows else ""
    raise CalibrationError(
        f"{spec.name}: too short: {stream.count} tokens; {spec.samples} sequences of {spec.seq_len} need "
        f"{spec.samples * stream.body}; pass more text{remedy}"
    )


class Packer:
    """Packs documents into sequences and writes them to `file`, int32 [sequences, seq_len].

    Tokens that are not learned are written as -1 - token; sequences without a learned token are left out.
    """

    def __init__(self, file: Path, tokenizer: Any, seq_len: int) -> None:
        self._file, self._count = file, 0
        self.stream = TokenStream(tokenizer, seq_len, mark_prompts=True)

    def __enter__(self) -> Packer:
        self._out: IO[bytes] = open(self._file, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def __len__(self) -> int:
        return self._count

    def add(self, pieces: Sequence[Piece], source: str, *, most: int) -> None:
        """Append `pieces` until there are `most` sequences."""
        if self._count >= most:
            return
        for row in self.stream.add(pieces, source):
            if max(row[1:]) < 0:  # the first token is BOS, or has nothing before it: it is not predicted
                continue
            self._out.write(torch.tensor(row, dtype=torch.int32).numpy().tobytes())
            self._count += 1
            if self._count >= most:
                return


def answers(messages: Conversation, tokenizer: Any, source: str) -> list[tuple[str, bool]]:
    """The conversation in the chat template, in parts: (text, whether it is learned).

    An answer starts after the template's generation prompt and ends with its turn. Raises CalibrationError if the
    template rejects the conversation.
    """

    def written(count: int, *, prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    with _template_errors(source):
        whole, at, parts = written(len(messages)), 0, list[tuple[str, bool]]()
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = written(i, prompt=True) if i else "", written(i + 1)
            if not whole.startswith(before) or not whole.startswith(after) or len(before) < at:
                # The template writes a turn differently if others follow: use only the answer's own text.
                start = whole.find(message["content"].strip(), at)
                if start < 0:
                    continue
                before, after = whole[:start], whole[: start + len(message["content"].strip())]
            parts += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
            at = len(after)
        parts.append((whole[at:], False))
    return [part for part in parts if part[0]]


@contextlib.contextmanager
def _template_errors(source: str) -> Iterator[None]:
    """Raise CalibrationError if the chat template rejects a conversation of `source`."""
    try:
        yield
    except Exception as error:  # templates raise many kinds, also if there is none
        raise CalibrationError(
            f"{source}: contains conversations, but the chat template fails on them ({reason_of(error)}); use plain "
            "text, or name its column with --column"
        ) from None


def batched(texts: Iterable[Document], seq_len: int) -> Iterator[list[Piece]]:
    """Documents in batches, with long ones split."""
    pieces = _pieces(texts, _PIECE * seq_len)
    while batch := list(islice(pieces, _TOGETHER)):
        yield batch


def _pieces(texts: Iterable[Document], size: int) -> Iterator[Piece]:
    for text in texts:
        if not isinstance(text, str):
            yield text, True
            continue
        while len(text) > size:
            found = re.search(r"\s", text[size // 2 : size])
            cut = size // 2 + found.start() if found else size
            yield text[:cut], False
            text = text[cut:]
        if text.strip():
            yield text, True


def mark_of(document: Document) -> str:
    """SHA-256 of a document's text, the same for any spacing: equal for copies."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def open_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of the checkpoint at `path`. Raises CalibrationError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizer classes raise many kinds
        raise CalibrationError(
            f"{path}: no usable tokenizer ({reason_of(error)}); use --calibration self, or name the layers to drop"
        ) from None


def check_vocabulary(path: Path, largest: int, vocabulary: int | None) -> None:
    """Raise CalibrationError if `largest`, a token of the tokenizer at `path`, is not among `vocabulary` tokens."""
    if vocabulary is not None and largest >= vocabulary:
        raise CalibrationError(
            f"{path}: the tokenizer gives token {largest}, but the vocabulary has {vocabulary} tokens; use the "
            "tokenizer of this model"
        )


def leading_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer adds before a text, if any."""
    plain, special = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return int(special[0]) if len(special) > len(plain) and special[:1] != plain[:1] else None
