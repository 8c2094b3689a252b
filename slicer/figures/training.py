"""Plot of the training and held-out loss during healing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slicer.figures.style import BLUE, ORANGE, finish, mark, plot, save, svg


def loss_curve(train: Mapping[int, float], held_out: Mapping[int, float], best: int, path: Path) -> None:
    """Plot the loss (nats per token) against the step: training (running mean) and held-out text. Marks the best held-
    out measurement. Writes a PNG or SVG."""
    figure, axes = plot()
    steps = sorted(train)
    window = max(1, len(steps) // 50)
    if steps:
        axes.plot(steps, [train[s] for s in steps], color=BLUE, alpha=0.25, linewidth=0.8)
        smooth = [
            sum(train[s] for s in steps[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(steps))
        ]
        axes.plot(steps, smooth, color=BLUE, label="training" + (f", mean of {window} steps" if window > 1 else ""))
    at = sorted(held_out)
    axes.plot(at, [held_out[s] for s in at], color=ORANGE, marker="o", markersize=4, label="held out")
    if best in held_out:
        mark(axes, "s", best, held_out[best], f"kept: step {best}")
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Healing")
    axes.legend(frameon=False)
    save(figure, path)


def healing_curve(held_out: Mapping[str, Mapping[int, float]]) -> str:
    """Plot the held-out losses of several healings against the step: name -> step -> loss."""
    figure, axes = plot(5.4, 3.7)
    for name, losses in held_out.items():
        axes.plot(list(losses), list(losses.values()), label=f"{name}: held-out loss", linewidth=1.4)
    finish(axes, xlabel="step", ylabel="loss (nats per token)")
    return svg(figure)
