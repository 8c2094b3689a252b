"""Terminal output of what was written, inspected, served and benchmarked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slicer.cli.render.progress import STDERR, stdout, table
from slicer.plan.amounts import spell_layers, spell_seconds, spell_size
from slicer.plan.plan import METRIC, Plan, spell_dropped, spell_left
from slicer.plan.records import HealingRecord

if TYPE_CHECKING:
    from rich.table import Table

    from slicer.checkpoint.sizes import Inspection, Sizes
    from slicer.demo.show import Shown
    from slicer.jobs.output import Written


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
        ("FLOPs per token", sizes.flops_per_token, _size(sizes.flops_per_token).strip()),
        ("KV cache per token", sizes.kv_bytes_per_token, _size(sizes.kv_bytes_per_token) + "B"),
    ]


def report(done: Written | None, as_json: bool) -> None:
    """Print what a command wrote; nothing in all processes but the first, which get None."""
    if done is not None and as_json:
        click.echo(json.dumps(done.to_dict(), indent=2))
    elif done is not None:
        print_written(done)


def print_written(done: Written) -> None:
    """Print the sizes before and after, what was dropped, repaired and merged, the checks and the warnings."""
    console = stdout()
    plan = done.plan
    before = f"{plan.depth} to " if len(plan.kept) < plan.depth else ""
    title = f"{plan.source}: {before}{len(plan.kept)} layers{spell_left(plan)}"
    sizes = table(title, "", "before", "after", "left")
    for (label, old, was), (_, new, now) in zip(_rows(done.before), _rows(done.after), strict=True):
        sizes.add_row(label, was, now, f"{new / old:.1%}" if old else "-")
    lines = []
    if not plan.merged or done.before != done.after:  # a merge changes no size
        console.print(sizes)
        layers = "" if plan.below_layers else "layers "
        lines.append(("dropped", f"{layers}{_dropped(plan)} ({_why(plan)})"))
        lines += [("", f"next best {other.block} at {other.distance:.4f}") for other in plan.runners_up[:2]]
    record = plan.healing
    if record is not None and record.training is not None:
        kept = f"step {record.best_step} kept" if record.best_step else "nothing was better than the start"
        ends = {"early": ", stopped: no new best", "diverged": ", stopped: the loss was not finite"}
        lines.append(("trained", f"{record.steps} steps{ends.get(record.training.ended, '')}; {kept}"))
    if record is not None:
        lines.append(("healed", _healed(record)))
        if (record.kinds and any(kind.rises for kind in record.kinds)) or not (record.kinds or record.loss.falls):
            lines.append(("warning", "healing leads away from the source; use the checkpoint without it"))
    if plan.merged:
        merged = plan.merged[-1]
        left = f", {len(merged.left_out)} of dropped layers left out" if merged.left_out else ""
        lines.append(("merged", f"{len(merged.tensors)} matrices{left}"))
    if plan.form != "native":
        lines.append(("form", _FORMS[plan.form]))
    lines.append(("verified", f"{done.verified}{_errors(done)}"))
    if done.took is not None and done.forecast is not None and (done.took.is_long or done.forecast.is_long):
        took, forecast = spell_seconds(done.took.total), spell_seconds(done.forecast.total)
        lines.append(("took", f"{took} (forecast {forecast}), {spell_size(done.took.host_bytes)} of memory"))
    lines += [("warning", warning) for warning in done.warnings]
    lines.append(("written", str(done.out) if done.out else "nothing (dry run)"))
    for label, text in lines:
        console.print(f"{label:<10}{text}")
    if record is not None and record.kinds:
        console.print(_kinds(record))


def _kinds(record: HealingRecord) -> Table:
    """The distance from the source by kind of text."""
    shown = table(
        "Distance from the source, on text that took no part in healing",
        "kind", "n", "KL cut", "KL healed", "closed", "same next token", "perplexity: source, cut, healed",
    )  # fmt: skip
    for kind in record.kinds:
        shown.add_row(
            kind.kind + (" (fitted kind)" if kind.seen else ""), f"{kind.documents}", f"{kind.before:.3f}",
            f"{kind.after:.3f}", f"{kind.closed:.0%} ±{kind.closed_error:.0%}",
            f"{kind.agreement_before:.0%} to {kind.agreement_after:.0%}",
            f"{kind.perplexity_source:.3g}, {kind.perplexity_before:.3g}, {kind.perplexity_after:.3g}",
        )  # fmt: skip
    return shown


_FORMS = {
    "blockwise": "blockwise: loads in vLLM if slicer is installed, and in transformers after 'import slicer'",
    "zeroed": "zeroed: loads everywhere, but costs as much as the original",
}


def _healed(record: HealingRecord) -> str:
    loss = record.measured
    rank = f" of rank {record.rank}" if record.rank else ""
    if record.kinds:
        unseen = [kind for kind in record.kinds if not kind.seen]
        parts = [f"{kind.closed:.0%} on {kind.kind}" for kind in record.kinds if kind.seen]
        if unseen:
            least = min(unseen, key=lambda kind: kind.closed)
            mean = sum(kind.closed for kind in unseen) / len(unseen)
            parts.append(f"{mean:.0%} on kinds it never read (least: {least.closed:.0%} on {least.kind})")
        return f"{record.method}{rank}: of the distance from the source it closes {', '.join(parts)}"
    steps = [("", loss.before), (" to ", loss.solved), (" to ", loss.after)]
    words = "".join(f"{word}{value:.3f}" for word, value in steps if value is not None)
    source = "" if loss.source is None else f" (all layers: {loss.source:.3f})"
    return f"{record.method}{rank}: held-out loss {words} nats a token{source}"


def _errors(done: Written) -> str:
    if done.logits_error is None:
        return ""
    words = f"largest relative error {done.logits_error:.1e}"
    if done.rounding_error:
        words += f"; {done.rounding_error:.1e} from the adapter, by rounding the weights"
    return f" ({words})"


def _why(plan: Plan) -> str:
    if plan.distance is None:
        return plan.strategy if plan.strategy != "explicit" else "as named"
    if plan.metric not in (None, METRIC):
        return f"{plan.strategy}: {plan.metric} {plan.distance:.4g}"
    if plan.no_attention or plan.no_ffn:
        return f"{plan.strategy}: total angular distance {plan.distance:.4f}"
    return f"{plan.strategy}: angular distance {plan.distance:.4f} across the block"


def _dropped(plan: Plan) -> str:
    return spell_dropped(plan) if plan.below_layers else spell_layers(plan.dropped)


def print_inspection(found: Inspection) -> None:
    """Print one fact per line."""
    console = stdout()
    sizes = found.sizes
    low, high = min(sizes.layer_bytes), max(sizes.layer_bytes)
    a_layer = _size(low) + "B" if low == high else f"{_size(low)}B to {_size(high)}B"
    files = "1 file" if found.files == 1 else f"{found.files} files"
    facts = [
        ("checkpoint", str(found.path)),
        ("architecture", f"{', '.join(found.classes) or 'unnamed'} ({found.model_type})"),
        *((label, text) for label, _, text in _rows(sizes)),
        ("bytes per layer", a_layer),
        ("stored as", f"{', '.join(found.dtypes)} in {files}"),
    ]
    if found.plan is not None:
        plan = found.plan
        revision = f" at {plan.revision}" if plan.revision else ""
        facts += [
            ("sliced from", f"{plan.source}{revision}, {plan.depth} layers"),
            ("kept", spell_layers(plan.kept)),
            ("dropped", f"{_dropped(plan)} ({_why(plan)})"),
            ("healed", _healed(plan.healing) if plan.healing else "no"),
        ]
    for label, text in facts:
        console.print(f"{label:<20}{text}")


def print_demo(shown: Shown) -> None:
    """Print what was written and a line from each model."""
    print_written(shown.written)
    lines = (f"prompt    {shown.prompt}", f"original  {shown.original}", f"sliced    {shown.sliced}")
    stdout().print("", *lines, sep="\n")


def print_serving(path: Path, name: str, notes: Sequence[str]) -> None:
    """Print, on stderr, the model to be served and the default settings chosen for it."""
    what = name
    if (path / "slicer" / "plan.json").is_file():
        plan = Plan.load(path)
        layers = f"{len(plan.kept)} of the {plan.depth} layers of {plan.source}"
        what = f"{name}: {layers}, without {_dropped(plan)} ({_why(plan)})"
    for line in (f"serving   {what}", *(f"chosen    {note}" for note in notes)):
        STDERR.print(line, soft_wrap=True)


def print_ready(base_url: str, model: str, has_key: bool) -> None:
    """Print the ready line, which scripts wait for, and an example request."""
    console = stdout()
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": 32})
    console.print(f"ready     {base_url} (model {model})")
    console.print(f"try       curl {base_url}/completions -H 'Content-Type: application/json'{key} -d '{body}'")
    console.file.flush()


def print_tables(tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]) -> None:
    """Print (title, head, rows) tables; the first column is text, the others numbers."""
    console = stdout()
    for title, head, rows in tables:
        shown = table(title, *head)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
