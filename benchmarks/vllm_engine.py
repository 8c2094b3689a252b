"""One run of one model on vLLM: a fresh server, measured by vLLM's own benchmark client, then stopped."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from slicer.benchmarks.contestants import Contestant, has_tokenizer, write_tokenizer
from slicer.benchmarks.process import Peak
from slicer.benchmarks.workload import Workload, by_concurrency, offline_rates, prompts, rates
from slicer.errors import BenchError
from slicer.runtime.compat import answer_for_vllm
from slicer.serve.server import DIRECT, Server
from slicer.serve.settings import flag

VARIABLES = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
_SAMPLE_SECONDS = 0.2
# Arguments that the client requires.
_UNUSED: dict[str, Any] = {
    **dict.fromkeys(("tokenizer", "logprobs", "lora_modules", "extra_headers")), "num_warmups": 0, "profile": False,
    "selected_percentile_metrics": [], "selected_percentiles": [], "goodput_config_dict": {},
}  # fmt: skip
_ALLOCATOR = "slicer.benchmarks.vllm_engine.Allocator"


class Allocator:
    """Mixin for vLLM's GPU workers (--worker-extension-cls): peak bytes of their allocator."""

    def peak_allocated_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def server_arguments(workload: Workload, max_num_seqs: int, *chosen: str) -> list[str]:
    """vLLM's flags for a fair run; the user's flags come last and take precedence."""
    found = [
        *("--kv-cache-memory-bytes", str(workload.kv_cache_bytes), "--max-model-len", str(workload.max_model_len)),
        *("--max-num-seqs", str(max_num_seqs), "--seed", str(workload.seed)),
        *("--generation-config", "vllm", "--no-enable-prefix-caching", *chosen),
    ]
    if workload.dtype != "auto":
        found += ["--dtype", workload.dtype]
    compiling = ("--enforce-eager", "--no-enforce-eager", "-cc", "--compil", "-O")
    if workload.on_cpu and not any(word.startswith(compiling) for word in workload.arguments):
        found.append("--enforce-eager")  # compiling takes minutes per depth and gains little here
    return [*found, *workload.arguments]


