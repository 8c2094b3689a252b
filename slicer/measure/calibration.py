"""Calibration text as batches of tokens: packed, seeded and never padded, or sampled from the model itself."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from slicer.errors import CalibrationError

if TYPE_CHECKING:
    import torch

DEFAULT_DATASET = ("allenai/c4", "en")
_SHUFFLE_BUFFER = 1000  # documents of a stream that are shuffled together
_SAMPLED_TOGETHER = 16  # decoding a few sequences costs about as much as one
_CONVERSATIONS = ("messages", "conversations", "conversation")  # columns with a list of turns
_ROLES = {"human": "user", "gpt": "assistant"}
Conversation = list[dict[str, str]]
Document = str | Conversation
_SUFFIXES = (".jsonl", ".json", ".txt", ".raw", ".parquet", ".jsonl.gz", ".json.gz", ".txt.gz")
_REMEDY = "use --calibration self (text sampled from the model) or a local .jsonl, .txt or .parquet file"


@dataclass(frozen=True)
class CalibrationSpec:
    """What calibration text to use.

    Attributes:
        source: None for allenai/c4 (English, streamed), "self" for sequences sampled from the model, a local file, a
            Hub data set (`name` or `name:config`), or `task:NAME` for the prompts and answers of an lm-eval task.
            Several, separated by commas, get equal numbers of samples.
            Conversations (a column `messages` or `conversations`) go through the chat template.
        samples: number of sequences.
        seq_len: tokens per sequence, with BOS.
        batch_size: sequences per forward pass.
        seed: for the choice of documents, or for sampling.
        text_column: the column that holds the text.
    """

    source: str | None = None
    samples: int = 64
    seq_len: int = 256
    batch_size: int = 4
    seed: int = 0
    text_column: str = "text"

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to resume another: the values, and sizes and dates of local files."""
        files = [(path.stat().st_size, path.stat().st_mtime_ns) for path in local_files(self)]
        return {**asdict(self), "files": files}


@dataclass(frozen=True)
class TokenBatches:
    """`batches`: int64 tensors [batch, seq_len]. `provenance`: the record of their source."""

    batches: list[torch.Tensor]
    provenance: dict[str, Any]


def token_batches(
    spec: CalibrationSpec,
    path: Path,
    model: Any,
    *,
    streamed: bool = False,
    trust_remote_code: bool = False,
) -> TokenBatches:
    """Make `spec.samples` sequences of `spec.seq_len` tokens for the checkpoint at `path`, in batches.

    Documents are shuffled with the seed, tokenized, joined with an end-of-text token, and cut into sequences; each
    starts with BOS if the tokenizer adds it. `self` needs a `model` with loaded weights, not `streamed` from disk.
    Raises CalibrationError if there is no text or not enough.
    """
    import torch

    _check_length(spec, model)
    parts = [_part(part, path, model, streamed, trust_remote_code) for part in _parts(spec)]
    tokens = torch.cat(parts)
    source = spec.source or ":".join(DEFAULT_DATASET)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"{path}: the tokenizer gives token {int(tokens.max())}, but the vocabulary has {vocabulary} tokens; "
            "use the tokenizer of this model"
        )
    provenance = {
        "source": source,
        "samples": spec.samples,
        "seq_len": spec.seq_len,
        "batch_size": spec.batch_size,
        "seed": spec.seed,
        "text_column": spec.text_column,
        "tokens_sha256": hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).hexdigest(),
    }
    return TokenBatches(list(torch.split(tokens, spec.batch_size)), provenance)


def check_sources(spec: CalibrationSpec) -> None:
    """Raise CalibrationError early if a source of `spec` cannot be read or is empty."""
    for part in _parts(spec):
        if part.source != "self" and next(iter(documents(part)), None) is None:
            raise CalibrationError(f"{part.source}: no text in it; pass another --calibration")


def local_files(spec: CalibrationSpec) -> list[Path]:
    """The local files among the sources of `spec`."""
    paths = [Path(part.source) for part in _parts(spec) if part.source is not None]
    return [path for path in paths if path.is_file()]


