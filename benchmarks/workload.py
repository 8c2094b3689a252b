"""What every model of a sweep is asked: the same prompts, lengths, concurrencies and KV cache."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slicer.benchmarks.contestants import Contestant
from slicer.errors import BenchError, UsageError
from slicer.runtime import memory

_MIB, _GIB = 1 << 20, 1 << 30
_BLOCK = 128  # tokens of a block of vLLM's KV cache: 16 to 128


@dataclass(frozen=True)
class Workload:
    """The questions of a benchmark.

    Attributes:
        input_len, output_len: tokens of each prompt, and generated for it.
        concurrency: requests in flight at a time (the batch, on transformers), one measurement for each.
        seconds: about how long each concurrency is measured in each run.
        batch: prompts of the offline measurement.
        max_model_len: the context that vLLM is given: whole blocks of its cache, so that its count of the tokens
            that the cache holds is exact.
        kv_cache_bytes: the KV cache that every model is given.
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
    """Fill in what was not said, so that a small machine ends in minutes and does not swap.

    Raises BenchError where the lengths exceed the models' context, or the memory that is free.
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
        raise BenchError(
            f"{asked} do not fit the models' context of {longest}: lower --input-len or --output-len"
        )
    blocks = -(-(input_len + output_len + 16) // _BLOCK) * _BLOCK
    batch = max(8 if on_cpu else 64, max(levels))
    a_token = max(c.kv_bytes_per_token for c in contestants)
    # Half as much again, so that no request waits for another's cache.
    needed = int(1.5 * blocks * a_token * max(levels))
    usual = _GIB if on_cpu else 4 * _GIB
    weights = max(c.weight_bytes for c in contestants)
    free = memory.available() if on_cpu else None
    if free is not None:
        usual = min(usual, max(1 << (free // 8).bit_length() - 1, 64 * _MIB))  # a power of two: steady
    budget = kv_cache_bytes or max(usual, -(-needed // _MIB) * _MIB)
    if engine == "vllm" and free is not None:
        # The weights, the copy of them packed for the CPU's kernels, the cache, and vLLM itself.
        asks = 2 * weights + budget + _GIB
        if asks > free:
            raise BenchError(
                f"about {asks / 1e9:.1f} GB of memory are needed (weights {weights / 1e9:.1f} GB, twice; KV cache "
                f"{budget / 1e9:.1f} GB) and {free / 1e9:.1f} GB are free; lower --concurrency or --kv-cache, or "
                "choose a smaller shape"
            )
    elif free is not None and 1.2 * weights > free:
        raise BenchError(
            f"the weights take {weights / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free; "
            "choose a smaller shape, or more layers to drop"
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
    """`count` random prompts of token ids; special tokens, which stand at the ends of vocabularies, are left out."""
    source = random.Random(f"{workload.seed} {salt}")
    low, high = vocabulary // 8, vocabulary // 2
    return [[source.randrange(low, high) for _ in range(workload.input_len)] for _ in range(count)]


def requests_for(workload: Workload, concurrency: int, seconds_each: float) -> int:
    """Requests that take about `workload.seconds` at this concurrency: two waves at least, 64 at most."""
    waves = max(2 if concurrency > 1 else 4, round(workload.seconds / max(seconds_each, 1e-6)))
    return min(waves * concurrency, max(64, 2 * concurrency))
