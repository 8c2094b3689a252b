"""One run of one model on plain transformers, in a fresh process: the second engine of the depth sweep.

    python -m slicer.benchmarks.transformers_engine        reads a contestant and a workload as JSON from stdin

Prefill and decode are timed step by step with the model's own key-value cache; on a GPU, each step is synchronised.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slicer.benchmarks.contestants import Contestant
from slicer.benchmarks.workload import Workload, prompts, requests_for
from slicer.errors import BenchError


def measure(
    contestant: Contestant, workload: Workload, salt: int, scratch: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All results of one run in a child process, as `vllm_engine.measure`. Raises BenchError."""
    tell("Running on transformers")
    spec = json.dumps({"contestant": asdict(contestant), "workload": workload.to_dict(), "salt": salt})
    command = [sys.executable, "-m", "slicer.benchmarks.transformers_engine"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            out, errors = child.communicate(spec)
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        if child.returncode == -9:
            raise BenchError(f"{contestant.label}: its process was killed, probably out of memory")
        reason = (errors.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise BenchError(f"{contestant.label}: transformers failed: {reason[:300]}")
    return dict(json.loads(out.strip().splitlines()[-1]))


def main() -> None:
    """The child: load, measure, print one JSON object."""
    spec = json.loads(sys.stdin.read())
    given = spec["workload"]
    given |= {"concurrency": tuple(given["concurrency"]), "arguments": ()}
    workload = Workload(**given)
    contestant = Contestant(**spec["contestant"])
    import torch

    device = torch.device("cpu" if workload.on_cpu else "cuda")
    dtype = torch.bfloat16 if workload.dtype == "auto" else getattr(torch, workload.dtype)
    started = time.perf_counter()
    model = _load(contestant, dtype, device, workload.seed)
    _wait(device)
    loaded = time.perf_counter() - started
    runner = _Runner(model, device, workload.output_len)
    asked = prompts(workload, contestant.vocabulary, max(64, *workload.concurrency, workload.batch), spec["salt"])
    runner.batch(asked[:1])
    once = runner.batch(asked[1:2])["e2e_ms"][0] / 1000
    offline = runner.batch(asked[: workload.batch])
    seconds = offline["seconds"]
    online = {}
    for level in workload.concurrency:
        if level > 1:
            once = max(once, seconds * level / workload.batch)
        waves = max(1, requests_for(workload, level, once) // level)
        parts = [runner.batch([asked[(w * level + i) % len(asked)] for i in range(level)]) for w in range(waves)]
        spent = sum(part["seconds"] for part in parts)
        times = {
            key: [value for part in parts for value in part[key]] for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
        }
        online[str(level)] = {
            "requests": waves * level,
            "seconds": spent,
            "requests_per_second": waves * level / spent,
            "output_tokens_per_second": waves * level * workload.output_len / spent,
            **times,
        }
    if device.type == "cuda":
        peak = int(torch.cuda.max_memory_allocated())
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {
        "load_seconds": loaded,
        "offline": {
            "prompts": workload.batch,
            "seconds": seconds,
            "prompt_tokens_per_second": workload.batch * workload.input_len / seconds,
            "output_tokens_per_second": workload.batch * workload.output_len / seconds,
        },
        "online": online,
        "kv_capacity_tokens": int(workload.kv_cache_bytes // runner.cache_bytes_per_token),
        "peak_memory_bytes": peak,
    }
    print(json.dumps(figures))


def _load(contestant: Contestant, dtype: Any, device: Any, seed: int) -> Any:
    import torch
    import transformers

    from slicer.model.load import auto_classes, load_model

    path = Path(contestant.path)
    if not contestant.dummy:
        return load_model(path, dtype=str(dtype).removeprefix("torch."), device=device.type)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    with device:
        model = auto_classes(path)[0].from_config(config, dtype=dtype)
    return model.eval()


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


class _Runner:
    """Prefill and greedy decoding of batches, step by step."""

    def __init__(self, model: Any, device: Any, output_len: int) -> None:
        self._model, self._device, self._output_len = model, device, output_len
        self.cache_bytes_per_token = 0.0

    def batch(self, asked: list[list[int]]) -> dict[str, Any]:
        """Run one batch; times in milliseconds, once for every prompt."""
        import torch

        with torch.inference_mode():
            ids = torch.tensor(asked, device=self._device)
            _wait(self._device)
            marks = [time.perf_counter()]
            cache = None
            for _ in range(self._output_len):
                step = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = step.past_key_values
                ids = step.logits[:, -1:].argmax(-1)
                _wait(self._device)
                marks.append(time.perf_counter())
            self.cache_bytes_per_token = _cache_bytes(cache) / len(asked) / (len(asked[0]) + self._output_len - 1)
        steps = [1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
        whole = 1000 * (marks[-1] - marks[0])
        each = len(asked)
        return {
            "seconds": marks[-1] - marks[0],
            "ttft_ms": [steps[0]] * each,
            "tpot_ms": [sum(steps[1:]) / (self._output_len - 1)] * each,
            "itl_ms": steps[1:] * each,
            "e2e_ms": [whole] * each,
        }


def _cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in any kind of cache."""
    import torch

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
