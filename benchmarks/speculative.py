"""A sliced model as the draft of its original (section 2.3 of the paper): acceptance rate and speed-up.

Greedy, one request at a time, the same prompts for all. Speculative decoding gives the original's outputs; the number
of identical ones is counted, because logits of verified tokens may be rounded differently from those of decoded ones.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slicer.benchmarks.contestants import Contestant
from slicer.benchmarks.vllm_engine import VARIABLES, Client, server_arguments
from slicer.benchmarks.workload import Workload
from slicer.errors import BenchError, unreadable
from slicer.serve.server import Server

ALONE = "(no draft)"
PROMPTS = (
    "The capital of France is",
    "In the beginning there was",
    "Water boils at a temperature of",
    "The three most important things in life are",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "import json\n\ndef read_config(path):\n    ",
    "To make a good cup of tea, first",
)


def read_prompts(file: Path) -> list[str]:
    """One prompt per line; in a .jsonl file, the field "prompt" or "text". Raises BenchError."""
    try:
        lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(
            f"{file}: cannot be read ({unreadable(error)}); pass a file with one prompt per line"
        ) from None
    if not lines:
        raise BenchError(f"{file}: no prompts; pass a file with one prompt per line")
    return [_prompt(line, f"{file}:{n}") for n, line in enumerate(lines, 1)] if file.suffix == ".jsonl" else lines


def _prompt(line: str, where: str) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        row = json.loads(line)
        if isinstance(text := row.get("prompt", row.get("text")), str):
            return text
    raise BenchError(f'{where}: not a JSON object with "prompt" or "text"; fix the line')


def labels(contestants: Sequence[Contestant]) -> list[str]:
    """Labels of the runs: the original alone, then each draft."""
    return [ALONE, *(contestant.label for contestant in contestants[1:])]


def measure(
    original: Contestant,
    draft: Contestant | None,
    workload: Workload,
    prompts: Sequence[str],
    speculative_tokens: int,
    status: Callable[[str], None],
) -> dict[str, Any]:
    """Run the original once with this draft, in a fresh process. Raises ServeError or BenchError."""
    server = Server(
        original.path,
        name=original.label,
        draft=None if draft is None else draft.path,
        speculative_tokens=speculative_tokens,
        arguments=server_arguments(workload, 4),
        variables=VARIABLES,
        progress=status,
    )
    client = Client(server)
    with server:
        status("Warming up")
        client.online(prompts[:1], workload.output_len, 1)
        status("Answering")
        found = client.online(prompts, workload.output_len, 1)
    return {
        key: found[key] for key in ("seconds", "output_tokens_per_second", "ttft_ms", "e2e_ms", "texts", "spec_decode")
    }


def summarize(
    contestants: Sequence[Contestant],
    runs: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    tokens: int,
    dtype: str,
) -> dict[str, Any]:
    """The `speculative` section of bench.json, with its verdict."""
    rows = []
    alone = [run for run in runs if run["label"] == ALONE]
    slow = statistics.median(run["output_tokens_per_second"] for run in alone)
    reference = alone[0]["texts"]
    layers = {contestant.label: contestant.layers for contestant in contestants[1:]}
    for label in labels(contestants):
        mine = [run for run in runs if run["label"] == label]
        speed = statistics.median(run["output_tokens_per_second"] for run in mine)
        stats = [run["spec_decode"] for run in mine if run["spec_decode"]]
        texts = mine[-1]["texts"]
        positions = zip(*(s["spec_decode_per_position_acceptance_rates"] for s in stats), strict=True)
        differing = [
            {"prompt": prompt, "alone": a, "drafted": b}
            for prompt, a, b in zip(prompts, reference, texts, strict=True)
            if a != b
        ]
        row = {
            "draft": None if label == ALONE else label,
            "draft_layers": layers.get(label),
            "tokens_per_second": speed,
            "speed_up": speed / slow,
            "acceptance_rate": _median(stats, "spec_decode_acceptance_rate", 0.01),
            "mean_accepted_length": _median(stats, "spec_decode_acceptance_length", 1.0),
            "acceptance_by_position": [statistics.median(rates) for rates in positions],
            "identical": len(texts) - len(differing),
            "prompts": len(texts),
            "outputs_identical": not differing,
            "first_difference": next(iter(differing), None),
        }
        rows.append(row)
    drafted = [row for row in rows if row["draft"] is not None]
    best = max(drafted, key=lambda row: row["speed_up"])
    if best["speed_up"] > 1:
        verdict = f"{best['draft']} gives {best['speed_up']:.2f}x the original's tokens per second"
    else:
        verdict = f"no draft is faster: the best, {best['draft']}, gives {best['speed_up']:.2f}x the original's speed"
    if best["acceptance_rate"] is not None:
        verdict += f"; {best['acceptance_rate']:.0%} of its tokens are accepted"
    if all(row["outputs_identical"] for row in drafted):
        verdict += "; all outputs are identical"
    else:
        verdict += f"; some outputs differ, which rounding in {dtype} can cause (compare with --dtype float32)"
    return {"rows": rows, "num_speculative_tokens": tokens, "prompts": list(prompts), "verdict": verdict}


def _median(stats: Sequence[Mapping[str, Any]], key: str, scale: float) -> float | None:
    values = [scale * s[key] for s in stats if key in s]
    return statistics.median(values) if values else None
