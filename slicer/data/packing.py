"""Packs documents into sequences of tokens in a file, and marks which tokens of conversations are learned."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch

from slicer.data.sources import Conversation, Document, TextSpec
from slicer.errors import CalibrationError

_PIECE = 64  # a document longer than this many characters per token of a sequence is split
_TOGETHER = 256  # documents tokenized per call


class Packer:
    """Joins documents with an end-of-text token, cuts them into sequences and writes these to `file`.

    Each sequence starts with BOS if the tokenizer adds it. Sequences without learned tokens are left out.
    """

    def __init__(self, file: Path, tokenizer: Any, seq_len: int) -> None:
        self._file, self._tokenizer, self._len = file, tokenizer, seq_len
        self._bos, self._end = leading_token(tokenizer), tokenizer.eos_token_id
        self._waiting: list[int] = []
        self._count = 0
        self.talks = False

    def __enter__(self) -> Packer:
        self._out: IO[bytes] = open(self._file, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def __len__(self) -> int:
        return self._count

    def add(self, pieces: list[tuple[Document, bool]], source: str, *, most: int) -> None:
        """Append (document, whether it ends here) pairs until there are `most` sequences."""
        if self._count >= most or not pieces:
            return
        texts = [text for text, _ in pieces if isinstance(text, str)]
        plain = iter(
            self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ()
        )
        for text, ends in pieces:
            if isinstance(text, str):
                self._waiting += next(plain)
                if ends and self._end is not None:
                    self._waiting.append(self._end)
            else:
                self.talks = True
                self._waiting += self._conversation(text, source)
            self._flush(most)

    def _flush(self, most: int) -> None:
        body = self._len - (self._bos is not None)
        while len(self._waiting) >= body and self._count < most:
            row, self._waiting = self._waiting[:body], self._waiting[body:]
            if max(row[1:] if self._bos is None else row) >= 0:
                row = ([] if self._bos is None else [self._bos]) + row
                self._out.write(torch.tensor(row, dtype=torch.int32).numpy().tobytes())
                self._count += 1
        if self._count >= most:
            self._waiting = []

    def _conversation(self, messages: Conversation, source: str) -> list[int]:
        """Token ids; -1 - id for tokens outside the answers."""
        ids: list[int] = []
        for text, learned in answers(messages, self._tokenizer, source):
            part = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += part if learned else [-1 - i for i in part]
        return ids


def answers(messages: Conversation, tokenizer: Any, source: str) -> list[tuple[str, bool]]:
    """The conversation in the chat template, in parts: (text, whether it is learned).

    An answer starts after the template's generation prompt and ends with its turn. Raises CalibrationError if the
    template rejects the conversation.
    """

    def written(count: int, *, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        )

    try:
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
    except Exception as error:  # templates raise many kinds, also if there is none
        reason = " ".join(str(error).split())[:160]
        raise CalibrationError(
            f"{source}: contains conversations, but the chat template fails on them ({reason}); use plain text, or "
            "name its column with --text-column"
        ) from None
    return [part for part in parts if part[0]]


def batched(texts: Iterable[Document], seq_len: int) -> Iterator[list[tuple[Document, bool]]]:
    """Documents in batches, long ones split: (text, whether the document ends with it)."""
    pieces = _pieces(texts, _PIECE * seq_len)
    while batch := list(islice(pieces, _TOGETHER)):
        yield batch


def _pieces(texts: Iterable[Document], size: int) -> Iterator[tuple[Document, bool]]:
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
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def open_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizer classes raise many kinds
        reason = " ".join(str(error).split())[:160]
        raise CalibrationError(
            f"{path}: no usable tokenizer ({reason}); use --calibration self, or name the layers to drop"
        ) from None


def pack(documents: Iterable[Document], tokenizer: Any, spec: TextSpec, source: str) -> torch.Tensor:
    import torch

    bos = leading_token(tokenizer)
    end = tokenizer.eos_token_id
    body = spec.seq_len - (bos is not None)
    needed = spec.samples * body
    stream: list[int] = []
    count = 0
    for document in documents:
        talk = not isinstance(document, str)
        text = document if isinstance(document, str) else _conversation(document, tokenizer, source)
        if not text.strip():
            continue
        count += 1
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None and not talk:  # the chat template ends a conversation
            stream.append(end)
        if len(stream) >= needed:
            break
    if count == 0:
        raise CalibrationError(f"{source}: no text in it; pass a file with text, or --calibration self")
    if len(stream) < needed:
        fits = len(stream) // body
        remedy = f", or use --samples {fits} or fewer" if fits else ""
        raise CalibrationError(
            f"{source}: too short: {len(stream)} tokens; {spec.samples} sequences of {spec.seq_len} need "
            f"{needed}; pass more text{remedy}"
        )
    tokens = torch.tensor(stream[:needed], dtype=torch.int64).view(spec.samples, body)
    if bos is not None:
        tokens = torch.cat([torch.full((spec.samples, 1), bos, dtype=torch.int64), tokens], dim=1)
    return tokens


def _conversation(messages: Conversation, tokenizer: Any, source: str) -> str:
    """The messages in the model's chat template. Raises CalibrationError."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise many kinds, also if there is none
        reason = " ".join(str(error).split())[:160]
        raise CalibrationError(
            f"{source}: contains conversations, but the chat template fails on them ({reason}); "
            "use plain text, or name its column with --text-column"
        ) from None


def leading_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer adds before a text, if any."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    if len(special) > len(plain) and special[:1] != plain[:1]:
        return int(special[0])
    return None
