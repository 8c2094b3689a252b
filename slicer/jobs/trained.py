"""A conversion whose cut is healed by training: the bare cut beside the output, then training from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from slicer.checkpoint import hub
from slicer.checkpoint.export import check_output
from slicer.checkpoint.reader import Checkpoint
from slicer.heal.finetune.settings import Training
from slicer.jobs.options import Options, Summary, output_name
from slicer.plan.amounts import Goal
from slicer.plan.plan import Plan
from slicer.progress import Progress

_OF_CUT = ("strategy", "dtype")
_OF_TRAINING = (
    "calibration", "fold", "save_adapter", "verify", "device", "max_shard_bytes", "force", "trust_remote_code",
    "command",
)  # fmt: skip
Convert = Callable[..., Summary]


def convert_and_train(
    convert: Convert,
    source: str,
    goal: Goal | None,
    out: Path | None,
    options: Options,
    plan: Plan | None,
    progress: Progress,
) -> Summary:
    """As `slicer.jobs.convert.convert`, which is given as `convert`, where `options.heal` is a way to train.

    The bare cut is kept in OUT.cut until the training that starts from it is done, so that the same command goes on
    where it was stopped. Raises HealError for a cut that leaves layers without a part, which training does not take.
    """
    from slicer.heal.finetune.model import require
    from slicer.heal.finetune.result import check_keeping
    from slicer.heal.finetune.run import TrainOptions, check_trainable, train_cut
    from slicer.runtime.distributed import Processes
    from slicer.runtime.workdir import SIGN, beside, check_owner, claimed

    training = replace(
        options.training or Training(), method=str(options.heal), seed=options.calibration.seed
    )
    training.check()
    require(training.method)
    check_trainable(
        source,
        below_layers=bool(goal and goal.sublayers)
        or options.offset == "half"
        or bool(plan and not plan.complete),
    )
    checkpoint = Checkpoint.open(hub.resolve(source).path)
    # Only blocks of whole layers: a bare conversion would take a half-offset one where it is closer.
    bare = replace(options, heal="none", offset="whole", command=None)
    if out is None:
        if goal is not None and goal.budget:  # the plan tells how many layers are left
            plan = convert(source, goal, None, replace(bare, dry_run=True), progress=progress).plan
            goal = None
        gone = (
            len(plan.dropped) if plan is not None else goal.count(checkpoint.depth) if goal is not None else 0
        )
        left = checkpoint.depth - gone
        out = Path(output_name(source, f"{left}L"))
    check_output(out, checkpoint.path, force=options.force)
    check_keeping(options.save_adapter, training.method, out, [checkpoint.path], force=options.force)
    processes = Processes.of_environment()

    def cut(place: Path) -> Summary:
        if not place.is_dir():
            quickly = replace(bare, force=True, verify="load")
            convert(source, goal, place, quickly, plan=plan, progress=progress)
        again = replace(bare, dry_run=True)
        return convert(source, None, None, again, plan=Plan.load(place), progress=progress)

    later = [beside(out, kind) for kind in ("training", "ranks")]

    def resumable() -> bool:
        return any((place / SIGN).is_file() for place in later)

    given = TrainOptions(training=training, **{k: getattr(options, k) for k in _OF_TRAINING})
    for place in later:  # before the cut is written, which may take long
        check_owner(place)
    with claimed(
        beside(out, "cut"), processes, what="the cut of an unfinished training",
        overwrite=options.force, resumable=resumable, checkpoint=checkpoint.identity,
        text=options.calibration.identity, goal=str(goal), plan=plan and plan.to_json(),
        **{k: getattr(options, k) for k in _OF_CUT},
    ) as work:  # fmt: skip
        path = work.path / "cut"
        summary = processes.first(lambda: cut(path))
        if options.rank_sweep is None:
            done = train_cut(str(path), source, out, given, progress=progress)
        else:
            from slicer.sweep.ranks import heal_with_best_rank

            done = heal_with_best_rank(str(path), source, out, given, options.rank_sweep, progress=progress)
    processes.leave()
    if done is None:  # not the first of several processes
        return replace(summary, out=out)
    return replace(
        summary,
        out=out,
        plan=done.plan,
        verified=done.verified,
        logits_error=done.logits_error,
        rounding_error=done.rounding_error,
    )
