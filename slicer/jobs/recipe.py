"""The recipe of a command: repair, text, checks, device and memory, decided once from its request."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from slicer.checkpoint import sublayers
from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.cut import CutOnDisk
from slicer.checkpoint.export import check_output, output_name
from slicer.checkpoint.hub import Source
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes, widest_output
from slicer.checkpoint.tensors import DTYPES
from slicer.data.sources import TextSpec
from slicer.errors import ArchitectureError, HealError, PlanError, UsageError
from slicer.heal.compensate.fold import working_bytes
from slicer.heal.compensate.regression import TOGETHER
from slicer.heal.finetune.settings import Training, TrainingSettings, resolve
from slicer.jobs.request import Compensation, ConvertRequest, HealRequest, Selection, Text, check_choice
from slicer.plan.amounts import Goal, spell_size
from slicer.plan.plan import Plan
from slicer.plan.records import SOLVERS, MemoryRecord
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import Processes

# Tokens that a repair is solved on, at least, for each input of the widest matrix: about what a model of 4,864 inputs
# has by default. What more tokens gain was not measured at larger widths.
TOKENS_AN_INPUT = 3


@dataclass(frozen=True)
class Recipe:
    """All decisions of a command. Made by `Recipe.of` or `Recipe.of_heal`, and never changed afterwards.

    Attributes:
        goal, plan: how much to drop, or the replayed plan (for heal: the plan of the cut); one of the two is given.
        repair: weight compensation in closed form; its method is "none", "fold", "bias" or "linear".
        asked: False for an automatic fold: it may fail, and is left out if it does not help.
        unhealed: why there is no repair; None: there is one, or the request has "none".
        text: the text to measure, repair or train on; None: no text is read.
        halves: whether to measure between sublayers too: True (needed), False, or None (if possible).
        compute: device, precision of the result, and memory (for a training: as in the request).
        loads: whether the whole source fits in that memory; else its layers are read one at a time.
        verify: "none", "load" or "logits"; for a training also "auto": logits if they can be computed.
        writes: False for a dry run.
        training, settings: as in the request, and every value used; None: nothing is trained.
        notes: for the user, printed before the work.
    """

    goal: Goal | None
    plan: Plan | None
    selection: Selection
    repair: Compensation
    asked: bool
    text: TextSpec | None
    halves: bool | None
    compute: Compute
    loads: bool
    verify: str
    writes: bool = True
    training: Training | None = None
    settings: TrainingSettings | None = None
    unhealed: str | None = None
    notes: tuple[str, ...] = ()
    command: str | None = None

    @property
    def measures(self) -> bool:
        """Whether the source is measured to choose the cut."""
        return self.goal is not None and self.goal.measured(self.selection.strategy)

    @property
    def needs_model(self) -> bool:
        """Whether the source model is run: to measure, to repair, or for its logits."""
        return self.measures or (self.writes and (self.repair.method != "none" or self.verify == "logits"))

    @property
    def memory(self) -> MemoryRecord | None:
        """The memory budgets of the source model, for the plan; None if it is not run."""
        host, device = self.compute.memory, self.compute.device_memory
        return MemoryRecord(host, device, self.loads) if self.needs_model and host is not None else None

    @classmethod
    def of(cls, request: ConvertRequest, source: Source) -> Recipe:
        """The recipe of a conversion of `source`.

        Raises UsageError for options that contradict each other, PlanError for a goal out of reach or a plan of another
        model, ArchitectureError for a cut that cannot be written, OutputError for an output that may not be replaced.
        """
        checkpoint, output, compute = source.checkpoint, request.output, request.compute
        check_choice("--dtype", compute.dtype, tuple(DTYPES))
        check_device(compute)
        if output.out is not None and not output.dry_run:
            check_output(output.out, source.path, overwrite=output.overwrite)
        _check_goal(request, checkpoint)
        plan, notes = _replayed(request, checkpoint), []
        if not output.dry_run and (place := default_place(request, source)) is not None:
            check_output(place, source.path, overwrite=output.overwrite)
        if plan is not None and plan.merged:
            notes.append(
                "an adapter was merged into the checkpoint of this plan; to merge it into this one, use slicer merge"
            )
        measures = request.goal is not None and request.goal.measured(request.selection.strategy)
        repair, asked, why = _repair(request, plan, measures)
        text = _text(request, plan, repair, checkpoint, measures)
        runs = measures or (not output.dry_run and (repair.method != "none" or output.verify in ("auto", "logits")))
        loads = False
        if runs:
            compute, loads = with_budgets(checkpoint, compute, None if plan is None else plan.memory)
        recipe = cls(
            request.goal,
            plan,
            request.selection,
            repair,
            asked,
            text if measures or not output.dry_run else None,
            _halves(request, repair, checkpoint),
            compute,
            loads,
            _verify(output.verify, loads or text is not None) if not output.dry_run else "none",
            writes=not output.dry_run,
            unhealed=why,
            command=request.command,
        )
        if recipe.needs_model:
            check_memory(checkpoint, compute, loads, working=recipe.working_bytes(checkpoint))
        return replace(recipe, notes=(*notes, *_memory_notes(recipe, checkpoint, output.verify)))

    @classmethod
    def of_heal(cls, request: HealRequest, cut: CutOnDisk) -> Recipe:
        """The recipe of a repair or a training of a cut on disk.

        Raises UsageError for options that contradict each other, HealError for a cut that cannot be repaired this way,
        OutputError for an output that may not be replaced.
        """
        source, plan, output = cut.source.checkpoint, cut.plan, request.output
        if output.out is None:
            raise UsageError("--output-dir: give the directory of the healed checkpoint")
        check_device(request.compute)
        for path in (cut.checkpoint.path, cut.source.path):
            check_output(output.out, path, overwrite=output.overwrite)
        compute = replace(request.compute, dtype=plan.dtype)
        if request.training is None:
            compute, loads = with_budgets(source, compute)
        else:  # no budgets yet: the first process trains with its part of the memory, then measures with all of it
            loads = memory.fits(source.bytes_as(compute.dtype), compute)
        selection, text = Selection(form=plan.form), text_to_solve_on(request.text, source)
        verify = _verify(output.verify, loads or request.training is None)
        repair = replace(request.compensation, solver=request.compensation.solver or SOLVERS[0])
        recipe = cls(None, plan, selection, repair, True, text, False, compute, loads, verify, command=request.command)
        if request.training is not None:
            if not loads:
                check_memory(source, compute, loads)
            return _trained(recipe, request.training, request, cut)
        if request.compensation.method != "fold":
            raise UsageError(f"--method {request.compensation.method}: a cut on disk is healed by fold or by training")
        if plan.merged:
            raise HealError(
                f"{request.cut}: an adapter was merged into it, and a fold would be solved without the adapter; fold "
                "before merging, or train on: --method lora"
            )
        check_memory(source, compute, loads, working=recipe.working_bytes(source))
        return replace(recipe, notes=_memory_notes(recipe, source, output.verify))

    def working_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes that the repair takes beside the model of `checkpoint` and the hidden states."""
        if not self.writes or self.repair.method != "fold" or self.text is None:
            return 0
        layers = checkpoint.layers
        within = {id(span) for layer in layers for span in layer.values()}
        outside = (span for span in checkpoint.tensors.values() if len(span.shape) == 2 and id(span) not in within)
        embedding = max(outside, key=lambda span: span.numel)
        return working_bytes(
            max(sum(span.numel for span in layer.values()) for layer in layers),
            embedding.shape[1],
            widest_output(checkpoint),
            embedding.shape[0],
            casts=(DTYPES[self.compute.dtype] if self.compute.dtype else embedding.dtype) in ("BF16", "F16"),
            tokens=max(self.text.seq_len, min(TOGETHER, self.text.batch_size * self.text.seq_len)),
        )

    def announce(self, progress: Progress) -> None:
        """Show the notes and the first long stage."""
        for note in self.notes:
            progress.note(note)
        if self.needs_model:
            progress.stage("Loading the model" if self.loads else "Reading the modules outside the layers")

    def marks(self, cut: CutOnDisk) -> Mapping[str, object]:
        """JSON values that must be equal for a training to resume the work of another."""
        return {
            "cut": cut.checkpoint.identity,
            "text": self.text and self.text.identity,
            "training": self.training and self.training.identity,
            "fold": self.repair.solver,
            "source": cut.source.name,
        }


