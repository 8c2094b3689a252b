"""Reports the contents of a directory as one self-contained HTML page and as markdown.

Covers a sweep (sweep.json), layer distances (distances.json or analysis.json, also in slicer/), a benchmark
(bench.json) and the plan of a sliced checkpoint with its healing (slicer/plan.json); each section needs its file.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from slicer.errors import EvaluationError, SlicerError
from slicer.measure.analysis import Distances
from slicer.plan.amounts import spell_layers
from slicer.plan.plan import METRIC, Plan
from slicer.plan.records import HealingRecord
from slicer.report import figures
from slicer.report.figures import Figure
from slicer.runtime.files import atomic_file, write_atomically
from slicer.runtime.versions import __version__
from slicer.sweep import verdict
from slicer.sweep.table import Row, Table, read_table

_SAMPLES = 4
_RECOMMENDED = "report/plan.json"


def write_report(directory: Path) -> tuple[Path, Path]:
    """Write report.html and report.md (figures in report/) into `directory`; returns both paths. Raises EvaluationError
    if there is nothing to report, or a file is damaged; OutputError if one cannot be written."""
    from jinja2 import Environment, PackageLoader

    found = collect(directory)
    figures = directory / "report"
    try:
        figures.mkdir(exist_ok=True)
        for figure in found["figures"]:
            with atomic_file(figures / figure.name) as part:
                part.write_bytes(figure.data)
        if found["recommended"] is not None:
            write_atomically(directory / _RECOMMENDED, found["recommended"].to_json())
        else:  # remove the recommendation of an earlier report
            (directory / _RECOMMENDED).unlink(missing_ok=True)
    except OSError as error:
        raise EvaluationError(f"{figures}: cannot be written ({error.strerror})") from None
    for name in ("report.md", "report.html"):
        templates = Environment(
            loader=PackageLoader("slicer.report"), autoescape=name.endswith("html"), trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        write_atomically(directory / name, templates.get_template(f"{name}.j2").render(found))
    return directory / "report.html", directory / "report.md"


def collect(directory: Path) -> dict[str, Any]:
    """The variables of the templates. Raises EvaluationError."""
    if not directory.is_dir():
        raise EvaluationError(
            f"{directory}: no such directory; pass the output directory of a sweep, analysis or bench"
        )
    table = read_table(directory) if (directory / "sweep.json").is_file() else None
    plan, distances, bench = _plan(directory), _distances(directory), _json(directory / "bench.json")
    if table is None and plan is None and distances is None and bench is None:
        raise EvaluationError(
            f"{directory}: nothing to report: it has no sweep.json, distances.json, bench.json or slicer/plan.json"
        )
    judged = verdict.judge(table) if table else None
    row = judged.row if judged else None
    chosen, offset = _chosen(row, plan), plan.half_offset if plan and row is None else None
    healings = [(each.name, each.healing) for each in (table.rows if table else ()) if each.healing]
    if plan is not None and plan.healing:
        healings.append(("this checkpoint", plan.healing))
    groups: dict[str, list[Figure]] = {
        "distances": figures.distance_figures(distances, chosen, offset) if distances else [],
        "curves": figures.curve_figures(table) if table else [],
        "healing": figures.healing_figures(_held_out(healings)),
        "bench": figures.bench_figures(bench or {}),
    }
    recommended = _recommended(table, row) if table and row else None
    source = (table.settings["source"] if table else None) or (plan.source if plan else None) or directory.name
    return {
        "title": f"{Path(str(source)).name}: layers dropped",
        "source": source,
        "depth": table.depth if table else plan.depth if plan else distances.depth if distances else None,
        "table": table,
        "best": row,
        "rows": [(each, spell_layers(each.dropped), _cells(each, table)) for each in table.by_depth] if table else [],
        "verdict": judged,
        "plan": plan,
        "promise": _promise(directory),
        "recommended": recommended,
        "healings": [(name, record.method, _losses(record)) for name, record in healings],
        "samples": _samples(table, row) if table else [],
        "bench": bench,
        "commands": _commands(table, plan, recommended, directory),
        "facts": _facts(table, plan),
        "groups": groups,
        "figures": [figure for group in groups.values() for figure in group],
        "version": __version__,
    }


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        raise EvaluationError(f"{file}: not valid JSON; remove it or create it again") from None
    return found if isinstance(found, dict) else None


def _plan(directory: Path) -> Plan | None:
    for file in (directory / "slicer" / "plan.json", directory / "plan.json"):
        if file.is_file():
            return Plan.load(file)
    return None


def _distances(directory: Path) -> Distances | None:
    # the file that the cut was chosen by comes first
    for name in ("distances.json", "analysis.json", "slicer/distances.json", "slicer/analysis.json"):
        record = _json(directory / name)
        if record is None:
            continue
        metrics = record.get("metrics")
        if isinstance(metrics, dict) and metrics:
            record |= metrics.get(METRIC) or next(iter(metrics.values()))
        try:
            return Distances.from_json(json.dumps(record))
        except SlicerError as error:
            raise EvaluationError(f"{directory / name}: {error}") from None
    return None


def _promise(directory: Path) -> str | None:
    """The target and the result of `slicer sweep --retain` as a sentence."""
    record = _json(directory / "promise.json")
    if record is None:
        return None
    try:
        share, metric, best, tried = record["share"], record["metric"], record["best"], record["tried"]
        words = f"Target: at least {share:.1%} of {metric}. "
        if best is None:
            return words + f"None of the {len(tried)} cuts tried reaches it."
        doubt = abs(best["margin"]) < 1.645 * best["standard_error"]
        return (
            f"{words}Of the {len(tried)} cuts tried, the deepest that reaches it drops {best['n']} layers and retains "
            f"{best['share']:.1%}{' (within the error: measure more items)' if doubt else ''}."
        )
    except (KeyError, TypeError, ValueError):
        raise EvaluationError(f"{directory / 'promise.json'}: not a valid file; remove it") from None


def _held_out(healings: Iterable[tuple[str, HealingRecord]]) -> dict[str, dict[int, float]]:
    """The held-out losses by step, of each healing that took steps."""
    found = {}
    for name, record in healings:
        losses = record.training.held_out if record.training is not None else {}
        if len(losses) > 1:
            found[name] = {step: loss for step, loss in sorted(losses.items()) if math.isfinite(loss)}
    return found


def _losses(record: HealingRecord) -> list[str]:
    """The loss of the original, of the cut and of the healed cut, as they are printed."""
    loss = record.loss
    return ["–" if value is None else f"{value:.4f}" for value in (loss.source, loss.before, loss.after)]


def _chosen(row: Row | None, plan: Plan | None) -> tuple[int, int] | None:
    """(start, n) of the dropped layers, if they are one block of whole layers."""
    if row is None and plan is not None and plan.joined:
        return None
    dropped = row.dropped if row else plan.dropped if plan else ()
    if dropped and list(dropped) == list(range(dropped[0], dropped[0] + len(dropped))):
        return dropped[0], len(dropped)
    return None


def _cells(row: Row, table: Table) -> list[str]:
    """The values of a cell: scores, loss, loss as a share of log V, repetition and distinct-2."""
    cells = [row.printed(measure) or "–" for measure in (*table.tasks, "c4")]
    cells.append(f"{row.loss.normalised:.3f}" if row.loss else "–")
    health = row.health
    return cells + ([f"{health.repetition[0]:.2f}", f"{health.distinct_2[0]:.2f}"] if health else ["–", "–"])


def _samples(table: Table, best: Row | None) -> list[dict[str, Any]]:
    """Samples of the unpruned model, the cut and the healed cut, for one depth and strategy."""
    whole = next((row for row in table.rows if row.n == 0), None)
    cuts = [row for row in table.rows if row.n and row.evaluation]
    if whole is None or not cuts:
        return []
    focus = best or min(cuts, key=lambda r: r.n)
    beside = [r for r in cuts if (r.n, r.strategy, r.dropped) == (focus.n, focus.strategy, focus.dropped)]
    beside = [r for r in beside if r.heal == "none" or r.seed == focus.seed or focus.heal == "none"]
    columns = [("original", whole)] + [
        (f"{r.n} layers cut" + ("" if r.heal == "none" else f", healed ({r.heal})"), r)
        for r in sorted(beside, key=lambda r: r.heal != "none")
    ]
    shown: dict[str, list[tuple[str, str]]] = {}  # prompt -> (model, continuation)
    for name, row in columns:
        for prompt, text in row.health.samples[:_SAMPLES] if row.health else ():
            shown.setdefault(prompt, []).append((name, text))
    return [{"prompt": prompt, "texts": texts} for prompt, texts in shown.items()]


def _recommended(table: Table, row: Row) -> Plan:
    """The plan of a cell, with its healing: `slicer convert --plan` makes what was measured."""
    cut = Plan.dropping(table.depth, row.dropped)
    given = {name: getattr(row, name) for name in ("strategy", "distance", "seed", "healing")}
    return replace(cut, source=table.settings["source"], **given)


def _commands(table: Table | None, plan: Plan | None, recommended: Plan | None, directory: Path) -> list[str]:
    found = list(table.commands) if table is not None else []
    if plan is not None and plan.command and plan.command not in found:
        found.append(plan.command)
    if recommended is not None:
        words = ["slicer", "convert", recommended.source, "--plan", directory / _RECOMMENDED]
        found.append(shlex.join(map(str, words)))
    return [*found, shlex.join(["slicer", "report", str(directory)])]


def _facts(table: Table | None, plan: Plan | None) -> list[tuple[str, str]]:
    """What is needed to reproduce the results: data, seeds, versions."""
    if table is None:
        return [("seed", str(plan.seed)), *plan.versions.items()] if plan is not None else []
    told = {key.replace("_", " "): value for key, value in table.settings.items() if value not in (None, [], {}, "")}
    facts = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in told.items()]
    return facts + (list(table.unpruned.versions.items()) if table.unpruned is not None else [])
