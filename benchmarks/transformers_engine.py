"""One run of one model on plain transformers, in a fresh process: the second engine of the depth sweep.

    python -m slicer.benchmarks.transformers_engine        reads a contestant and a workload as JSON from stdin

Prefill and decode are timed step by step with the model's own key-value cache; on a GPU, each step is synchronised.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from slicer.benchmarks.contestants import Contestant
from slicer.benchmarks.process import peak_memory, run_module, synchronize
from slicer.benchmarks.workload import TIMES, Workload, by_concurrency, offline_rates, prompts, rates
from slicer.model.load import auto_classes, load_model


def measure(
    contestant: Contestant, workload: Workload, salt: int, scratch: Path, status: Callable[[str], None]
) -> dict[str, Any]:
    """All results of one run in a child process, as `vllm_engine.measure`. Raises BenchError."""
    status("Running on transformers")
    spec = json.dumps({"contestant": asdict(contestant), "workload": asdict(workload), "salt": salt})
    return run_module(f"{contestant.label}: transformers", "transformers_engine", stdin=spec)


def main() -> None:
    """The child: load, measure, print one JSON object."""
    spec = json.loads(sys.stdin.read())
    workload, contestant = Workload(**spec["workload"]), Contestant(**spec["contestant"])
    device = torch.device("cpu" if workload.on_cpu else "cuda")
    dtype = torch.bfloat16 if workload.dtype == "auto" else getattr(torch, workload.dtype)
    started = time.perf_counter()
    model = _load(contestant, dtype, device, workload.seed)
    synchronize(device)
    loaded = time.perf_counter() - started
    run = partial(generate, model, device, workload.output_len)
    asked = prompts(workload, contestant.vocabulary, max(64, *workload.concurrency, workload.batch), spec["salt"])
    run(asked[:1])
    once = run(asked[1:2])["e2e_ms"][0] / 1000
    offline = run(asked[: workload.batch])
    seconds, size = offline["seconds"], workload.batch

    def answer(count: int, level: int) -> dict[str, Any]:
        parts = [run([asked[(at + i) % len(asked)] for i in range(level)]) for at in range(0, count, level)]
        spent = sum(part["seconds"] for part in parts)
        times = {key: [value for part in parts for value in part[key]] for key in TIMES}
        return {**rates(count, spent, count * workload.output_len), **times}

    figures = {
        "load_seconds": loaded,
        "offline": offline_rates(size, seconds, size * workload.input_len, size * workload.output_len),
        "online": by_concurrency(workload, once, seconds, answer),
        "kv_capacity_tokens": int(workload.kv_cache_bytes // offline["cache_bytes_per_token"]),
        "peak_memory_bytes": peak_memory(not workload.on_cpu),
    }
    print(json.dumps(figures))


def _load(contestant: Contestant, dtype: Any, device: Any, seed: int) -> Any:
    import transformers

    path = Path(contestant.path)
    if not contestant.dummy:
        return load_model(path, dtype=str(dtype).removeprefix("torch."), device=device.type)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    with device:
        model = auto_classes(path)[0].from_config(config, dtype=dtype)
    return model.eval()


def generate(model: Any, device: Any, output_len: int, asked: list[list[int]]) -> dict[str, Any]:
    """Prefill and greedy decoding of one batch, step by step; times in milliseconds, once for every prompt."""
    cache = None
    with torch.inference_mode():
        ids = torch.tensor(asked, device=device)
        synchronize(device)
        marks = [time.perf_counter()]
        for _ in range(output_len):
            step = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = step.past_key_values
            ids = step.logits[:, -1:].argmax(-1)
            synchronize(device)
            marks.append(time.perf_counter())
    steps = [1000 * (b - a) for a, b in pairwise(marks)]
    each = len(asked)
    return {
        "cache_bytes_per_token": _cache_bytes(cache) / each / (len(asked[0]) + output_len - 1),
        "seconds": marks[-1] - marks[0],
        "ttft_ms": [steps[0]] * each,
        "tpot_ms": [sum(steps[1:]) / (output_len - 1)] * each,
        "itl_ms": steps[1:] * each,
        "e2e_ms": [1000 * (marks[-1] - marks[0])] * each,
    }


def _cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in any kind of cache."""
    seen: dict[int, int] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item, depth)
        elif hasattr(value, "__dict__") and depth < 3:
            for item in vars(value).values():
                visit(item, depth + 1)

    visit(cache, 0)
    return max(1, sum(seen.values()))


if __name__ == "__main__":
    main()
