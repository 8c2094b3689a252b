"""Picks the adapter rank as in appendix B.3 of the paper: train the largest rank first; if it is significantly worse
than no healing, train the others too, and keep the one with the best MMLU accuracy.

The paper found that a smaller rank, which overfits less, can score better with a higher loss on text. So the loss is
not the default criterion, but it can be selected.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from slicer.checkpoint.cut import CutOnDisk, open_cut
from slicer.checkpoint.export import check_output
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes
from slicer.errors import Diverged, EvaluationError, HealError, UsageError
from slicer.evaluate.suite import Suite, SuiteSpec, evaluate
from slicer.jobs.heal import heal
from slicer.jobs.output import Written
from slicer.jobs.recipe import Recipe
from slicer.jobs.request import HealRequest
from slicer.model.verify import check_load
from slicer.plan.plan import Plan
from slicer.plan.records import RankRecord
from slicer.progress import Progress
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import Processes
from slicer.runtime.files import write_atomically
from slicer.runtime.workdir import Notebook, beside, claimed

LOSS = "loss"  # the metric that needs no task
NONE = "none"  # the name under which the cut is scored as it is before training
Score = tuple[float, float]  # value, higher is better, and its standard error
Scorer = Callable[[Path, float | None], Score]  # of a checkpoint, and its loss on held-out text


@dataclass(frozen=True)
class RankSearch:
    """Which rank to pick, and by what.

    Attributes:
        ranks: to try, the largest first.
        metric: an lm-eval task, or "loss" on the held-out text.
        data: local files of that task, limit: its number of items, as in `slicer eval`.
    """

    ranks: tuple[int, ...]
    metric: str = "mmlu"
    data: Path | None = None
    limit: int | None = None


def heal_with_best_rank(request: HealRequest, search: RankSearch, progress: Progress | None = None) -> Written | None:
    """Run `jobs.heal` for one rank after another, until the paper's rule is met; the best one becomes the output.

    Each rank is trained and scored once, in `OUT.ranks`, so a stopped search can resume. A rank whose training diverges
    scores below all others. In a distributed run every process calls this, and those that are not the first get None.
    Raises SlicerError children: OutputError if `OUT.ranks` holds another search, HealError if every rank diverges.
    """
    progress, output = progress or Progress(), request.output
    if request.training is None or request.training.method == "full":
        raise UsageError("--rank-sweep: only adapters have a rank; use --method qlora or lora")
    if request.save_adapter is not None:
        raise UsageError("--save-adapter: not possible with --rank-sweep; heal again with the rank that it picks")
    cut = open_cut(request.cut, request.source)
    recipe = Recipe.of_heal(request, cut)
    assert output.out is not None  # or the recipe is refused
    scorer = _scorer(search, request.compute, progress)
    processes, work = Processes.of_environment(), beside(output.out, "ranks")

    def resumable() -> bool:
        return any(work.glob("rank-*/config.json")) or any(work.glob("rank-*.training"))

    with claimed(
        work, processes, what="an unfinished rank sweep", overwrite=output.overwrite, resumable=resumable,
        **recipe.marks(cut), search=asdict(search), verify=output.verify, shard=output.max_shard_bytes,
    ):  # fmt: skip
        for rank in search.ranks:
            if not _train(request, rank, work, processes, progress):
                continue
            scores = processes.first(partial(_score, rank, cut.checkpoint.path, work, scorer))
            if rank == search.ranks[0] and sum(scores[str(rank)]) >= scores[NONE][0]:
                break  # the largest is within a standard error of none, or better
        written = processes.first(lambda: _pick(cut, request, search.metric, work))
    return written if processes.is_first else None


def _train(request: HealRequest, rank: int, work: Path, processes: Processes, progress: Progress) -> bool:
    """Train this rank unless that is done; returns whether there is a result, in `work/rank-N`."""
    assert request.training is not None
    place = work / f"rank-{rank}"
    there, scored = processes.first(lambda: ((place / "config.json").is_file(), str(rank) in _scores(work).values))
    if there or scored:
        return there
    progress.note(f"rank {rank}")
    training, output = replace(request.training, lora_r=rank), replace(request.output, out=place, overwrite=True)
    try:
        done = heal(replace(request, training=training, output=output), progress)
    except Diverged as error:
        progress.note(f"rank {rank}: {error}")
        processes.first(lambda: _scores(work).take(str(rank), lambda: (-math.inf, 0.0)))
        return False
    if done is not None:
        checked = [done.verified, done.logits_error, done.rounding_error]
        write_atomically(place.with_suffix(".json"), json.dumps(checked))
    return True


def _pick(cut: CutOnDisk, request: HealRequest, metric: str, work: Path) -> Written:
    """Make the best rank the result. Raises HealError if there is none."""
    output, scores = request.output, {name: value for name, (value, _) in _scores(work).values.items()}
    ranks = {int(name): value for name, value in scores.items() if name != NONE}
    best = max(ranks, key=lambda rank: (ranks[rank], -rank))
    if ranks[best] == -math.inf:
        raise HealError(
            f"the loss is not finite with any rank ({', '.join(map(str, ranks))}): lower --learning-rate, or use "
            "--compute float32"
        )
    place, out = work / f"rank-{best}", output.out
    checked = _checked(place, output.verify, request.compute)
    plan = Plan.load(place)
    assert out is not None and plan.healing is not None and plan.healing.training is not None
    found = {name: value if math.isfinite(value) else None for name, value in scores.items()}
    training = replace(plan.healing.training, rank_sweep=RankRecord(metric, best, found))
    plan = replace(plan, healing=replace(plan.healing, training=training))
    write_atomically(place / "slicer" / "plan.json", plan.to_json())
    check_output(out, cut.checkpoint.path, overwrite=output.overwrite)
    if out.is_dir():
        shutil.rmtree(out)
    place.rename(out)
    return Written(out, plan, measure_sizes(cut.source.checkpoint), measure_sizes(Checkpoint.open(out)), *checked)


def _checked(place: Path, verify: str, compute: Compute) -> tuple[str, float | None, float | None]:
    """How the result at `place` was verified; checks its keys if a run stopped before recording that."""
    file = place.with_suffix(".json")
    if file.is_file():
        verified, error, rounding = json.loads(file.read_text("utf-8"))
        return verified, error, rounding
    if verify == "none":
        return "none", None, None
    check_load(place, trust_remote_code=compute.trust_remote_code)
    return "load", None, None


def _scorer(search: RankSearch, compute: Compute, progress: Progress) -> Scorer:
    """The function that scores a checkpoint. Raises EvaluationError early if the task or its data is missing."""
    if search.metric == LOSS:
        return lambda path, loss: (-math.inf if loss is None else -loss, 0.0)
    spec = SuiteSpec((search.metric,), data=search.data, limit=search.limit, share_limit=True)
    spec = replace(spec, device=compute.device, trust_remote_code=compute.trust_remote_code)
    suite = Suite(spec, progress)

    def score(path: Path, loss: float | None) -> Score:
        found = evaluate(str(path), suite).primary(search.metric)
        if found is None:
            raise EvaluationError(f"{search.metric}: gives no score; choose another --rank-metric")
        sign = 1 if found.higher_is_better else -1
        return sign * found.value, found.standard_error or 0.0

    return score


def _score(rank: int, cut: Path, work: Path, scorer: Scorer) -> dict[str, Score]:
    """Score this rank, and the cut before training, unless that is done; returns all scores so far."""
    place, scores = work / f"rank-{rank}", _scores(work)
    healing = Plan.load(place).healing
    assert healing is not None
    for name, path, loss in ((str(rank), place, healing.measured.after), (NONE, cut, healing.measured.before)):
        scores.take(name, partial(scorer, path, loss))
    return scores.values


def _scores(work: Path) -> Notebook:
    """Name -> (score, standard error) so far; -inf for a diverged training."""
    return Notebook(work / "scores.json")