def with_budgets(
    checkpoint: Checkpoint, compute: Compute, recorded: MemoryRecord | None = None
) -> tuple[Compute, bool]:
    """(`compute` with its budgets as numbers, whether the whole `checkpoint` fits in them): as given, else `recorded`,
    else the defaults. Raises UsageError for an unavailable device, or for the memory of one that is not used."""
    check_device(compute)
    if recorded is not None:
        host, device = compute.memory or recorded.host, compute.device_memory or recorded.device
        compute = replace(compute, memory=host, device_memory=device)
    compute = memory.settled(compute)
    files = Counter[Path]()
    for span in checkpoint.tensors.values():
        files[span.file] += span.nbytes
    return compute, memory.fits(checkpoint.bytes_as(compute.dtype), compute, file=max(files.values()))


def check_device(compute: Compute) -> None:
    """Raise UsageError for an unavailable device, or for the memory of one that is not used; also where no model runs.

    Without such options torch is not imported.
    """
    if compute.device_memory is not None and compute.torch_device().type != "cuda":
        raise UsageError("--device-memory: the model runs on the CPU; give --memory")
    if compute.device not in ("auto", "cpu"):
        compute.torch_device()


def check_memory(checkpoint: Checkpoint, compute: Compute, loads: bool, working: int = 0) -> None:
    """Check the memory for what `with_budgets` decided, before work begins; `working`: bytes beside the model.

    Raises UsageError for a budget that does not hold one layer, OutOfMemory if too little is free.
    """
    whole = checkpoint.bytes_as(compute.dtype)
    loaded = measure_sizes(checkpoint, cast=DTYPES[compute.dtype] if compute.dtype else None).layer_bytes
    layer = max(*loaded, *measure_sizes(checkpoint).layer_bytes)
    on_device = layer + whole - sum(loaded)  # the modules outside the layers stay there
    streamed = working + (layer if compute.device_memory is None else on_device)
    instead = "--heal none" if working else None
    if loads:
        memory.check_free(max(memory.OVERHEAD * whole, whole + working), compute, streamed, instead)
        return
    budgets = ("--memory", compute.memory, layer), ("--device-memory", compute.device_memory, on_device)
    for option, budget, needed in budgets:
        if budget is not None and budget < needed:
            raise UsageError(
                f"{option} {spell_size(budget)}: too little for one layer of {checkpoint.path}; give at least "
                f"{spell_size(needed, up=True)}"
            )
    memory.check_free(streamed, compute, math.inf, instead)


