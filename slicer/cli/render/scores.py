"""Terminal output of evaluations, sweeps and the search for the deepest cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.cli.render.progress import stdout, table

if TYPE_CHECKING:
    from slicer.evaluate.compare import Difference
    from slicer.evaluate.results import Evaluation
    from slicer.sweep.bisect import Deepest
    from slicer.sweep.table import Table as SweepTable


def print_evaluations(results: Sequence[Evaluation], compared: Sequence[Sequence[Difference]]) -> None:
    """Print a table per model (value, standard error, chance), then each model's differences from the first."""
    console = stdout()
    for result in results:
        shown = table(result.model, "", "value", "standard error", "guessing", "items")
        for s in result.scores:
            shots = f", {s.shots}-shot" if s.chance is not None else ""
            shown.add_row(
                f"{s.task} ({s.metric}{shots})", f"{s.value:.4f}",
                "-" if s.standard_error is None else f"{s.standard_error:.4f}",
                "-" if s.chance is None else f"{s.chance:.4f}", f"{s.items}",
            )  # fmt: skip
        if (loss := result.loss) is not None:
            guess = loss.nats_per_token / loss.normalised
            shown.add_row(f"loss (nats per token, {loss.source})", f"{loss.nats_per_token:.4f}",
                          f"{loss.standard_error:.4f}", f"{guess:.4f}", f"{loss.sequences}")  # fmt: skip
            shown.add_row("loss / log V", f"{loss.normalised:.4f}",
                          f"{loss.standard_error / guess:.4f}", "1", f"{loss.tokens} tokens")  # fmt: skip
        if (health := result.health) is not None:
            for name in ("repetition", "distinct_1", "distinct_2", "length"):
                mean, error = getattr(health, name)
                label = f"samples: {name.replace('_', '-')}"
                shown.add_row(label, f"{mean:.3f}", f"{error:.3f}", "-", f"{len(health.samples)}")
        console.print(shown)
    for result, rows in zip(results[1:], compared, strict=True):
        console.print(f"{result.model} against {results[0].model}, item by item")
        for d in rows:
            verdict = "within noise" if d.within_noise else "significant"
            unit = " (nats)" if "perplexity" in d.measure or d.measure.startswith("c4") else ""
            console.print(
                f"  {d.measure + unit:24} {d.delta:+.4f} ± {d.standard_error:.4f}  p = {d.p_value:.2g} "
                f"over {d.items}: {verdict}"
            )
        if not rows:
            console.print("  no items in common: run the same tasks on both")


def print_sweep(done: SweepTable, directory: Path) -> None:
    """Print the table of a sweep; a star marks a significant difference from the unpruned model."""
    console = stdout()
    measured = (*done.tasks, *(("loss", "/ log V") if done.has_loss else ()), "repetition")
    title = f"{done.settings['source']}: {done.depth} layers"
    shown = table(title, "dropped", "strategy", "healing", *measured, texts=3)
    for row in done.by_depth:
        cells = [f"{row.n} ({row.fraction:.0%})", row.label if row.n else "-", row.heal if row.n else "-"]
        if row.evaluation is None:
            shown.add_row(*cells, row.error or "not measured")
            continue
        cells += [_aligned(row.printed(task)) for task in done.tasks]
        if done.has_loss:
            cells += [_aligned(row.printed("c4")), f"{row.loss.normalised:.3f}" if row.loss else "-"]
        cells.append(f"{row.health.repetition[0]:.2f}" if row.health else "-")
        shown.add_row(*cells)
    console.print(shown)
    console.print("* significant difference from the unpruned model (paired, item by item, p < 0.05)")
    if done.missing:
        console.print(f"missing   {done.missing} cells are not finished")
    console.print(f"written   {directory / 'table.csv'}")


def _aligned(value: str | None) -> str:
    """With a blank in place of the star where there is none."""
    return "-" if value is None else value if value.endswith("*") else f"{value} "


def print_kept(found: Deepest, share: float, metric: str, plan: Path, source: str) -> None:
    """Print the cuts tried by the bisection, and the command that makes the best one."""
    console = stdout()
    for kept in found.tried:
        words = f"not possible: {kept.error}"
        if kept.error is None:
            doubt = "" if kept.sure else " (within the error: use more items)"
            words = f"{kept.share:.1%} of {metric}: {'retained' if kept.kept else 'not retained'}{doubt}"
        console.print(f"drop {kept.n:<4} {words}")
    if found.best is not None:
        console.print(f"deepest   dropping {found.best.n} layers retains {found.best.share:.1%} of {metric}")
        console.print(f"next      slicer convert {source} --plan {plan}")
    else:
        none = f"no cut retains {share:.1%} of {metric}"
        console.print(none if found.tried else "no cut of this model is possible")