def measure(
    contestant: Contestant, workload: Workload, salt: int, scratch: Path, status: Callable[[str], None]
) -> dict[str, Any]:
    """All results of one run, times in milliseconds (load in seconds). Raises ServeError or BenchError."""
    chosen = ["--load-format", "dummy" if contestant.dummy else "auto"]
    if not workload.on_cpu:
        chosen += ["--worker-extension-cls", _ALLOCATOR]
    arguments = server_arguments(workload, workload.batch, *chosen)
    if not has_tokenizer(Path(contestant.path)) and flag(arguments, "--tokenizer") is None:
        words = scratch / f"tokenizer-{contestant.vocabulary}"
        words.mkdir(exist_ok=True)
        write_tokenizer(words, contestant.vocabulary)
        arguments += ["--tokenizer", str(words)]
    # enables /collective_rpc, on the loopback only
    variables = VARIABLES | ({} if workload.on_cpu else {"VLLM_SERVER_DEV_MODE": "1"})
    server = Server(contestant.path, name=contestant.label, arguments=arguments, variables=variables, progress=status)
    client = Client(server)
    with Peak(lambda: _resident(server), _SAMPLE_SECONDS) as resident:
        started = time.perf_counter()
        with server:
            loaded = time.perf_counter() - started
            asked = prompts(workload, contestant.vocabulary, max(64, 2 * max(workload.concurrency)), salt)
            status("Warming up")
            client.online(asked[:2], workload.output_len, 1)
            once = client.online(asked[2:3], workload.output_len, 1)["e2e_ms"][0] / 1000
            status("Offline")
            together = prompts(workload, contestant.vocabulary, workload.batch, salt + 1)
            offline = client.offline(together, workload.output_len)

            def answer(count: int, level: int) -> dict[str, Any]:
                status(f"{level} concurrent")
                answered = client.online((asked * (count // len(asked) + 1))[:count], workload.output_len, level)
                return {key: value for key, value in answered.items() if key not in ("texts", "spec_decode")}

            return {
                "load_seconds": loaded,
                "offline": offline,
                "online": by_concurrency(workload, once, offline["seconds"], answer),
                "kv_capacity_tokens": kv_capacity(server),
                "peak_memory_bytes": resident.most if workload.on_cpu else _allocated(server),
            }


class Client:
    """vLLM's benchmark client (vllm.benchmarks.serve) of a server, imported before the server is started."""

    def __init__(self, server: Server) -> None:
        self.server = server
        for name in ("NO_PROXY", "no_proxy"):  # no proxy for the loopback
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))
        answer_for_vllm()
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # hide warnings when a run is stopped
        # vLLM prints much on import, and its log handlers keep the streams that they find then.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from vllm.benchmarks import serve
            from vllm.benchmarks.datasets import SampleRequest
        self._serve, self._sample = serve, SampleRequest

    def online(self, asked: Sequence[Any], output_len: int, concurrency: int) -> dict[str, Any]:
        """Send all requests, `concurrency` at a time; returns every request's times in milliseconds, and its output."""
        lengths = [len(prompt) if isinstance(prompt, list) else 0 for prompt in asked]
        requests = [
            self._sample(prompt=prompt, prompt_len=length, expected_output_len=output_len)
            for prompt, length in zip(asked, lengths, strict=True)
        ]
        server = self.server
        running = self._serve.benchmark(
            task_type=self._serve.TaskType.GENERATION, endpoint_type="openai", ready_check_timeout_sec=0,
            api_url=f"{server.base_url}/completions", base_url=server.root_url, model_id=server.model,
            model_name=server.model, input_requests=requests, max_concurrency=concurrency, ignore_eos=True,
            request_rate=float("inf"), burstiness=1.0, extra_body={"temperature": 0.0}, disable_tqdm=True,
            **_UNUSED,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            found = asyncio.run(running)
        if found["failed"] or not found["completed"]:
            reason = next((error for error in found["errors"] if error), "no reason reported").strip().splitlines()[-1]
            raise BenchError(f"{server.model}: {found['failed']} of {len(requests)} requests failed: {reason[:300]}")
        ends = zip(found["latencies"], found["ttfts"], found["output_lens"], strict=True)
        return {
            **rates(len(requests), found["duration"], sum(found["output_lens"])),
            "ttft_ms": [1000 * t for t in found["ttfts"]],
            "tpot_ms": [1000 * (whole - first) / (n - 1) for whole, first, n in ends if n > 1],
            "itl_ms": [1000 * t for itls in found["itls"] for t in itls],
            "e2e_ms": [1000 * t for t in found["latencies"]],
            "texts": found["generated_texts"],
            "spec_decode": {key: value for key, value in found.items() if key.startswith("spec_decode")},
        }

    def offline(self, asked: Sequence[list[int]], output_len: int) -> dict[str, float]:
        """Send all prompts in one request without streaming: throughput only."""
        body = {"model": self.server.model, "prompt": list(asked), "max_tokens": output_len, "temperature": 0,
                "ignore_eos": True}  # fmt: skip
        started = time.perf_counter()
        usage = _post(f"{self.server.base_url}/completions", body)["usage"]
        seconds = time.perf_counter() - started
        return offline_rates(len(asked), seconds, usage["prompt_tokens"], usage["completion_tokens"])


def kv_capacity(server: Server) -> int:
    """Tokens that fit in the KV cache, as vLLM reports it."""
    found = re.findall(r"KV cache size: ([\d,]+) tokens", server.log.read_text("utf-8", "replace"))
    if not found:
        raise BenchError(f"vLLM did not report the size of its KV cache; see {server.log}")
    return int(found[-1].replace(",", ""))


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with DIRECT.open(request, timeout=3600) as answer:
            return dict(json.loads(answer.read()))
    except OSError as error:
        raise BenchError(f"{url}: no response ({error}); the server may have run out of memory") from None


def _allocated(server: Server) -> int:
    """Peak bytes of the allocators of all GPUs together."""
    answer = _post(f"{server.root_url}/collective_rpc", {"method": "peak_allocated_bytes"})
    return sum(int(part) for part in answer.get("results", []))


def _resident(server: Server) -> int:
    """Resident bytes of the server's process tree; 0 before it is started."""
    total = 0
    with contextlib.suppress(psutil.Error, AssertionError):
        top = psutil.Process(server.pid)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total
