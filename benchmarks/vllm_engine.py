"""One run of one model on vLLM: a fresh server, measured by vLLM's own benchmark client, then stopped."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from slicer.benchmarks.contestants import Contestant, has_tokenizer, write_tokenizer
from slicer.benchmarks.workload import Workload, prompts, requests_for
from slicer.errors import BenchError
from slicer.runtime.compat import answer_for_vllm
from slicer.serve import Server
from slicer.serve.settings import flag

_SAMPLE_SECONDS = 0.2
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_ALLOCATOR = "slicer.benchmarks.vllm_engine.Allocator"


class Allocator:
    """Mixin for vLLM's GPU workers (--worker-extension-cls): peak bytes of their allocator."""

    def peak_allocated_bytes(self) -> int:
        import torch

        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def server_arguments(workload: Workload, dummy: bool) -> list[str]:
    """vLLM's flags for a fair run; the user's flags come last and take precedence."""
    given = workload.arguments
    chosen = [
        *("--load-format", "dummy" if dummy else "auto", "--kv-cache-memory-bytes", str(workload.kv_cache_bytes)),
        *("--max-model-len", str(workload.max_model_len), "--max-num-seqs", str(workload.batch)),
        *("--seed", str(workload.seed), "--generation-config", "vllm", "--no-enable-prefix-caching"),
    ]
    if workload.dtype != "auto":
        chosen += ["--dtype", workload.dtype]
    if workload.on_cpu and not any(w.startswith(("--enforce-eager", "--no-enforce-eager", "-cc", "--compil", "-O"))
                                   for w in given):  # fmt: skip
        chosen.append("--enforce-eager")  # compiling takes minutes per depth and gains little here
    if not workload.on_cpu:
        chosen += ["--worker-extension-cls", _ALLOCATOR]
    return [*chosen, *given]


