"""What is asked of a benchmark, and the workload: the same prompts, concurrencies and KV cache for every model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.benchmarks.contestants import Contestant
from slicer.errors import BenchError, UsageError
from slicer.runtime import memory

_MIB, _GIB = 1 << 20, 1 << 30
_BLOCK = 128  # largest block of vLLM's KV cache, in tokens (16 to 128)

ROUNDS = 3
TIMES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")  # of every request: first token, per token, between tokens, whole


@dataclass(frozen=True)
class Request:
    """The options of `slicer bench`; None leaves a choice to `choose`. `arguments` are vLLM's own flags."""

    base: str | None = None
    sliced: tuple[str, ...] = ()
    drops: str | None = None
    config: Path | None = None
    engine: str = "vllm"
    dtype: str | None = None
    input_len: int | None = None
    output_len: int | None = None
    concurrency: tuple[int, ...] | None = None
    seconds: float | None = None
    rounds: int = ROUNDS
    kv_cache_bytes: int | None = None
    seed: int = 0
    speculative: bool = False
    speculative_tokens: int = 3
    prompts: Path | None = None
    arguments: tuple[str, ...] = ()
    command: str | None = None


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


def choose(contestants: Sequence[Contestant], request: Request, *, on_cpu: bool, dtype: str) -> Workload:
    """Choose defaults for what is not set, so that a small machine finishes in minutes and does not swap. Raises
    BenchError if the lengths exceed the models' context, or the free memory."""
    levels = (1,) if request.speculative else request.concurrency or ((1, 4) if on_cpu else (1, 8, 32))
    levels = tuple(dict.fromkeys(levels))
    longest = min(c.context for c in contestants)
    output_len = request.output_len or min(32 if on_cpu else 128, max(2, longest // 4))
    input_len = request.input_len or min(128 if on_cpu else 512, longest - output_len - 16)
    if output_len < 2:
        raise UsageError("--output-len: a time per output token needs at least 2")
    if input_len < 1 or input_len + output_len + 16 > longest:
        asked = f"{input_len} + {output_len} tokens (and 16 spare)"
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
    budget = request.kv_cache_bytes or max(usual, -(-needed // _MIB) * _MIB)
    if request.engine == "vllm" and free is not None:
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
        engine=request.engine,
        on_cpu=on_cpu,
        dtype=dtype,
        input_len=input_len,
        output_len=output_len,
        concurrency=levels,
        seconds=(4.0 if on_cpu else 10.0) if request.seconds is None else request.seconds,
        batch=batch,
        max_model_len=min(blocks, longest),
        kv_cache_bytes=budget,
        seed=request.seed,
        arguments=request.arguments,
    )


def prompts(workload: Workload, vocabulary: int, count: int, salt: int = 0) -> list[list[int]]:
    """`count` random prompts of token ids, without the special tokens at the ends of vocabularies."""
    source = random.Random(f"{workload.seed} {salt}")
    low, high = vocabulary // 8, vocabulary // 2
    return [[source.randrange(low, high) for _ in range(workload.input_len)] for _ in range(count)]


def by_concurrency(
    workload: Workload, once: float, batch_seconds: float, answer: Callable[[int, int], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The results of `answer(count, level)`, with `count` requests, `level` at a time, for every concurrency.

    `once`: seconds of one request alone; `batch_seconds`: of the offline batch. `count` requests take about
    `workload.seconds`: from two waves to 64 requests.
    """
    found = {}
    for level in workload.concurrency:
        if level > 1:
            once = max(once, batch_seconds * level / workload.batch)
        waves = max(2 if level > 1 else 4, round(workload.seconds / max(once, 1e-6)))
        found[str(level)] = answer(min(waves * level, max(64, 2 * level)), level)
    return found


def rates(requests: int, seconds: float, output_tokens: int) -> dict[str, Any]:
    """What was answered in how many seconds, and per second."""
    return {
        "requests": requests,
        "seconds": seconds,
        "requests_per_second": requests / seconds,
        "output_tokens_per_second": output_tokens / seconds,
    }


def offline_rates(prompts: int, seconds: float, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """The throughput of one batch."""
    return {
        "prompts": prompts,
        "seconds": seconds,
        "prompt_tokens_per_second": prompt_tokens / seconds,
        "output_tokens_per_second": output_tokens / seconds,
    }
