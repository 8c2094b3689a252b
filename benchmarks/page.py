"""Renders the tables of a benchmark, for the terminal and the markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[list[str]]


def _bytes(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def _number(value: float) -> str:
    """Three digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def depth_rows(result: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """One row per model with its costs."""
    head = ["model", "layers", "ms per token", "prefill ms", "offline tokens/s", "weights", "KV per token",
            "KV tokens", "peak memory", "load s", "of the roofline"]  # fmt: skip
    rows = [
        [
            model["label"],
            str(model["layers"]),
            _number(model["time_per_output_token_ms"]),
            _number(model["prefill_ms"]),
            f"{_number(model['offline']['prompt_tokens_per_second'])} in, "
            f"{_number(model['offline']['output_tokens_per_second'])} out",
            _bytes(model["weight_bytes"]),
            _bytes(model["kv_bytes_per_token"]),
            f"{model['kv_capacity_tokens']:,}",
            _bytes(model["peak_memory_bytes"]),
            _number(model["load_seconds"]),
            f"{model['roofline']['decode_reached']:.0%}",
        ]
        for model in result["models"]
    ]
    return head, rows


def online_rows(result: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """One row for each model and concurrency: p50 / p99 of every time."""
    head = ["model", "concurrent", "requests/s", "tokens/s", "first token ms", "per token ms", "between tokens ms",
            "whole response ms"]  # fmt: skip

    def times(online: Mapping[str, Any], key: str) -> str:
        return f"{_number(online[key]['p50'])} / {_number(online[key]['p99'])}"

    rows = [
        [
            model["label"], level, _number(online["requests_per_second"]), _number(online["output_tokens_per_second"]),
            *(times(online, key) for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")),
        ]
        for model in result["models"]
        for level, online in model["online"].items()
    ]  # fmt: skip
    return head, rows


def line_rows(result: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """One row per fitted line."""
    from slicer.benchmarks.lines import LINES

    head = ["against the layers", "per layer", "95% interval", "fixed", "R2"]
    rows = []
    for name, line in result["lines"].items():
        title, unit = LINES[name]
        spell = _bytes if unit == "bytes" else (lambda value, unit=unit: f"{value:.3g} {unit}")
        interval = line["slope_interval"]
        within = "-" if interval is None else f"{spell(interval[0])} to {spell(interval[1])}"
        rows.append([title, spell(line["slope"]), within, spell(line["intercept"]), f"{line['r2']:.4f}"])
    return head, rows


def speed_rows(result: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """One row per depth: speed-up measured, allowed by the intercept, and ideal."""
    head = ["layers", "dropped", "speed-up", "intercept allows", "ideal L/(L-n)", "KV capacity"]
    deepest = max((row["layers"] for row in result["speed_up"]), default=0)
    rows = [
        [
            str(row["layers"]), f"{1 - row['layers'] / deepest:.0%}", f"{row['measured']:.2f}x",
            f"{row['allowed_by_intercept']:.2f}x", f"{row['ideal']:.2f}x", f"{row['kv_capacity_gain']:.3f}x",
        ]
        for row in result["speed_up"]
    ]  # fmt: skip
    return head, rows


def speculative_rows(result: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """One row per draft."""
    head = ["draft", "layers", "tokens/s", "speed-up", "accepted", "by position", "tokens per step", "same text"]

    def spell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            row["draft"] or "(none)", spell(row["draft_layers"], "d"), _number(row["tokens_per_second"]),
            f"{row['speed_up']:.2f}x", spell(row["acceptance_rate"], ".0%"),
            ", ".join(f"{rate:.0%}" for rate in row["acceptance_by_position"]) or "-",
            spell(row["mean_accepted_length"], ".2f"), f"{row['identical']} of {row['prompts']}",
        ]
        for row in result["speculative"]["rows"]
    ]  # fmt: skip
    return head, rows


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], Rows]]:
    """(title, head, rows) of every table that has data."""
    if result.get("speculative"):
        return [("Speculative decoding", *speculative_rows(result))]
    found = [("Cost by depth", *depth_rows(result)), ("Online (p50 / p99)", *online_rows(result))]
    if result["lines"]:
        found += [("Lines", *line_rows(result)), ("Speed-up per token", *speed_rows(result))]
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """A markdown page, also usable in a model card."""
    hardware, work = result["hardware"], result["workload"]
    parts = [f"# {result['title']}", "", f"**{result['verdict']}**", ""]
    if result.get("lines") or result.get("speculative"):
        parts += ["![by depth](bench.png)", ""]
    for title, head, rows in tables(result):
        parts += [f"## {title}", "", *markdown_table(head, rows), ""]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    levels = ", ".join(map(str, work["concurrency"]))
    parts += [
        "## Method",
        "",
        f"`{result['command']}`",
        "",
        f"{hardware['name']}, {hardware['memory_bytes'] / 1e9:.0f} GB of memory; {versions}. Prompts of "
        f"{work['input_len']} tokens, {work['output_len']} generated, {levels} concurrent; {result['rounds']} rounds, "
        f"each model in a fresh process, in a new order each round (seed {work['seed']}); times are those of "
        "the fastest round, percentiles those of all requests. "
        f"{'Random weights. ' if result['dummy'] else ''}"
        f"KV cache of {_bytes(work['kv_cache_bytes'])}; {work['dtype']}.",
    ]
    if result.get("limits"):
        limits = result["limits"]
        parts += [
            "",
            f"The roofline is what the machine's measured bandwidth ({limits['bytes_per_second'] / 1e9:.3g} GB/s) and "
            f"matrix rate ({limits['flops_per_second'] / 1e12:.3g} TFLOP/s) allow for one request at a time.",
        ]
    return "\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' for _ in head)}|"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)]
