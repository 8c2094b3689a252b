"""The parts of an analysis that measure sublayers, and Shapley values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slicer.checkpoint.reader import Checkpoint
from slicer.progress import Progress

if TYPE_CHECKING:
    from slicer.analyze import AnalyzeOptions


def questions_of(checkpoint: Checkpoint, options: AnalyzeOptions, walk: Any, progress: Progress) -> Any:
    """The questions of --against task:NAME; drawn before any measurement, so that errors show early."""
    if not options.against.startswith("task:"):
        return None
    from slicer.judge import questions

    progress.stage("Drawing questions")
    return questions.draw(
        options.against.removeprefix("task:"),
        options.questions,
        walk.model,
        checkpoint.path,
        data=options.data,
        seed=options.calibration.seed,
        trust_remote_code=options.trust_remote_code,
    )


def measure_parts(
    walk: Any,
    batches: list[Any],
    questions: Any,
    options: AnalyzeOptions,
    tables: dict[str, Any],
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(tables of sublayers, settings of the Shapley values); adds tables of whole layers to `tables`."""
    from slicer.measure import halves
    from slicer.measure.shapley import Coalitions, leave_one_out, shapley, table_of

    found: dict[str, Any] = {}
    samples, seq_len = sum(len(b) for b in batches), batches[0].shape[1]
    if options.sublayers:
        stacked = halves.record_halves(walk, batches, progress=progress)
        found |= halves.tables_of_halves(stacked, seq_len)
        for against in ("loss", "kl") if options.losses else ():
            coalitions = Coalitions(walk, batches, parts=True, against=against)
            found[against] = table_of(against, leave_one_out(coalitions, progress), seq_len, samples, 1)
    if not options.shapley:
        return found, None
    about: dict[str, Any] = {"against": options.against}
    if questions is None:
        coalitions = Coalitions(walk, batches, parts=options.sublayers, against=options.against)
    else:
        coalitions = Coalitions(walk, questions, parts=options.sublayers)
        count, score = len(questions.right), 1 - float(coalitions.base.mean())
        about |= {"questions": count, "score": score, "guessing": 1 - questions.guessing}
        progress.note(
            f"{options.against}: {score:.1%} of {count} questions right with all layers, chance is "
            f"{1 - questions.guessing:.1%}"
            + ("; not better than chance, so the Shapley values are noise" if coalitions.ceiling > 1 else "")
        )
    values = shapley(coalitions, options.shapley, seed=options.calibration.seed, progress=progress)
    name = "shapley" if questions is None else "shapley_score"
    target = found if options.sublayers else tables
    target[name] = table_of(name, values, seq_len, samples)
    pairs = len(values.samples)
    progress.note(
        f"Shapley values: {pairs} pair{'s' if pairs > 1 else ''} of orders, {values.passes:.0f} forward passes"
    )
    return found, {**about, "pairs": pairs, "passes": round(values.passes, 2)}
