"""Summarises finished runs: one row per depth, fitted lines, roofline; and writes the output files."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from slicer.benchmarks import page
from slicer.benchmarks.contestants import Contestant
from slicer.benchmarks.lines import LINES, fit, roofline, speed_ups, verdict
from slicer.benchmarks.workload import TIMES, Workload
from slicer.errors import BenchError
from slicer.figures import bench as figures
from slicer.runtime.files import write_atomically

PERCENTILES = (50, 90, 99)
_OFFLINE = ("prompt_tokens_per_second", "output_tokens_per_second")
_ONLINE = ("requests_per_second", "output_tokens_per_second")


def summarize(
    contestants: Sequence[Contestant], workload: Workload, runs: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]
) -> dict[str, Any]:
    """The `models`, `lines`, `speed_up` and `verdict` of bench.json.

    The time of a depth is that of its fastest round (the median over the round's requests), because disturbances only
    add time. Percentiles are over the requests of all rounds.
    """
    models = [_model(c, workload, [run for run in runs if run["label"] == c.label], limits) for c in contestants]
    if len({c.layers for c in contestants}) < 2:
        alone = "only one depth: pass more (SLICED... or --drop) for a line"
        return {"models": models, "lines": {}, "speed_up": [], "verdict": alone}
    depths = [model["layers"] for model in models]
    fitted = {name: fit(depths, [model[name] for model in models]) for name in LINES}
    line, times = fitted["time_per_output_token_ms"], _by_depth(models, "time_per_output_token_ms")
    capacity = _by_depth(models, "kv_capacity_tokens")
    whole = capacity[max(times)]
    return {
        "models": models,
        "lines": {name: {"unit": LINES[name][1], **asdict(each)} for name, each in fitted.items()},
        "speed_up": [{**asdict(s), "kv_capacity_gain": capacity[s.layers] / whole} for s in speed_ups(line, times)],
        "verdict": verdict(line, times),
    }


def _by_depth(models: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """layers -> value; the mean of models with the same depth."""
    depths = {model["layers"] for model in models}
    return {d: statistics.fmean(m[name] for m in models if m["layers"] == d) for d in sorted(depths)}


def _model(
    contestant: Contestant, workload: Workload, runs: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]
) -> dict[str, Any]:
    if not runs:
        raise BenchError(f"{contestant.label}: no finished run")
    low = str(min(workload.concurrency))
    # Runs reused from an earlier day may have had another KV cache, if memory was scarce.
    budget = workload.kv_cache_bytes
    capacity = round(statistics.median(budget / r["kv_cache_bytes"] * r["kv_capacity_tokens"] for r in runs))
    online = {}
    for level in map(str, workload.concurrency):
        rounds = [run["online"][level] for run in runs]
        online[level] = {
            "requests": sum(r["requests"] for r in rounds),
            **{key: statistics.median(r[key] for r in rounds) for key in _ONLINE},
            **{key: _spread([v for r in rounds for v in r[key]]) for key in TIMES},
        }

    by_round = [
        {
            "round": run["round"],
            "time_per_output_token_ms": statistics.median(run["online"][low]["tpot_ms"]),
            "prefill_ms": statistics.median(run["online"][low]["ttft_ms"]),
            "load_seconds": run["load_seconds"],
        }
        for run in runs
    ]
    fastest = ("time_per_output_token_ms", "prefill_ms", "load_seconds")
    token, first, loaded = (min(each[key] for each in by_round) for key in fastest)
    kv = contestant.kv_bytes_per_token
    held = budget / capacity
    if not kv or abs(held / kv - 1) > 0.02:
        kv = round(held)  # windows, pages or several devices: the effective size per token
    middle = workload.input_len + workload.output_len / 2
    peaks = (limits["bytes_per_second"], limits["flops_per_second"])
    read, flops = contestant.read_bytes, int(low) * contestant.flops_per_token
    decode, decode_bound = roofline(read + int(low) * kv * middle, flops, *peaks)
    prefill, prefill_bound = roofline(read, flops * workload.input_len, *peaks)
    return {
        **contestant.to_dict(),
        "rounds": len(runs),
        "time_per_output_token_ms": token,
        "prefill_ms": first,
        "kv_bytes_per_token": kv,
        "kv_capacity_tokens": capacity,
        "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs),
        "load_seconds": loaded,
        "offline": {key: max(run["offline"][key] for run in runs) for key in _OFFLINE},
        "online": online,
        "roofline": {
            "decode_ms": decode, "decode_bound": decode_bound, "decode_reached": decode / token,
            "prefill_ms": prefill, "prefill_bound": prefill_bound, "prefill_reached": prefill / first,
        },
        "by_round": by_round,
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; NaN without values."""
    values = values or [float("nan")]
    found = np.percentile(values, PERCENTILES)
    return {"mean": float(np.mean(values)), **{f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}}


def write(directory: Path, result: Mapping[str, Any]) -> None:
    """Write bench.json, bench.csv, bench.md, and the figure as PNG and SVG, each atomically."""
    write_atomically(directory / "bench.json", json.dumps(result, indent=2, allow_nan=False, default=str) + "\n")
    write_atomically(directory / "bench.csv", table(result))
    write_atomically(directory / "bench.md", page.markdown(result))
    if result.get("lines"):
        figures.lines(result, directory)
    elif result.get("speculative"):
        figures.speculative(result, directory)


def table(result: Mapping[str, Any]) -> str:
    """bench.csv: one row for each model and concurrency."""
    if result.get("speculative"):
        names = ["draft", "draft_layers", "tokens_per_second", "speed_up", "acceptance_rate", "mean_accepted_length",
                 "identical", "prompts"]  # fmt: skip
        rows = [{name: row.get(name) for name in names} for row in result["speculative"]["rows"]]
    else:
        plain = ("label", "layers", "weight_bytes", "kv_bytes_per_token", "kv_capacity_tokens", "peak_memory_bytes",
                 "load_seconds", "time_per_output_token_ms", "prefill_ms")  # fmt: skip
        statistic = ("mean", *(f"p{p}" for p in PERCENTILES))
        rows = [
            {
                **{name: model[name] for name in plain},
                **{f"offline_{name}": model["offline"][name] for name in _OFFLINE},
                "concurrency": level,
                **{name: online[name] for name in ("requests", *_ONLINE)},
                **{f"{t}_{s}": online[t][s] for t in TIMES for s in statistic},
            }
            for model in result["models"]
            for level, online in model["online"].items()
        ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
