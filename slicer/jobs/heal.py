"""`slicer heal`: repairs a cut on disk, in closed form or by training, and writes and verifies the result."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from slicer.checkpoint.cut import CutOnDisk, open_cut
from slicer.checkpoint.hub import Source
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes
from slicer.data.calibration import read_text
from slicer.errors import HealError
from slicer.heal.finetune.memory import to_finish
from slicer.heal.patch import NONE
from slicer.jobs.costs import Cut, Work, dropped_by, work_of, work_of_training
from slicer.jobs.forecast import Clock
from slicer.jobs.output import Result, Written, recorded, write_verified
from slicer.jobs.recipe import Recipe, settings_of, text_to_solve_on
from slicer.jobs.repair import repair
from slicer.jobs.request import ConvertRequest, HealRequest, Output
from slicer.jobs.work import working
from slicer.model.load import load_model
from slicer.model.verify import Expected, expected_logits
from slicer.model.walk import open_walk
from slicer.plan.plan import Plan
from slicer.plan.records import TextRecord
from slicer.progress import SILENT, Progress
from slicer.runtime.distributed import Processes
from slicer.runtime.files import write_atomically
from slicer.runtime.memory import released, within_memory
from slicer.runtime.workdir import beside, claimed, undamaged

if TYPE_CHECKING:
    from slicer.data.corpus import Corpus


def heal(request: HealRequest, progress: Progress = SILENT) -> Written | None:
    """Repair a cut that slicer made: solve the weights around it again, or train it.

    In a distributed run every process calls this; the first one writes, and the others return None. Nothing appears at
    the output directory unless everything succeeded; a training or a fold that stops or fails leaves its work
    directory beside it, from which the same request resumes. Raises SlicerError children; see `slicer.errors`.
    """
    progress = clock = Clock.over(progress)
    progress.stage("Opening the checkpoints")
    cut = open_cut(request.cut, request.source)  # the cut, its plan, its source: checked to belong together
    recipe = Recipe.of_heal(request, cut)
    assert request.output.out is not None  # or the recipe is refused
    clock.expect(expected_work(cut, recipe, request.output.out), recipe.compute)
    recipe.announce(progress)
    if recipe.settings is None:
        with working(recipe, cut.source, request.output) as directory:
            result, expected = folded(cut, recipe, directory, progress)
            return recorded(write_verified(result, expected, request.output, recipe.compute, progress), clock)
    from slicer.heal.finetune.trainer import resumable

    processes, place = Processes.of_environment(), beside(request.output.out)
    with claimed(
        place, processes, overwrite=request.output.overwrite, resumable=lambda: resumable(place), **recipe.marks(cut)
    ) as work, undamaged(place):  # fmt: skip
        result, expected = trained(cut, recipe, work.path, processes, progress)
        written = processes.first(lambda: _write_trained(result, expected, request, recipe, progress))
    return recorded(written, clock) if processes.is_first else None


def expected_work(cut: CutOnDisk, recipe: Recipe, out: Path) -> Work:
    """The work of a repair or a training of `cut` into `out`."""
    source, plan, settings, text = cut.source.checkpoint, cut.plan, recipe.settings, recipe.text
    if settings is None or text is None:
        return work_of(recipe, source, out, plan)
    start, healed = settings.asked.start, plan.healing is not None
    fold = Cut.of(plan) if start == "fold" and not healed and not plan.merged else None
    base = fold is not None or (start == "cut" and healed)
    return work_of_training(settings, text, recipe.compute, source, len(plan.kept), out, fold, base=base)


def expected_training(request: ConvertRequest, healing: HealRequest, source: Source, out: Path) -> Work:
    """The work of `convert` with the training `healing`, into `out`, beside choosing the cut."""
    assert healing.training is not None
    checkpoint, plan, strategy = source.checkpoint, request.plan, request.selection.strategy
    settings, _ = settings_of(healing.training, source.name, checkpoint, request.compute)
    n = len(plan.dropped) if plan is not None else dropped_by(request.goal, checkpoint, request.compute.dtype)
    fold = Cut.of(plan) if plan is not None else Cut.expected(request.goal, strategy, checkpoint.depth, n)
    folds = healing.training.start == "fold"
    text = text_to_solve_on(healing.text, checkpoint)
    return work_of_training(
        settings, text, request.compute, checkpoint, checkpoint.depth - n, out, fold if folds else None,
        base=folds, cut=True,
    )  # fmt: skip


def folded(
    cut: CutOnDisk, recipe: Recipe, directory: Path | None, progress: Progress
) -> tuple[Result, Expected | None]:
    """The cut with the weights around it solved again, and its expected logits; `directory` keeps finished stages.

    Written from the source by the plan of the cut, so an earlier repair is undone; companion files and figures are
    those of the cut.
    """
    source, plan = cut.source, replace(cut.plan, memory=recipe.memory)
    with open_walk(source.checkpoint, recipe.compute, loads=recipe.loads, directory=directory) as walk:
        text = read_text(recipe.text, source.path, walk, progress)
        patch = repair(source.checkpoint, walk, plan, text, recipe, progress)
        expected = expected_logits(walk, plan, patch.edits, recipe.verify, progress)
    if patch.record is not None:
        patch = replace(patch, record=replace(patch.record, command=recipe.command))
    trusted, origin = recipe.compute.trust_remote_code, cut.checkpoint.path
    return Result.of_cut(source, plan, patch, origin=origin, trust_remote_code=trusted), expected


def trained(
    cut: CutOnDisk, recipe: Recipe, work: Path, processes: Processes, progress: Progress
) -> tuple[Result, Expected | None]:
    """The trained cut, and its expected logits and loss; `work`: directory of this training, from which it resumes.

    Every process of a launch calls this; only in the first one are the two complete.
    """
    from slicer.data.corpus import prepare
    from slicer.heal.finetune.run import finetune

    spec, settings, compute = recipe.text, recipe.settings, recipe.compute
    assert spec is not None and settings is not None

    sampler = partial(load_model, cut.source.path, device=compute.device, trust_remote_code=compute.trust_remote_code)

    @released()
    def corpus_of() -> Corpus:
        with within_memory("sampling text from the source", ["--calibration DATA", "--device cpu"]):
            return prepare(
                spec, settings.size, cut.checkpoint, work / "corpus", progress,
                validation=settings.asked.validation, sampler=sampler, trust_remote_code=compute.trust_remote_code,
            )  # fmt: skip

    corpus = processes.first_then_all(corpus_of)
    base = processes.first_then_all(lambda: start(cut, recipe, corpus, work, progress))
    patch, expected, history = finetune(base, corpus, settings, compute, work, processes, progress, recipe.verify)
    if patch.record is not None:
        text = TextRecord(**{**asdict(spec), "source": corpus.record.source})
        record = replace(patch.record, text=text, solver=recipe.repair.solver, command=recipe.command)
        patch = replace(patch, record=record)
    before = measure_sizes(cut.source.checkpoint)
    return Result.of_base(base.checkpoint, base.plan, patch, history, before), expected


def start(cut: CutOnDisk, recipe: Recipe, corpus: Corpus, work: Path, progress: Progress) -> CutOnDisk:
    """The checkpoint that training starts from: the cut folded on the training text, or without an earlier repair,
    written into `work`; or the cut itself.

    Decided by the first run, and the same for all runs that resume it. Raises HealError for a bare start of a cut that
    was repaired and then had an adapter merged into it.
    """
    decided = work / "base.json"
    if not decided.is_file():
        write_atomically(decided, json.dumps(str(_start(cut, recipe, corpus, work / "base", progress))))
    base = Checkpoint.open(Path(json.loads(decided.read_text("utf-8"))))
    return CutOnDisk(base, Plan.load(base.path), cut.source)


def _start(cut: CutOnDisk, recipe: Recipe, corpus: Corpus, base: Path, progress: Progress) -> Path:
    """The directory of the weights to start from: `base`, written here, or that of the cut."""
    source, plan, compute = cut.source, cut.plan, recipe.compute
    assert recipe.settings is not None and recipe.text is not None
    asked, patch = recipe.settings.asked, NONE
    if asked.start == "cut" and plan.healing is not None:
        if plan.merged:
            raise HealError(
                f"{cut.checkpoint.path}: was healed and then an adapter was merged into it; the bare cut would lose "
                "the adapter: use --train-from fold, which starts from the weights as they are"
            )
    elif asked.start == "fold" and plan.healing is None and not plan.merged:
        text, unasked = corpus.to_fold_on(recipe.text), replace(recipe, asked=False)
        with (
            within_memory("in the fold", ["--train-from cut", "--device cpu"]),
            open_walk(source.checkpoint, compute, loads=recipe.loads, directory=base.parent) as walk,
        ):
            patch = repair(source.checkpoint, walk, plan, text, unasked, progress)
        if patch.record is None:
            progress.note("training starts from the bare cut")
            return cut.checkpoint.path
    else:
        return cut.checkpoint.path
    trusted = compute.trust_remote_code
    result = Result.of_cut(source, plan, patch, origin=cut.checkpoint.path, trust_remote_code=trusted)
    output = Output(base, overwrite=True, verify="load")
    write_verified(result, None, output, compute, progress)
    return base


def _write_trained(
    result: Result, expected: Expected | None, request: HealRequest, recipe: Recipe, progress: Progress
) -> Written:
    """Write the result; then the adapter, if the checkpoint is in place."""
    from slicer.heal.finetune.result import save_adapter

    assert recipe.settings is not None and result.history is not None
    with within_memory("verifying the result", to_finish(recipe.settings, recipe.verify)):
        written = write_verified(result, expected, request.output, recipe.compute, progress)
    if request.save_adapter is not None and written.out is not None:
        base = Checkpoint.open(result.contents.origin)
        save_adapter(request.save_adapter, result.history.weights, base, written.out, progress)
    return written
