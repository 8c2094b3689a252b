"""Renders the tables of a benchmark, for the terminal and the markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[dict[str, str]]  # column -> cell
_TIMES = {"first token ms": "ttft_ms", "per token ms": "tpot_ms", "between tokens ms": "itl_ms",
          "whole response ms": "e2e_ms"}  # fmt: skip


def _bytes(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def _number(value: float) -> str:
    """Three digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def depth_rows(result: Mapping[str, Any]) -> Rows:
    """One row per model with its costs."""
    return [
        {
            "model": model["label"],
            "layers": str(model["layers"]),
            "ms per token": _number(model["time_per_output_token_ms"]),
            "prefill ms": _number(model["prefill_ms"]),
            "offline tokens/s": f"{_number(model['offline']['prompt_tokens_per_second'])} in, "
            f"{_number(model['offline']['output_tokens_per_second'])} out",
            "weights": _bytes(model["weight_bytes"]),
            "KV per token": _bytes(model["kv_bytes_per_token"]),
            "KV tokens": f"{model['kv_capacity_tokens']:,}",
            "peak memory": _bytes(model["peak_memory_bytes"]),
            "load s": _number(model["load_seconds"]),
            "of the roofline": f"{model['roofline']['decode_reached']:.0%}",
        }
        for model in result["models"]
    ]


def online_rows(result: Mapping[str, Any]) -> Rows:
    """One row for each model and concurrency: p50 / p99 of every time."""
    return [
        {
            "model": model["label"],
            "concurrent": level,
            "requests/s": _number(online["requests_per_second"]),
            "tokens/s": _number(online["output_tokens_per_second"]),
            **{name: f"{_number(online[key]['p50'])} / {_number(online[key]['p99'])}" for name, key in _TIMES.items()},
        }
        for model in result["models"]
        for level, online in model["online"].items()
    ]


def line_rows(result: Mapping[str, Any]) -> Rows:
    """One row per fitted line."""
    from slicer.benchmarks.lines import LINES

    rows = []
    for name, line in result["lines"].items():
        title, unit = LINES[name]
        spell = _bytes if unit == "bytes" else (lambda value, unit=unit: f"{value:.3g} {unit}")
        row = {"against the layers": title, "per layer": spell(line["slope"])}
        row["95% interval"] = " to ".join(map(spell, line["slope_interval"] or ())) or "-"
        rows.append({**row, "fixed": spell(line["intercept"]), "R2": f"{line['r2']:.4f}"})
    return rows


def speed_rows(result: Mapping[str, Any]) -> Rows:
    """One row per depth: speed-up measured, allowed by the intercept, and ideal."""
    deepest = max(row["layers"] for row in result["speed_up"])
    return [
        {
            "layers": str(row["layers"]),
            "dropped": f"{1 - row['layers'] / deepest:.0%}",
            "speed-up": f"{row['measured']:.2f}x",
            "intercept allows": f"{row['allowed_by_intercept']:.2f}x",
            "ideal L/(L-n)": f"{row['ideal']:.2f}x",
            "KV capacity": f"{row['kv_capacity_gain']:.3f}x",
        }
        for row in result["speed_up"]
    ]


def speculative_rows(result: Mapping[str, Any]) -> Rows:
    """One row per draft."""

    def spell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        {
            "draft": row["draft"] or "(none)",
            "layers": spell(row["draft_layers"], "d"),
            "tokens/s": _number(row["tokens_per_second"]),
            "speed-up": f"{row['speed_up']:.2f}x",
            "accepted": spell(row["acceptance_rate"], ".0%"),
            "by position": ", ".join(f"{rate:.0%}" for rate in row["acceptance_by_position"]) or "-",
            "tokens per step": spell(row["mean_accepted_length"], ".2f"),
            "same text": f"{row['identical']} of {row['prompts']}",
        }
        for row in result["speculative"]["rows"]
    ]


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of every table that has data."""
    if result.get("speculative"):
        found = {"Speculative decoding": speculative_rows(result)}
    else:
        found = {"Cost by depth": depth_rows(result), "Online (p50 / p99)": online_rows(result)}
        if result["lines"]:
            found |= {"Lines": line_rows(result), "Speed-up per token": speed_rows(result)}
    return [(title, list(rows[0]), [list(row.values()) for row in rows]) for title, rows in found.items()]


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
