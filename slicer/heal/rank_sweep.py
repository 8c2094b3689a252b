"""The rank of the adapters, picked as in appendix B.3 of the paper: begin with the largest; where healing with it is
significantly worse than none, train the others too, and keep the one with the best accuracy on MMLU.

The paper also found that a smaller rank, which overfits less, can score better although its loss on text is higher: so
the loss is not what to pick by, but it can be asked for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from slicer.checkpoint import hub
from slicer.checkpoint.export import check_output
from slicer.errors import EvaluationError, UsageError
from slicer.heal.job import Healed
from slicer.heal.trained import TrainOptions, train_cut
from slicer.measure.share import Share
from slicer.plan import Plan
from slicer.progress import Progress

LOSS = "loss"
Ask = Callable[[Path], tuple[float, float]]


@dataclass(frozen=True)
class RankSweep:
    """`ranks` to try, the largest first; `metric`: an lm-eval task, or "loss" on the held-out text; `data` and `limit`
    of that task, as in `slicer eval`."""

    ranks: tuple[int, ...]
    metric: str = "mmlu"
    data: Path | None = None
    limit: int | None = None


def parse_ranks(text: str) -> tuple[int, ...]:
    """`2,8,64`, the largest first. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--rank-sweep {text}: write ranks, comma-separated, such as 2,8,64")
    return tuple(sorted({int(part) for part in parts}, reverse=True))


def pick_rank(
    sliced: str,
    source: str | None,
    out: Path,
    options: TrainOptions,
    sweep: RankSweep,
    *,
    progress: Progress | None = None,
) -> Healed | None:
    """`train_cut` with one rank after another, until the paper's rule is met; the best becomes `out`.

    Each is trained and scored once, in `OUT.ranks`, so a run that was stopped goes on. Raises SlicerError children.
    """
    progress = progress or Progress()
    if options.training.method == "full":
        raise UsageError("--rank-sweep: a full training has no rank; use --method qlora or lora")
    check_output(out, hub.resolve(sliced).path, force=options.force)
    ask = _judge(sweep, options, progress)
    share = Share.of_environment()
    work = out.with_name(out.name + ".ranks")
    largest = sweep.ranks[0]
    for rank in sweep.ranks:
        place = work / f"rank-{rank}"
        if not (place / "config.json").is_file():
            progress.note(f"rank {rank}")
            given = replace(
                options, training=replace(options.training, rank=rank), save_adapter=None, force=True
            )
            done = train_cut(sliced, source, place, given, progress=progress)
            if done is not None:
                (work / f"rank-{rank}.json").write_text(
                    json.dumps([done.verified, done.logits_error, done.rounding_error]), "utf-8"
                )
        share.first(partial(_score, work, str(rank), place, ask))
        if rank == largest:
            share.first(partial(_score, work, "none", hub.resolve(sliced).path, ask, start_of=place))
            scores = share.first(partial(_scores, work))
            if sum(scores[str(rank)]) >= scores["none"][0]:  # within a standard error, or better
                break

    def keep() -> Healed:
        scores = _scores(work)
        ranks = {int(name): value for name, (value, _) in scores.items() if name != "none"}
        best = max(ranks, key=lambda rank: (ranks[rank], -rank))
        place = work / f"rank-{best}"
        verified, error, rounding = json.loads((work / f"rank-{best}.json").read_text("utf-8"))
        plan = Plan.load(place)
        told = {
            "metric": sweep.metric,
            "scores": {name: value for name, (value, _) in scores.items()},
            "picked": best,
        }
        plan = replace(plan, healing={**(plan.healing or {}), "rank_sweep": told})
        (place / "slicer" / "plan.json").write_text(plan.to_json(), "utf-8")
        check_output(out, hub.resolve(sliced).path, force=options.force)
        if out.is_dir():
            shutil.rmtree(out)
        place.rename(out)
        shutil.rmtree(work, ignore_errors=True)
        loss = (plan.healing or {})["loss"]
        helps = loss["healed"] is None or loss["healed"] < loss["before"]
        return Healed(out, plan, verified, error, helps, rounding)

    result = share.first(keep)
    return result if share.is_first else None


def _judge(sweep: RankSweep, options: TrainOptions, progress: Progress) -> Ask | None:
    """What gives (score, standard error) of a checkpoint, the higher the better; None for the loss, which training
    measures. Raises EvaluationError at once where the task or its data are missing."""
    if sweep.metric == LOSS:
        return None
    from slicer.judge.evaluate import EvalOptions, Suite, evaluate

    asked = EvalOptions(
        tasks=(sweep.metric,),
        data=sweep.data,
        limit=sweep.limit,
        share_limit=True,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    suite = Suite(asked, progress)

    def score(path: Path) -> tuple[float, float]:
        found = evaluate(str(path), suite).primary(sweep.metric)
        if found is None:
            raise EvaluationError(f"{sweep.metric}: gives no score; name another --rank-metric")
        sign = 1 if found.higher_is_better else -1
        return sign * found.value, found.standard_error or 0.0

    return score


def _score(work: Path, name: str, path: Path, ask: Ask | None, *, start_of: Path | None = None) -> None:
    """Enter the score of `path` under `name`; with `start_of` it is what that training started from."""
    scores = _scores(work)
    if name in scores:
        return
    if ask is not None:
        scores[name] = ask(path)
    else:
        record = Plan.load(start_of or path).healing or {}
        loss, best = record["loss"], str(record["best_step"])
        value = loss["before" if start_of else "healed"]
        scores[name] = -(record["held_out"]["0" if start_of else best] if value is None else value), 0.0
    (work / "scores.json").write_text(json.dumps(scores), "utf-8")


def _scores(work: Path) -> dict[str, tuple[float, float]]:
    """Name -> (score, standard error) of what was scored so far."""
    file = work / "scores.json"
    if not file.is_file():
        return {}
    return {name: (value, error) for name, (value, error) in json.loads(file.read_text("utf-8")).items()}
