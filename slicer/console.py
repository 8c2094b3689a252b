"""What the terminal shows: progress on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from slicer.plan import Plan, spell_layers
from slicer.progress import Progress

if TYPE_CHECKING:
    from slicer.analyze import Planned
    from slicer.checkpoint.sizes import Sizes
    from slicer.convert import Summary
    from slicer.demo.show import Shown
    from slicer.inspect import Inspection
    from slicer.measure.analysis import Analysis, Distances

_ERR = Console(stderr=True, highlight=False)
_QUIET_SECONDS = 20  # between lines of progress where stderr is a file
_SHADES = " .:-=+*#%@"[::-1]  # closest to farthest


class _Bars(Progress):
    """One line for each stage; counted stages get a bar with rate and time left."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._text, self._total, self._done = "", None, 0  # type: str, int | None, int
        self._told = time.monotonic()

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        self.close()
        self._text, self._total, self._done, self._told = text, total, 0, time.monotonic()
        if not _ERR.is_terminal:
            return
        columns: tuple[ProgressColumn, ...]
        if total is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bars = Bars(*columns, console=_ERR, transient=True)
        elif unit == "bytes":
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bars = Bars(*columns, TimeRemainingColumn(), console=_ERR, transient=True)
        else:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                       TextColumn("{task.fields[detail]}"))  # fmt: skip
            self._bars = Bars(*columns, TimeRemainingColumn(), console=_ERR, transient=True)
        self._bars.start()
        self._task = self._bars.add_task(text, total=total, detail="")

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, amount)

    def detail(self, text: str) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, detail=text)
        elif not _ERR.is_terminal and time.monotonic() - self._told > _QUIET_SECONDS:
            self._told = time.monotonic()
            _ERR.print(f"{self._text}: {self._done} of {self._total}, {text}", markup=False)

    def note(self, text: str) -> None:
        _ERR.print(f"note: {text}")

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on stderr; transformers' and datasets' own chatter is turned off."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bars = _Bars()
    try:
        yield bars
    finally:
        bars.close()


def _stdout() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _size(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} "


def _rows(sizes: Sizes) -> list[tuple[str, float, str]]:
    return [
        ("layers", sizes.depth, f"{sizes.depth}"),
        ("parameters", sizes.parameters, _size(sizes.parameters).strip()),
        ("weights", sizes.total_bytes, _size(sizes.total_bytes) + "B"),
        ("FLOPs a token", sizes.flops_per_token, _size(sizes.flops_per_token).strip()),
        ("KV cache a token", sizes.kv_bytes_per_token, _size(sizes.kv_bytes_per_token) + "B"),
    ]


def print_summary(summary: Summary) -> None:
    """The table before and after, the block, the checks, the warnings."""
    console = _stdout()
    plan = summary.plan
    table = Table(title=f"{plan.source}: {plan.depth} to {len(plan.kept)} layers", title_justify="left")
    for name in ("", "before", "after", "left"):
        table.add_column(name, justify="left" if not name else "right")
    for (label, old, before), (_, new, after) in zip(
        _rows(summary.before), _rows(summary.after), strict=True
    ):
        table.add_row(label, before, after, f"{new / old:.1%}" if old else "-")
    console.print(table)
    console.print(f"dropped   layers {spell_layers(plan.dropped)} ({_why(plan)})")
    for other in plan.runners_up[:2]:
        console.print(f"          next best {other['block']} at {other['distance']:.4f}")
    error = "" if summary.logits_error is None else f" (largest relative error {summary.logits_error:.1e})"
    console.print(f"verified  {summary.verified}{error}")
    for warning in summary.warnings:
        console.print(f"warning   {warning}")
    console.print(f"written   {summary.out}" if summary.out else "written   nothing (dry run)")


def _why(plan: Plan) -> str:
    if plan.distance is not None and plan.metric not in (None, "angular_last_token"):
        return f"{plan.strategy}: {plan.metric} {plan.distance:.4g}"
    if plan.distance is not None:
        return f"{plan.strategy}: angular distance {plan.distance:.4f} across the block"
    return plan.strategy if plan.strategy != "explicit" else "as named"


def print_analysis(analysis: Analysis, out: Path) -> None:
    """The heat map, the best block of each size by each metric, and where the rest lies."""
    console = _stdout()
    distances = analysis.distances()
    console.print(
        f"{analysis.source}: {analysis.depth} layers, {analysis.samples} sequences of {analysis.seq_len} tokens"
    )
    console.print()
    console.print("angular distance d(l, l+n), last token; @ closest, blank farthest within each n")
    for line in heat_lines(distances, width=max(20, min(console.width, 120) - 26)):
        console.print(line, markup=False)
    console.print()
    sizes = sorted({max(1, round(analysis.depth * k / 8)) for k in range(1, 5)})
    table = Table(title="closest block of n layers, its first layer", title_justify="left")
    table.add_column("metric")
    for n in sizes:
        table.add_column(f"n = {n}", justify="right")
    for name, found in analysis.metrics.items():
        row = []
        for n in sizes:
            values = [(v, -i) for i, v in enumerate(found.mean.get(n, ())) if not math.isnan(v)]
            row.append(f"{-min(values)[1]} ({min(values)[0]:.4f})" if values else "-")
        table.add_row(name, *row)
    console.print(table)
    if analysis.base_loss is not None:
        console.print(f"loss      {analysis.base_loss:.4f} nats a token with all layers")
    if analysis.greedy:
        order = ", ".join(f"{int(step['layer'])} ({step['loss']:.3f})" for step in analysis.greedy)
        console.print(f"greedy    {order}")
    console.print(f"written   {out} (analysis.json and figures)", markup=False)
    console.print(f"next      slicer plan {out} --drop 0.25", markup=False)


