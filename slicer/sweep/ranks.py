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

from slicer.checkpoint import hub
from slicer.checkpoint.export import check_output
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import Diverged, EvaluationError, HealError, UsageError
from slicer.heal.finetune.run import TrainOptions, train_cut
from slicer.jobs.heal import Healed
from slicer.model import verify
from slicer.plan.plan import Plan
from slicer.plan.records import RankRecord
from slicer.progress import Progress
from slicer.runtime.distributed import Processes
from slicer.runtime.files import write_atomically
from slicer.runtime.workdir import beside, claimed

LOSS = "loss"
Ask = Callable[[Path], tuple[float, float]]


@dataclass(frozen=True)
class RankSearch:
    """`ranks` to try, largest first; `metric`: an lm-eval task, or "loss" on the held-out text; `data` and `limit` of
    that task, as in `slicer eval`."""

    ranks: tuple[int, ...]
    metric: str = "mmlu"
    data: Path | None = None
    limit: int | None = None


def heal_with_best_rank(
    sliced: str,
    source: str | None,
    out: Path,
    options: TrainOptions,
    sweep: RankSearch,
    *,
    progress: Progress | None = None,
) -> Healed | None:
    """Run `train_cut` for one rank after another, until the paper's rule is met; the best one becomes `out`.

    Each rank is trained and scored once, in `OUT.ranks`, so a stopped run can resume. A rank whose training diverges
    scores below all others. Raises SlicerError children: OutputError if `OUT.ranks` holds another sweep, HealError if
    every rank diverges.
    """
    progress = progress or Progress()
    if options.training.method == "full":
        raise UsageError("--rank-sweep: --method full has no rank; use --method qlora or lora")
    if options.save_adapter is not None:
        raise UsageError(
            "--save-adapter: not possible with --rank-sweep; heal again with the rank that it picks"
        )
    options.training.check()
    cut = Checkpoint.open(hub.resolve(sliced).path)
    check_output(out, cut.path, force=options.force)
    ask = _judge(sweep, options, progress)
    processes, work = Processes.of_environment(), beside(out, "ranks")

    def trained(rank: int) -> bool:
        """Train this rank unless it is done; returns whether there is a result."""
        place = work / f"rank-{rank}"
        there, scored = processes.first(
            lambda: ((place / "config.json").is_file(), str(rank) in _scores(work))
        )
        if there or scored:
            return there
        progress.note(f"rank {rank}")
        given = replace(options, training=replace(options.training, rank=rank), save_adapter=None, force=True)
        try:
            done = train_cut(sliced, source, place, given, progress=progress)
        except Diverged as error:
            progress.note(f"rank {rank}: {error}")
            processes.first(partial(_enter, work, str(rank), (-math.inf, 0.0)))
            return False
        if done is not None:
            told = json.dumps([done.verified, done.logits_error, done.rounding_error])
            write_atomically(work / f"rank-{rank}.json", told)
        return True

    def resumable() -> bool:
        return any(work.glob("rank-*/config.json")) or any(work.glob("rank-*.training"))

    with claimed(
        work, processes, what="an unfinished rank sweep", overwrite=options.force, resumable=resumable,
        cut=cut.identity, text=options.calibration.identity, source=source, fold=options.fold,
        training=replace(options.training, rank=None).lasting(), sweep=asdict(sweep),
        verify=options.verify, shard=options.max_shard_bytes,
    ):  # fmt: skip
        for rank in sweep.ranks:
            if not trained(rank):
                continue
            place = work / f"rank-{rank}"
            processes.first(partial(_score, work, str(rank), place, ask))
            processes.first(partial(_score, work, "none", cut.path, ask, start_of=place))
            scores = processes.first(partial(_scores, work))
            if rank == sweep.ranks[0] and sum(scores[str(rank)]) >= scores["none"][0]:
                break  # the largest is within a standard error of none, or better
        result = processes.first(lambda: _keep(cut, out, work, options, sweep))
    return result if processes.is_first else None


def _keep(cut: Checkpoint, out: Path, work: Path, options: TrainOptions, sweep: RankSearch) -> Healed:
    """Make the best rank the result. Raises HealError if there is none."""
    scores = {name: value for name, (value, _) in _scores(work).items()}
    ranks = {int(name): value for name, value in scores.items() if name != "none"}
    best = max(ranks, key=lambda rank: (ranks[rank], -rank))
    if ranks[best] == -math.inf:
        raise HealError(
            f"the loss is not finite with any rank ({', '.join(map(str, sweep.ranks))}): lower --lr, or use --compute "
            "float32"
        )
    place = work / f"rank-{best}"
    verified, error, rounding = _checked(place, options)
    plan = Plan.load(place)
    healing = plan.healing
    assert healing is not None and healing.training is not None
    picked = RankRecord(
        sweep.metric, best, {name: value if math.isfinite(value) else None for name, value in scores.items()}
    )
    healing = replace(healing, training=replace(healing.training, rank_sweep=picked))
    plan = replace(plan, healing=healing)
    write_atomically(place / "slicer" / "plan.json", plan.to_json())
    check_output(out, cut.path, force=options.force)
    if out.is_dir():
        shutil.rmtree(out)
    place.rename(out)
    return Healed(out, plan, verified, error, healing.measured.falls, rounding)


def _checked(place: Path, options: TrainOptions) -> tuple[str, float | None, float | None]:
    """How the result at `place` was verified; checks its keys if a run stopped before recording that."""
    file = place.with_name(place.name + ".json")
    if file.is_file():
        verified, error, rounding = json.loads(file.read_text("utf-8"))
        return verified, error, rounding
    if options.verify == "none":
        return "none", None, None
    verify.check_load(place, trust_remote_code=options.trust_remote_code)
    return "load", None, None


def _judge(sweep: RankSearch, options: TrainOptions, progress: Progress) -> Ask | None:
    """The function path -> (score, standard error), higher is better; None for the loss, which training measures.
    Raises EvaluationError early if the task or its data is missing."""
    if sweep.metric == LOSS:
        return None
    from slicer.evaluate.suite import Suite, SuiteSpec, evaluate

    asked = SuiteSpec(
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
            raise EvaluationError(f"{sweep.metric}: gives no score; choose another --rank-metric")
        sign = 1 if found.higher_is_better else -1
        return sign * found.value, found.standard_error or 0.0

    return score


def _score(work: Path, name: str, path: Path, ask: Ask | None, *, start_of: Path | None = None) -> None:
    """Record the score of `path` under `name`; with `start_of`, that of the weights this training started from."""
    if name in _scores(work):
        return
    if ask is not None:
        _enter(work, name, ask(path))
        return
    record = Plan.load(start_of or path).healing
    assert record is not None
    loss = record.measured.before if start_of else record.measured.after
    _enter(work, name, (-math.inf if loss is None else -loss, 0.0))


def _enter(work: Path, name: str, score: tuple[float, float]) -> None:
    write_atomically(work / "scores.json", json.dumps({**_scores(work), name: score}))


def _scores(work: Path) -> dict[str, tuple[float, float]]:
    """Name -> (score, standard error) so far; -inf for a diverged training."""
    file = work / "scores.json"
    if not file.is_file():
        return {}
    return {name: (value, error) for name, (value, error) in json.loads(file.read_text("utf-8")).items()}