def default_place(request: ConvertRequest, source: Source) -> Path | None:
    """The directory of a result that is given none, if its name is known before the layers are chosen; else None.
    Raises PlanError for a number of layers that the source does not have."""
    goal, depth = request.goal, source.checkpoint.depth
    if request.output.out is not None or (goal is not None and (goal.sublayers or goal.budget)):
        return None
    size = request.plan.size_name if request.plan is not None else f"{depth - goal.count(depth)}L" if goal else ""
    return Path(output_name(source.name, size))


def _check_goal(request: ConvertRequest, checkpoint: Checkpoint) -> None:
    """Raise PlanError or ArchitectureError, before anything is measured, for a goal that no cut reaches."""
    goal = request.goal
    if request.selection.offset == "half":
        sublayers.check_joinable(checkpoint)
    if goal is None:
        return
    goal.count(checkpoint.depth)
    if goal.budget:
        cast = DTYPES[request.compute.dtype] if request.compute.dtype else None
        whole = measure_sizes(checkpoint, cast=cast)
        if goal.met(whole.parameters, whole.total_bytes):
            raise PlanError(f"{goal}: the model already meets it with all {whole.depth} layers; nothing to drop")
        lightest = min(range(whole.depth), key=whole.layer_bytes.__getitem__)
        one = measure_sizes(checkpoint, (lightest,), cast)
        if not goal.met(one.parameters, one.total_bytes):
            raise PlanError(
                f"{goal}: out of reach; one layer alone still has {one.parameters} parameters and {one.total_bytes} "
                "bytes"
            )


def _replayed(request: ConvertRequest, checkpoint: Checkpoint) -> Plan | None:
    """The saved plan, in the form of the request. Raises PlanError or ArchitectureError if it does not fit."""
    plan = request.plan
    if plan is None:
        return None
    if plan.depth != checkpoint.depth:
        raise PlanError(
            f"the plan is for a model of {plan.depth} layers but {checkpoint.path} has {checkpoint.depth}; "
            "make a plan for this one with --dry-run"
        )
    if request.selection.form is not None:
        plan = plan.in_form(request.selection.form)
    sliced_config(checkpoint, plan, trust_remote_code=request.compute.trust_remote_code)
    return plan


def _repair(request: ConvertRequest, plan: Plan | None, measures: bool) -> tuple[Compensation, bool, str | None]:
    """(the repair, whether it was asked for, the reason if there is none without being asked for).

    The requested repair; else that of the replayed plan; else a fold, if text is named or measured anyway and every
    layer keeps both sublayers; else none.
    """
    given, none = request.compensation, Compensation("none")
    solver = given.solver or SOLVERS[0]
    if given.method not in (None, "auto"):
        return replace(given, solver=solver), True, None
    record = None if plan is None else plan.healing
    if given.method is None and record is not None:
        if record.training is None:
            solver = given.solver or record.solver or solver
            return Compensation(record.method, solver, record.rank, record.steps, record.adapt), True, None
        words = f"the plan was healed by training, which convert does not repeat: slicer heal --method {record.method}"
        return none, True, words
    goal = request.goal
    missing = bool(goal and goal.sublayers) or bool(plan and (plan.no_attention or plan.no_ffn))
    if missing and given.method is None:
        words = "attention or feed-forward of some layers is missing; --heal fold, bias or linear heals such a cut"
        return none, True, words
    if not measures and request.text.source is None:
        missed = "" if plan is None or given.method else "the plan has no healing, and "
        return none, True, f"{missed}there is no calibration text; --calibration DATA heals the cut"
    return Compensation("fold", solver, adapt=given.adapt), False, None


