"""Calibration text as batches of tokens: packed, seeded and never padded, or sampled from the model itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch

from slicer.data.packing import check_vocabulary, open_tokenizer, pack
from slicer.data.sources import TextSpec, documents, parts_of
from slicer.errors import CalibrationError
from slicer.plan.records import TextRecord
from slicer.progress import Progress
from slicer.runtime.workdir import Stages

_SAMPLED_TOGETHER = 16  # decoding a few sequences costs about as much as one


class Loaded(Protocol):
    """The part of `slicer.model.walk.Walk` that is needed to make text for its model, or by it."""

    model: Any
    trust_remote_code: bool
    directory: Path | None


@dataclass(frozen=True)
class TokenBatches:
    """`batches`: int64 tensors [batch, seq_len]; `record`: where they come from, for plan.json and analysis.json."""

    batches: list[torch.Tensor]
    record: TextRecord

    @classmethod
    def of(cls, tokens: torch.Tensor, spec: TextSpec) -> TokenBatches:
        """The sequences `tokens`, int64 [samples, seq_len], in the batches of `spec`."""
        return cls(list(torch.split(tokens, spec.batch_size)), spec.record(tokens))


def read_text(spec: TextSpec | None, path: Path, walk: Loaded | None, progress: Progress) -> TokenBatches | None:
    """The text of `spec` as tokens for the model of `walk`, whose checkpoint is at `path`; None if none is asked
    for. A walk with a directory keeps them there: a run that goes on has the same text. Raises CalibrationError as
    `token_batches`."""
    if spec is None or walk is None:
        return None
    progress.stage("Calibration data")
    kept = Stages(walk.directory and walk.directory / "text", json.dumps(spec.identity).encode())
    if (found := kept.load("tokens")) is not None:
        tensors, record = found
        return TokenBatches(list(torch.split(tensors["tokens"], spec.batch_size)), TextRecord.of(record))
    text = token_batches(spec, path, walk.model, trust_remote_code=walk.trust_remote_code)
    kept.save("tokens", {"tokens": torch.cat(text.batches)}, text.record.to_dict())
    return text


def token_batches(spec: TextSpec, path: Path, model: Any, *, trust_remote_code: bool = False) -> TokenBatches:
    """Make `spec.samples` sequences of `spec.seq_len` tokens for the checkpoint at `path`, in batches.

    Documents are shuffled with the seed, tokenized, joined with an end-of-text token, and cut into sequences; each
    starts with BOS if the tokenizer adds it. `self` needs a `model` with all weights in memory.
    Raises CalibrationError if there is no text or not enough.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(limit, int) and spec.seq_len > limit:
        raise CalibrationError(f"--seq-len {spec.seq_len}: the model's context is {limit} tokens; lower it")
    found = []
    for part in parts_of(spec):
        if part.source != "self":
            found.append(pack(documents(part), open_tokenizer(path, trust_remote_code), part))
        else:
            found.append(sample_tokens(model, part))
    tokens = torch.cat(found)
    check_vocabulary(path, int(tokens.max()), model.get_input_embeddings().weight.shape[0])
    return TokenBatches.of(tokens, spec)


def sample_tokens(model: Any, spec: TextSpec) -> torch.Tensor:
    """Sample sequences from the model at temperature 1 with the seed: int64 [samples, seq_len].

    They start with BOS, else EOS, else a random token. End tokens are not sampled, so every sequence is full. Raises
    CalibrationError if some weights are not in memory, or the probabilities are not finite.
    """
    if any(weight.is_meta for weight in model.parameters()):
        raise CalibrationError(
            "--calibration self: the model does not fit in memory, and sampling reads all of it for each token; "
            "use a local .jsonl, .txt or .parquet file, or a Hub data set"
        )
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