def _parts(spec: CalibrationSpec) -> list[CalibrationSpec]:
    """One spec per source of `spec`; they share the samples, and the first ones get the remainder."""
    if spec.source is None or "," not in spec.source or Path(spec.source).exists():
        return [spec]
    names = [name.strip() for name in spec.source.split(",")]
    if "" in names or len(names) > spec.samples:
        raise CalibrationError(
            f"--calibration {spec.source}: {len(names)} sources; name each one, and pass --samples {len(names)} or more"
        )
    share, over = divmod(spec.samples, len(names))
    return [replace(spec, source=name, samples=share + (at < over)) for at, name in enumerate(names)]


def _part(
    spec: CalibrationSpec, path: Path, model: Any, streamed: bool, trust_remote_code: bool
) -> torch.Tensor:
    """The tokens of one source, int64 [samples, seq_len]."""
    if spec.source != "self":
        tokenizer = open_tokenizer(path, trust_remote_code)
        return _pack(documents(spec), tokenizer, spec, spec.source or ":".join(DEFAULT_DATASET))
    if streamed:
        raise CalibrationError(
            "--calibration self: the model does not fit in memory, and sampling reads all of it for each token; "
            "use a local .jsonl, .txt or .parquet file, or a Hub data set"
        )
    return sample_tokens(model, spec)


def _check_length(spec: CalibrationSpec, model: Any) -> None:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(limit, int) and spec.seq_len > limit:
        raise CalibrationError(f"--seq-len {spec.seq_len}: the model's context is {limit} tokens; lower it")


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


# --- packing ---------------------------------------------------------------------------------------------------------


def _pack(documents: Iterable[Document], tokenizer: Any, spec: CalibrationSpec, source: str) -> torch.Tensor:
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


# --- documents -------------------------------------------------------------------------------------------------------


def documents(spec: CalibrationSpec) -> Iterator[Document]:
    if spec.source is not None and spec.source.startswith("task:"):
        from slicer.measure.tasks import prompts

        texts: list[Document] = list(prompts(spec.source.removeprefix("task:")))
        random.Random(spec.seed).shuffle(texts)
        return iter(texts)
    if not is_streamed(spec.source):
        assert spec.source is not None
        texts = read_documents(Path(spec.source), spec.text_column)
        random.Random(spec.seed).shuffle(texts)
        return iter(texts)
    return _stream_hub(spec)


def is_streamed(source: str | None) -> bool:
    """Whether the documents of `source` are streamed from the Hub."""
    return source is None or not (
        source.startswith("task:") or Path(source).exists() or source.endswith(_SUFFIXES)
    )


def read_documents(file: Path, column: str) -> list[Document]:
    """Every document of a local file; .txt and .raw files are split at blank lines. Raises CalibrationError."""
    if not file.is_file():
        raise CalibrationError(f"{file}: no such file; {_REMEDY}")
    readers: dict[str, Callable[[Path, str], list[Document]]] = {
        ".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_text, ".raw": _read_text,
        ".parquet": _read_parquet,
    }  # fmt: skip
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    if suffix not in readers:
        raise CalibrationError(f"{file}: not a .jsonl, .json, .txt or .parquet file; {_REMEDY}")
    if file.stat().st_size == 0:
        raise CalibrationError(f"{file}: empty; pass a file with text, or --calibration self")
    try:
        return readers[suffix](file, column)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise CalibrationError(f"{file}: cannot be read ({' '.join(str(error).split())[:120]})") from None