def text_to_solve_on(given: Text, checkpoint: Checkpoint) -> TextSpec:
    """The text of a repair in closed form: `given`, with more sequences by default where a matrix is wide."""
    spec = given.over(TextSpec())
    enough = -(-TOKENS_AN_INPUT * widest_output(checkpoint) // spec.seq_len)
    return spec if given.samples is not None else replace(spec, samples=max(spec.samples, enough))


def _text(
    request: ConvertRequest, plan: Plan | None, repair: Compensation, checkpoint: Checkpoint, measures: bool
) -> TextSpec | None:
    """The text to read: the given fields, over those that the replayed plan recorded.

    Raises UsageError if a replay reads no text, but options of the text are given.
    """
    recorded, solves = None, repair.method != "none"
    if plan is not None:
        recorded = plan.healing.text if plan.healing is not None else plan.calibration
    if measures or solves:
        if recorded is not None:
            return request.text.over(TextSpec.of_record(recorded))
        return text_to_solve_on(request.text, checkpoint) if solves else request.text.over(TextSpec())
    given = [name for name, value in asdict(request.text).items() if value is not None]
    if given and plan is not None and request.compensation.method != "none":
        option = {"source": "calibration", "column": "text-column"}.get(given[0], given[0].replace("_", "-"))
        raise UsageError(
            f"--{option}: this plan was not healed in closed form, so no text is read; also pass --calibration DATA or "
            "--heal fold"
        )
    return None


def _halves(request: ConvertRequest, repair: Compensation, checkpoint: Checkpoint) -> bool | None:
    """Whether to measure between sublayers too: True (needed), False, or None: if possible, for offset "auto"."""
    goal, offset = request.goal, request.selection.offset
    if offset == "half" or (goal is not None and goal.sublayers):
        return True
    folds = repair.method == "fold"
    if offset == "whole" or (folds and not (repair.solver == "resolve" and sublayers.adds_directly(checkpoint))):
        return False
    try:
        sublayers.check_joinable(checkpoint)
    except ArchitectureError:
        return False
    return None


def _verify(asked: str, runs: bool) -> str:
    """`asked`; for "auto": "logits" if the source is loaded or run anyway, else "load"."""
    return asked if asked != "auto" else "logits" if runs else "load"


def _memory_notes(recipe: Recipe, checkpoint: Checkpoint, verify: str) -> tuple[str, ...]:
    """Notes for a model that does not fit in memory."""
    notes = []
    if recipe.writes and verify == "auto" and recipe.verify == "load":
        notes.append("the model does not fit in memory: keys and shapes are checked, logits are not (--verify logits)")
    if recipe.needs_model and not recipe.loads:
        pickled = ", from pickled .bin files" if checkpoint.is_bin else ""
        notes.append(f"the model does not fit in memory: its layers are read from disk one at a time{pickled}")
    return tuple(notes)


def _trained(recipe: Recipe, training: Training, request: HealRequest, cut: CutOnDisk) -> Recipe:
    """`recipe` with the settings of a training."""
    from slicer.heal.finetune.model import require
    from slicer.heal.finetune.result import check_adapter_output

    require(training.method)
    output, sources = request.output, (cut.checkpoint.path, cut.source.path)
    if output.out is not None:
        check_adapter_output(request.save_adapter, training.method, output.out, sources, overwrite=output.overwrite)
    if training.validation == "self" or (training.validation and request.text.source == "self"):
        raise UsageError("--validation: pass a file or data set, and do not combine it with --calibration self")
    name = cut.plan.source or cut.source.name
    settings, words = settings_of(training, name, cut.source.checkpoint, request.compute)
    verify = output.verify
    if verify == "auto" and not memory.fits(4 * cut.checkpoint.parameters, request.compute):  # in float32
        verify = "load"
    if request.text.seed is None and recipe.text is not None:
        recipe = replace(recipe, text=replace(recipe.text, seed=training.seed))
    return replace(recipe, verify=verify, training=training, settings=settings, notes=tuple(words))


def settings_of(
    training: Training, name: str, source: Checkpoint, compute: Compute
) -> tuple[TrainingSettings, list[str]]:
    """(the settings of a training of a cut from `source`; notes about them). Raises UsageError."""
    from slicer.heal.finetune.model import most_tokens

    return resolve(
        training,
        name,
        source.parameters,
        most_tokens=most_tokens(source.config),
        on_gpu=compute.torch_device().type == "cuda",
        processes=Processes.of_environment().world,
    )