def measure(
    contestant: Contestant, workload: Workload, salt: int, scratch: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All results of one run, times in milliseconds (load in seconds). Raises ServeError or BenchError."""
    arguments = server_arguments(workload, contestant.dummy)
    if not has_tokenizer(Path(contestant.path)) and flag(arguments, "--tokenizer") is None:
        words = scratch / f"tokenizer-{contestant.vocabulary}"
        words.mkdir(exist_ok=True)
        write_tokenizer(words, contestant.vocabulary)
        arguments += ["--tokenizer", str(words)]
    variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    if not workload.on_cpu:
        variables["VLLM_SERVER_DEV_MODE"] = "1"  # enables /collective_rpc, on the loopback only
    server = Server(contestant.path, name=contestant.label, arguments=arguments, variables=variables, progress=tell)
    client = Client()
    with _Resident(server) as resident:
        started = time.perf_counter()
        with server:
            loaded = time.perf_counter() - started
            client.server = server
            asked = prompts(workload, contestant.vocabulary, max(64, 2 * max(workload.concurrency)), salt)
            tell("Warming up")
            client.online(asked[:2], workload.output_len, 1)
            once = client.online(asked[2:3], workload.output_len, 1)["e2e_ms"][0] / 1000
            tell("Offline")
            offline = client.offline(
                prompts(workload, contestant.vocabulary, workload.batch, salt + 1), workload.output_len
            )
            online = {}
            for level in workload.concurrency:
                tell(f"{level} concurrent")
                if level > 1:
                    once = max(once, offline["seconds"] * level / workload.batch)
                count = requests_for(workload, level, once)
                answered = client.online((asked * (count // len(asked) + 1))[:count], workload.output_len, level)
                online[str(level)] = {k: v for k, v in answered.items() if k not in ("texts", "spec_decode")}
            capacity = kv_capacity(server)
            peak = resident.peak if workload.on_cpu else _allocated(server)
    return {
        "load_seconds": loaded,
        "offline": offline,
        "online": online,
        "kv_capacity_tokens": capacity,
        "peak_memory_bytes": peak,
    }


class Client:
    """vLLM's benchmark client (vllm.benchmarks.serve), imported once."""

    server: Server

    def __init__(self) -> None:
        for name in ("NO_PROXY", "no_proxy"):  # no proxy for the loopback
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))
        answer_for_vllm()
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # hide warnings when a run is stopped
        # vLLM prints much on import, and its log handlers keep the streams that they find then.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from vllm.benchmarks import serve
            from vllm.benchmarks.datasets import SampleRequest
        self._serve, self._sample = serve, SampleRequest

    def online(self, asked: Sequence[Any], output_len: int, concurrency: int, **extra: Any) -> dict[str, Any]:
        """Send all requests, `concurrency` at a time; returns every request's times in milliseconds, and its output."""
        requests = [
            self._sample(
                prompt=prompt, prompt_len=len(prompt) if isinstance(prompt, list) else 0, expected_output_len=output_len
            )
            for prompt in asked
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            found = asyncio.run(
                self._serve.benchmark(
                    task_type=self._serve.TaskType.GENERATION,
                    endpoint_type="openai",
                    api_url=f"{self.server.base_url}/completions",
                    base_url=self.server.root_url,
                    model_id=self.server.model,
                    model_name=self.server.model,
                    tokenizer=None,
                    input_requests=requests,
                    logprobs=None,
                    request_rate=float("inf"),
                    burstiness=1.0,
                    disable_tqdm=True,
                    num_warmups=0,
                    profile=False,
                    selected_percentile_metrics=[],
                    selected_percentiles=[],
                    ignore_eos=True,
                    goodput_config_dict={},
                    max_concurrency=concurrency,
                    lora_modules=None,
                    extra_headers=None,
                    extra_body={"temperature": 0.0} | extra,
                    ready_check_timeout_sec=0,
                )
            )
        if found["failed"] or not found["completed"]:
            reason = next((error for error in found["errors"] if error), "no reason reported").strip()
            raise BenchError(
                f"{self.server.model}: {found['failed']} of {len(requests)} requests failed: "
                f"{reason.splitlines()[-1][:300]}"
            )
        ends = zip(found["latencies"], found["ttfts"], found["output_lens"], strict=True)
        result = {
            "requests": len(requests),
            "seconds": found["duration"],
            "requests_per_second": len(requests) / found["duration"],
            "output_tokens_per_second": sum(found["output_lens"]) / found["duration"],
            "ttft_ms": [1000 * t for t in found["ttfts"]],
            "tpot_ms": [1000 * (whole - first) / (n - 1) for whole, first, n in ends if n > 1],
            "itl_ms": [1000 * t for itls in found["itls"] for t in itls],
            "e2e_ms": [1000 * t for t in found["latencies"]],
        }
        rates = {key: value for key, value in found.items() if key.startswith("spec_decode")}
        return result | {"texts": found["generated_texts"], "spec_decode": rates}

    def offline(self, asked: Sequence[list[int]], output_len: int) -> dict[str, float]:
        """Send all prompts in one request without streaming: throughput only."""
        body = {"model": self.server.model, "prompt": list(asked), "max_tokens": output_len, "temperature": 0,
                "ignore_eos": True}  # fmt: skip
        started = time.perf_counter()
        usage = _post(f"{self.server.base_url}/completions", body)["usage"]
        seconds = time.perf_counter() - started
        return {
            "prompts": len(asked),
            "seconds": seconds,
            "prompt_tokens_per_second": usage["prompt_tokens"] / seconds,
            "output_tokens_per_second": usage["completion_tokens"] / seconds,
        }


def kv_capacity(server: Server) -> int:
    """Tokens that fit in the KV cache, as vLLM reports it."""
    found = re.findall(r"KV cache size: ([\d,]+) tokens", server.log.read_text("utf-8", "replace"))
    if not found:
        raise BenchError(f"vLLM did not report the size of its KV cache; see {server.log}")
    return int(found[-1].replace(",", ""))


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with _DIRECT.open(request, timeout=3600) as answer:
            return dict(json.loads(answer.read()))
    except OSError as error:
        raise BenchError(f"{url}: no response ({error}); the server may have run out of memory") from None


def _allocated(server: Server) -> int:
    """Peak bytes of the allocators of all GPUs together."""
    answer = _post(f"{server.root_url}/collective_rpc", {"method": "peak_allocated_bytes"})
    return sum(int(part) for part in answer.get("results", []))


class _Resident:
    """Samples the resident memory of the server's process tree in a thread; `peak` is the maximum in bytes."""

    def __init__(self, server: Server) -> None:
        self._server, self._done = server, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def __enter__(self) -> _Resident:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            with contextlib.suppress(psutil.Error, AssertionError):
                top = psutil.Process(self._server.pid)
                total = 0
                for process in (top, *top.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        total += process.memory_info().rss
                self.peak = max(self.peak, total)