def _open(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return open(file, encoding="utf-8-sig")


def _read_text(file: Path, column: str) -> list[Document]:
    with _open(file) as stream:
        return [part for part in re.split(r"\n[ \t\r]*\n", stream.read()) if part.strip()]


def _read_jsonl(file: Path, column: str) -> list[Document]:
    texts: list[Document] = []
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    texts.append(_text_of(json.loads(line), column, f"{file}, line {number}"))
                except ValueError:
                    raise CalibrationError(
                        f"{file}, line {number}: not JSON; fix or remove the line"
                    ) from None
    return texts


def _read_json(file: Path, column: str) -> list[Document]:
    with _open(file) as stream:
        try:
            rows = json.load(stream)
        except ValueError:
            return _read_jsonl(file, column)
    rows = rows if isinstance(rows, list) else [rows]
    return [_text_of(row, column, f"{file}, row {number}") for number, row in enumerate(rows, 1)]


def _read_parquet(file: Path, column: str) -> list[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(file).names
        wanted = column if column in names else next((c for c in _CONVERSATIONS if c in names), None)
        if wanted is None:
            raise CalibrationError(
                f"{file}: no column {column!r} (columns: {', '.join(names)}); name it with --text-column"
            )
        rows = parquet.read_table(file, columns=[wanted])[wanted].to_pylist()
        return [_text_of({wanted: row}, column, str(file)) for row in rows if row]
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{file}: not a parquet file ({' '.join(str(error).split())[:120]})") from None


def _text_of(row: Any, column: str, where: str | None) -> Document:
    """The row's text, or its conversation if it has no such column or the column holds a list of turns."""
    if isinstance(row, str):
        return row
    found = None
    if isinstance(row, dict):
        found = next((row[name] for name in (column, *_CONVERSATIONS) if name in row), None)
    if isinstance(found, str):
        return found
    if isinstance(found, list) and (messages := _messages(found)):
        return messages
    if not isinstance(row, dict) or column not in row:
        names = ", ".join(row) if isinstance(row, dict) else "none"
        raise CalibrationError(f"{where}: no column {column!r} ({names}); name it with --text-column")
    raise CalibrationError(f"{where}: column {column!r} has no text; name another one with --text-column")


def _messages(found: list[Any]) -> Conversation:
    """Convert to [{role, content}] from that form or from ShareGPT's (from, value); empty for anything else."""
    messages = []
    for turn in found:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            return []
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def _stream_hub(spec: CalibrationSpec) -> Iterator[Document]:
    """Documents of a Hub data set, streamed and shuffled with the seed. Raises CalibrationError if unreachable."""
    name, config = DEFAULT_DATASET if spec.source is None else (*spec.source.split(":", 1), None)[:2]
    if any(
        os.environ.get(k, "").upper() in ("1", "TRUE", "YES", "ON")
        for k in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    ):
        raise CalibrationError(f"{name}: cannot be streamed offline (HF_HUB_OFFLINE is set); {_REMEDY}")
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split="train", streaming=True)
        for row in rows.shuffle(seed=spec.seed, buffer_size=_SHUFFLE_BUFFER):
            yield _text_of(row, spec.text_column, name)
    except CalibrationError:
        raise
    except Exception as error:  # the network, the Hub and the data set's format raise different kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CalibrationError(f"{name}: cannot be streamed ({reason}); {_REMEDY}") from None


# --- text sampled from the model --------------------------------------------------------------------------------------


def sample_tokens(model: Any, spec: CalibrationSpec) -> torch.Tensor:
    """Sample sequences from the model at temperature 1 with the seed: int64 [samples, seq_len].

    They start with BOS, else EOS, else a random token. End tokens are not sampled, so every sequence is full. Raises
    CalibrationError if the probabilities are not finite.
    """
    import torch

    config = model.config.get_text_config()
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(spec.seed)
    first = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    first = first[0] if isinstance(first, list) else first
    # The class's name for its cache; a class without one reads the whole sequence again at each step.
    names = signature(model.forward).parameters
    keyword = next((k for k in ("past_key_values", "cache_params", "cache") if k in names), None)
    sequences = []
    with torch.inference_mode():
        together = max(spec.batch_size, _SAMPLED_TOGETHER)
        for start in range(0, spec.samples, together):
            count = min(together, spec.samples - start)
            if first is None:
                tokens = torch.randint(config.vocab_size, (count, 1), generator=generator)
            else:
                tokens = torch.full((count, 1), first, dtype=torch.int64)
            cache = None
            while tokens.shape[1] < spec.seq_len:
                step = tokens if cache is None else tokens[:, -1:]
                cached = {} if keyword is None else {keyword: cache, "use_cache": True}
                output = model(input_ids=step.to(device), **cached)
                cache = None if keyword is None else getattr(output, keyword, None)
                chances = output.logits[:, -1].float().cpu().softmax(-1)
                if not torch.isfinite(chances).all():
                    raise CalibrationError(
                        "sampling from the model gives values that are not finite; use --dtype float32"
                    )
                tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
            sequences.append(tokens)
    return torch.cat(sequences)
