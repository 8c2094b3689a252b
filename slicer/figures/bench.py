"""Figures of a benchmark as PNG and SVG, without dates, so that equal data gives equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slicer.figures.style import BLUE, BOTH, GREY, VERMILION, canvas, finish, plot, save, svg


def lines(result: Mapping[str, Any], directory: Path) -> None:
    """Plot time per output token, prefill, memory and speed-up against the layers: bench.png and bench.svg."""
    figure = canvas(10, 7.2)
    axes = figure.subplots(2, 2)
    models, fitted = result["models"], result["lines"]
    for panel, key, unit, title in (
        (axes[0, 0], "time_per_output_token_ms", "ms per token", "Time per output token"),
        (axes[0, 1], "prefill_ms", "ms", "Prefill (time to first token)"),
    ):
        rounds = [(model["layers"], run[key]) for model in models for run in model["by_round"]]
        _line(panel, fitted[key], unit, title, rounds)
    _memory(axes[1, 0], result)
    _speed(axes[1, 1], result)
    name = models[0]["label"]
    figure.suptitle(f"{name} by depth: {result['engine']} on {result['hardware']['name']}", fontsize=11)
    save(figure, directory / f"bench{BOTH}")


def speculative(result: Mapping[str, Any], directory: Path) -> None:
    """Plot tokens per second with each draft, and the acceptance rate by draft position."""
    figure = canvas(10, 4)
    left, right = figure.subplots(1, 2)
    rows = result["speculative"]["rows"]
    names = [row["draft"] or "no draft" for row in rows]
    left.barh(names[::-1], [row["tokens_per_second"] for row in rows][::-1], color=BLUE)
    left.set(xlabel="output tokens/s", title="Speed")
    for row in rows:
        rates = row["acceptance_by_position"]
        if rates:
            right.plot(range(1, len(rates) + 1), rates, marker="o", label=row["draft"])
    right.set(xlabel="position in the draft", ylabel="accepted", title="Acceptance by position", ylim=(0, 1.02))
    right.locator_params(axis="x", integer=True)
    if any(row["acceptance_by_position"] for row in rows):
        right.legend(frameon=False, fontsize="small")
    save(figure, directory / f"bench{BOTH}")


def _line(axes: Any, line: Mapping[str, Any], unit: str, title: str, rounds: list[tuple[int, float]]) -> None:
    x, y = zip(*line["points"], strict=True)
    reach = np.linspace(0, max(x) * 1.03, 60)
    axes.plot(reach, line["intercept"] + line["slope"] * reach, color=BLUE, linewidth=1.4)
    if line.get("band"):  # (layers, lower, upper)
        band = zip(*line["band"], strict=True)
        axes.fill_between(*band, color=BLUE, alpha=0.13, linewidth=0, label="95% confidence")
    axes.plot(*zip(*rounds, strict=True), "x", color=GREY, markersize=5, label="rounds")
    axes.plot(x, y, "o", color=BLUE, label="fastest round")
    axes.set(xlim=(0, None), ylim=(0, max(*y, *(p[1] for p in rounds)) * 1.12))
    _label(axes, unit, f"{title}: {line['slope']:.3g} per layer {line['intercept']:+.3g}, R2 {line['r2']:.3f}")


def _memory(axes: Any, result: Mapping[str, Any]) -> None:
    """Plot weights, KV cache per token and peak memory as shares of the deepest model's."""
    models = result["models"]
    deepest = max(models, key=lambda model: model["layers"])
    for name, label, marker, colour in (
        ("weight_bytes", "weights", "o", BLUE),
        ("kv_bytes_per_token", "KV cache per token", "s", VERMILION),
        ("peak_memory_bytes", "peak memory, KV cache included", "^", GREY),
    ):
        line, whole = result["lines"][name], deepest[name]
        reach = np.asarray([0, deepest["layers"]])
        axes.plot(reach, (line["intercept"] + line["slope"] * reach) / whole, color=colour, linewidth=1)
        axes.plot([m["layers"] for m in models], [m[name] / whole for m in models], marker, color=colour, label=label)
    axes.set(xlim=(0, None), ylim=(0, 1.25))
    _label(axes, "share of the whole model's", "Memory", legend="lower right")


def _speed(axes: Any, result: Mapping[str, Any]) -> None:
    rows = result["speed_up"]
    layers = [row["layers"] for row in rows]
    line, deepest = result["lines"]["time_per_output_token_ms"], max(layers)
    reach = np.linspace(min(layers), deepest, 60)
    times = line["intercept"] + line["slope"] * reach
    axes.plot(reach, deepest / reach, "--", color=GREY, label="ideal, L/(L-n)")
    axes.plot(reach, times[-1] / times, color=BLUE, label="allowed by the intercept")
    axes.plot(layers, [row["measured"] for row in rows], "o", color=BLUE, label="measured")
    axes.plot(layers, [row["kv_capacity_gain"] for row in rows], "s", color=VERMILION, markersize=4,
              label="KV capacity gained")  # fmt: skip
    axes.invert_xaxis()
    _label(axes, "relative to the whole model", "Speed-up")


def _label(axes: Any, unit: str, title: str, legend: str = "upper left") -> None:
    axes.set(xlabel="layers", ylabel=unit)
    axes.set_title(title, fontsize=10)
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, fontsize="small", loc=legend)


def bench_line(points: Sequence[tuple[int, float]], line: Mapping[str, Any] | None, label: str) -> str:
    """Plot a measurement of `slicer bench` against the number of layers, with its fitted line."""
    figure, axes = plot(5.4, 3.7)
    xs, ys = zip(*sorted(points), strict=True)
    axes.plot(xs, ys, marker="o", linestyle="none", color=BLUE, label="measured")
    if line is not None:
        ends = (0, max(xs))
        fitted = [line["intercept"] + line["slope"] * x for x in ends]
        axes.plot(ends, fitted, color=GREY, linewidth=1, label=f"line, R² = {line['r2']:.4f}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    finish(axes, xlabel="layers", ylabel=label)
    return svg(figure)
