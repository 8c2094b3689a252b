"""The workload of a benchmark: the same prompts, lengths, concurrencies and KV cache for every model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slicer.benchmarks.contestants import Contestant
from slicer.errors import BenchError, UsageError
from slicer.runtime import memory

_MIB, _GIB = 1 << 20, 1 << 30
_BLOCK = 128  # largest block of vLLM's KV cache, in tokens (16 to 128)


@dataclass(frozen=True)
class Workload:
    """The settings of all requests.

    Attributes:
        input_len, output_len: tokens per prompt, and tokens to generate.
        concurrency: numbers of concurrent requests (the batch size on transformers), each measured separately.
        seconds: approximate time per concurrency in each run.
        batch: prompts of the offline measurement.
        max_model_len: vLLM's context: whole blocks of its cache, so that its reported cache size in tokens is exact.
        kv_cache_bytes: the KV cache of every model.
        arguments: vLLM's own flags.
    """

    engine: str
    on_cpu: bool
    dtype: str
    input_len: int
    output_len: int
    concurrency: tuple[int, ...]
    seconds: float
    batch: int
    max_model_len: int
    kv_cache_bytes: int
    seed: int
    arguments: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "concurrency": list(self.concurrency), "arguments": list(self.arguments)}


def choose(
    contestants: Sequence[Contestant],
    *,
    engine: str,
    on_cpu: bool,
    dtype: str,
    input_len: int | None = None,
    output_len: int | None = None,
    concurrency: Sequence[int] | None = None,
    seconds: float | None = None,
    kv_cache_bytes: int | None = None,
    seed: int = 0,
    arguments: Sequence[str] = (),
) -> Workload:
    """Choose defaults for what is not set, so that a small machine finishes in minutes and does not swap.

    Raises BenchError if the lengths exceed the models' context, or the free memory.
    """
    levels = tuple(dict.fromkeys(concurrency or ((1, 4) if on_cpu else (1, 8, 32))))
    longest = min(c.context for c in contestants)
    given_output, given_input = output_len, input_len
    output_len = output_len or min(32 if on_cpu else 128, max(2, longest // 4))
    input_len = input_len or min(128 if on_cpu else 512, longest - output_len - 16)
    if output_len < 2:
        raise UsageError("--output-len: a time per output token needs at least 2")
    if input_len < 1 or input_len + output_len + 16 > longest:
        asked = f"{given_input or input_len} + {given_output or output_len} tokens (and 16 spare)"
        raise BenchError(f"{asked} do not fit the models' context of {longest}: lower --input-len or --output-len")
    blocks = -(-(input_len + output_len + 16) // _BLOCK) * _BLOCK
    batch = max(8 if on_cpu else 64, max(levels))
    a_token = max(c.kv_bytes_per_token for c in contestants)
    # 1.5 times the need, so that no request waits for another's cache.
    needed = int(1.5 * blocks * a_token * max(levels))
    usual = _GIB if on_cpu else 4 * _GIB
    weights = max(c.weight_bytes for c in contestants)
    free = memory.available() if on_cpu else None
    if free is not None:
        usual = min(usual, max(1 << (free // 8).bit_length() - 1, 64 * _MIB))  # a power of two, to vary less
    budget = kv_cache_bytes or max(usual, -(-needed // _MIB) * _MIB)
    if engine == "vllm" and free is not None:
        # The weights, their packed copy for the CPU's kernels, the cache, and vLLM itself.
        asks = 2 * weights + budget + _GIB
        if asks > free:
            raise BenchError(
                f"needs about {asks / 1e9:.1f} GB of memory (twice the weights of {weights / 1e9:.1f} GB, KV cache "
                f"{budget / 1e9:.1f} GB), but only {free / 1e9:.1f} GB are free; lower --concurrency or --kv-cache, or "
                "choose a smaller shape"
            )
    elif free is not None and 1.2 * weights > free:
        raise BenchError(
            f"the weights need {weights / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of memory are free; "
            "choose a smaller shape, or drop more layers"
        )
    return Workload(
        engine=engine,
        on_cpu=on_cpu,
        dtype=dtype,
        input_len=input_len,
        output_len=output_len,
        concurrency=levels,
        seconds=seconds if seconds is not None else (4.0 if on_cpu else 10.0),
        batch=batch,
        max_model_len=min(blocks, longest),
        kv_cache_bytes=budget,
        seed=seed,
        arguments=tuple(arguments),
    )


def prompts(workload: Workload, vocabulary: int, count: int, salt: int = 0) -> list[list[int]]:
    """`count` random prompts of token ids, without the special tokens at the ends of vocabularies."""
    source = random.Random(f"{workload.seed} {salt}")
    low, high = vocabulary // 8, vocabulary // 2
    return [[source.randrange(low, high) for _ in range(workload.input_len)] for _ in range(count)]


def requests_for(workload: Workload, concurrency: int, seconds_each: float) -> int:
    """Number of requests that take about `workload.seconds` at this concurrency: from two waves to 64."""
    waves = max(2 if concurrency > 1 else 4, round(workload.seconds / max(seconds_each, 1e-6)))
    return min(waves * concurrency, max(64, 2 * concurrency))