def heat_lines(distances: Distances, width: int) -> list[str]:
    """The heat map in characters: a line for each n, a column for each l, thinned or doubled to fit `width` columns.

    Each row is scaled within itself, by the root so that what is near the least can be told apart.
    """
    depth = distances.depth
    sizes = [n for n in distances.sizes if n < depth]
    step = max(1, math.ceil(len(sizes) / 24))
    thin = max(1, math.ceil(depth / width))
    wide = max(1, min(3, width // depth))
    across = -(-depth // thin) * wide
    lines = []
    for n in reversed(sizes[::step]):
        row = list(distances.block(n))
        known = [v for v in row if not math.isnan(v)]
        least, most = min(known), max(known)
        cells = ""
        for at in range(0, len(row), thin):
            value = min((v for v in row[at : at + thin] if not math.isnan(v)), default=most)
            shade = 0.0 if most == least else math.sqrt((value - least) / (most - least))
            cells += _SHADES[min(len(_SHADES) - 1, int(shade * len(_SHADES)))] * wide
        best = row.index(least)
        lines.append(f"n {n:>4} |{cells:<{across}}| {best}-{best + n - 1}  {least:.4f}")
    last = f"{depth - 1}"
    lines.append(f"       l = 0{last:>{max(len(last), across - 4)}}")
    return lines


def print_planned(planned: Planned, file: Path) -> None:
    """The chosen layers and why: the runners-up, their distance, and whether the best two can be told apart."""
    console = _stdout()
    plan = planned.plan
    left = plan.depth - len(plan.dropped)
    console.print(
        f"plan      drop {spell_layers(plan.dropped)} of {plan.depth} layers, {left} stay", markup=False
    )
    total = " (sum over blocks)" if planned.cuts and len(planned.cuts[0].blocks) > 1 else ""
    console.print(f"by        {planned.metric} {plan.distance:.4f}{total}")
    for other in plan.runners_up:
        more = other["distance"] - (plan.distance or 0.0)
        console.print(f"          next {other['block']} at {other['distance']:.4f} (+{more:.4f})")
    if planned.doubt is not None:
        doubt = planned.doubt
        settle = (
            f"about {doubt.samples:,} samples would tell"
            if doubt.samples is not None
            else "no number of samples would tell"
        )
        console.print(
            f"warning   the best two cannot be told apart on {planned.samples} samples: they differ by "
            f"{doubt.difference:.4f} with a standard error of {doubt.error:.4f}; {settle}"
        )
    console.print(f"written   {file}", markup=False)
    console.print(f"next      slicer convert {plan.source or 'SOURCE'} --plan {file}", markup=False)


def print_inspection(found: Inspection) -> None:
    """One fact a line."""
    console = _stdout()
    sizes = found.sizes
    low, high = min(sizes.layer_bytes), max(sizes.layer_bytes)
    a_layer = _size(low) + "B" if low == high else f"{_size(low)}B to {_size(high)}B"
    files = "1 file" if found.files == 1 else f"{found.files} files"
    facts = [
        ("checkpoint", str(found.path)),
        ("architecture", f"{', '.join(found.classes) or 'unnamed'} ({found.model_type})"),
        *((label, text) for label, _, text in _rows(sizes)),
        ("bytes a layer", a_layer),
        ("stored as", f"{', '.join(found.dtypes)} in {files}"),
    ]
    if found.plan is not None:
        plan = found.plan
        revision = f" at {plan.revision}" if plan.revision else ""
        facts += [
            ("sliced from", f"{plan.source}{revision}, {plan.depth} layers"),
            ("kept", spell_layers(plan.kept)),
            ("dropped", f"{spell_layers(plan.dropped)} ({_why(plan)})"),
        ]
    for label, text in facts:
        console.print(f"{label:<18}{text}")


def print_demo(shown: Shown) -> None:
    """The summary, and a line from each model."""
    print_summary(shown.summary)
    console = _stdout()
    console.print()
    console.print(f"prompt    {shown.prompt}", markup=False)
    console.print(f"original  {shown.original}", markup=False)
    console.print(f"sliced    {shown.sliced}", markup=False)


def print_serving(path: Path, notes: Sequence[str]) -> None:
    """What is about to be served, and what was chosen unasked; on stderr, like all that is not an answer."""
    if (path / "slicer" / "plan.json").is_file():
        plan = Plan.load(path)
        _ERR.print(
            f"serving   {path.name}: {len(plan.kept)} of the {plan.depth} layers of {plan.source}, "
            f"without {spell_layers(plan.dropped)} ({_why(plan)})",
            markup=False,
            soft_wrap=True,
        )
    else:
        _ERR.print(f"serving   {path.name}", markup=False, soft_wrap=True)
    for note in notes:
        _ERR.print(f"chosen    {note}", markup=False, soft_wrap=True)


def print_ready(base_url: str, model: str, has_key: bool) -> None:
    """The one line that scripts wait for, and how to ask."""
    console = _stdout()
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": 32})
    console.print(f"ready     {base_url} (model {model})", markup=False)
    console.print(
        f"try       curl {base_url}/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        markup=False,
    )
    console.file.flush()
