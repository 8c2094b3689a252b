"""`slicer heal --method qlora|lora|full`: trains a sliced checkpoint, then merges, verifies and writes it.

    OUT.training/corpus    the packed text
    OUT.training/base      the checkpoint that training starts from, unless it is the sliced one
    OUT.training/run, best see `slicer.heal.finetune.trainer`

The same command resumes a stopped run from this directory, which is deleted when OUT is complete.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint import hub
from slicer.checkpoint.architectures.table import text_config
from slicer.checkpoint.cut import as_before, source_of
from slicer.checkpoint.export import copy_unchanged
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES
from slicer.data.corpus import Corpus, prepare
from slicer.data.sources import TextSpec
from slicer.errors import ArchitectureError, CalibrationError, HealError, OutOfMemory, UsageError
from slicer.heal.finetune import model as adapters
from slicer.heal.finetune.memory import to_finish, to_load
from slicer.heal.finetune.result import Result, check_keeping, keeping, write
from slicer.heal.finetune.settings import Training, TrainingSettings, resolve
from slicer.jobs.heal import Healed, HealOptions, heal
from slicer.model.load import load_model
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord, Losses, TextRecord, TrainingRecord
from slicer.progress import Progress
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import Processes
from slicer.runtime.files import write_atomically
from slicer.runtime.memory import fits, within_memory
from slicer.runtime.workdir import beside, claimed


@dataclass(frozen=True)
class TrainOptions:
    """Options of healing by training; the training's own values are in `training`.

    Attributes:
        calibration: the text to train on, and to fold on if training starts from a fold.
        fold: the solver of that fold.
        save_adapter: directory to save the adapter to (`slicer.heal.finetune.result`).
    """

    training: Training = field(default_factory=Training)
    calibration: TextSpec = field(default_factory=TextSpec)
    fold: str = "resolve"
    save_adapter: Path | None = None
    verify: str = "auto"
    device: str = "auto"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    force: bool = False
    trust_remote_code: bool = False
    command: str | None = None


def train_cut(
    sliced: str,
    source: str | None,
    out: Path,
    options: TrainOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Healed | None:
    """Heal `sliced`, made by slicer from `source` (None: the one in its plan), by training, into the directory `out`.

    In a distributed run every process calls this; only rank 0 writes, and the others return None. `out` appears only if
    everything succeeds. Raises SlicerError children.
    """
    options, progress = options or TrainOptions(), progress or Progress()
    training = options.training
    training.check()
    adapters.require(training.method)
    if training.validation == "self" or (training.validation and options.calibration.source == "self"):
        raise UsageError(
            "--validation: pass a file or data set, and do not combine it with --calibration self"
        )
    processes = Processes.of_environment()
    progress.stage("Opening the checkpoints")
    cut = Checkpoint.open(hub.resolve(sliced).path)
    plan = Plan.load(cut.path)
    check_trainable(sliced, below_layers=not plan.complete)
    whole = source_of(cut, plan, sliced, source, out, force=options.force)
    check_keeping(options.save_adapter, training.method, out, (cut.path, whole.path), force=options.force)
    origin = str(source or plan.source)
    settings, words = resolve(
        training,
        plan.source or origin,
        whole.parameters,
        most_tokens=adapters.most_tokens(whole.config),
        on_gpu=Compute(options.device).torch_device().type == "cuda",
        processes=processes.world,
    )
    for word in words if processes.is_first else ():
        progress.note(word)
    place = beside(out)

    def resumable() -> bool:
        return (place / "course.json").is_file() or any(place.glob("run/checkpoint-*/whole"))

    with claimed(
        place, processes, overwrite=options.force, resumable=resumable,
        cut=cut.identity, text=options.calibration.identity, training=training.lasting(), fold=options.fold,
        source=origin,
    ) as work:  # fmt: skip
        return _train_cut(cut, whole, plan, out, work.path, settings, options, processes, progress)


def check_trainable(name: str, *, below_layers: bool) -> None:
    """Raise HealError for a cut in which layers lack a sublayer or have a replacement of one."""
    if below_layers:
        raise HealError(
            f"{name}: training does not support layers without attention or feed-forward; use convert --heal fold or "
            "--emulate"
        )


def _train_cut(
    cut: Checkpoint,
    whole: Checkpoint,
    plan: Plan,
    out: Path,
    work: Path,
    settings: TrainingSettings,
    options: TrainOptions,
    processes: Processes,
    progress: Progress,
) -> Healed | None:
    from slicer.heal.finetune.trainer import held_out_loss, train

    started = time.monotonic()
    training, remote = options.training, options.trust_remote_code
    spec = replace(options.calibration, seed=settings.seed)

    def corpus_of() -> Corpus:
        def sampler() -> Any:
            return load_model(whole.path, device=options.device, trust_remote_code=remote)

        with within_memory("sampling text from the source", ["--calibration DATA", "--device cpu"]):
            return prepare(
                spec, settings, training.validation, cut.path, work / "corpus",
                sampler=sampler, trust_remote_code=remote, progress=progress,
            )  # fmt: skip

    corpus = processes.first_then_all(corpus_of)
    _check_corpus(corpus, cut, settings, progress if processes.is_first else Progress())
    base = Checkpoint.open(processes.first(lambda: _base(cut, whole, plan, work, corpus, options, progress)))
    before = Plan.load(base.path)
    device = Compute(options.device).pinned().device
    lessons = None
    if training.taught:
        from slicer.heal.finetune.distillation import distillation_loss

        lessons = distillation_loss(whole, plan, corpus, settings, options, processes, device, progress)
    progress.stage("Loading the model to train")
    beside = lessons is not None and lessons.beside
    with within_memory("loading the model to train", to_load(settings, taught=beside)):
        model = adapters.load(base.path, settings, device=device, trust_remote_code=remote)
    course = train(
        model, corpus, settings, work, lessons=lessons, report_to=training.report_to, progress=progress
    )
    del model, lessons
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # rank 0 now needs the memory of the others

    def finish() -> Healed:
        size = getattr(torch, settings.compute).itemsize

        def loss_of(path: Path) -> float | None:
            if not fits(size * Checkpoint.open(path).parameters, options.device):
                return None
            model = load_model(path, dtype=settings.compute, device=options.device, trust_remote_code=remote)
            return held_out_loss(model, corpus, settings.micro_batch)

        progress.stage("Measuring the loss before")
        result = Result(
            base=base,
            whole=whole,
            course=course,
            settings=settings,
            loss_of=loss_of,
            record=HealingRecord(
                settings.method,
                text=TextRecord(
                    corpus.record.source,
                    spec.samples,
                    spec.seq_len,
                    spec.batch_size,
                    spec.seed,
                    spec.column,
                ),
                loss=Losses(),
                solver=options.fold,
                training=TrainingRecord(
                    start=before.healing.method if before.healing else "cut",
                    asked=_asked(training),
                    settings=settings.to_dict(),
                    corpus=corpus.record,
                    processes=processes.world,
                ),
                earlier=before.healing,
                command=options.command,
            ),
            started=started,
        )
        with (
            within_memory("measuring or verifying the result", to_finish(settings, options.verify)),
            keeping(options.save_adapter, course.weights, base, out, force=options.force, progress=progress),
        ):
            return write(result, before, out, options, progress)

    done = processes.first(finish)
    return done if processes.is_first else None


def _check_corpus(corpus: Corpus, cut: Checkpoint, settings: TrainingSettings, progress: Progress) -> None:
    """Raise CalibrationError for tokens outside the vocabulary; report how often the text is repeated."""
    vocabulary = text_config(cut.config).get("vocab_size")
    largest = max(corpus.train.largest, corpus.held_out.largest)
    if vocabulary is not None and largest >= vocabulary:
        raise CalibrationError(
            f"{cut.path}: the tokenizer gives token {largest}, but the vocabulary has {vocabulary} tokens; use the "
            "tokenizer of this model"
        )
    times = settings.steps * settings.batch_size / len(corpus.train)
    if times > 1.5:
        progress.note(f"the text has {len(corpus.train)} training sequences: each is used {times:.0f} times")


def _asked(training: Training) -> dict[str, Any]:
    """The options that differ from the defaults."""
    default = Training()
    return {
        f.name: getattr(training, f.name)
        for f in fields(training)
        if getattr(training, f.name) != getattr(default, f.name)
    }


def _base(
    cut: Checkpoint,
    whole: Checkpoint,
    plan: Plan,
    work: Path,
    corpus: Corpus,
    options: TrainOptions,
    progress: Progress,
) -> Path:
    """The checkpoint that training starts from; created unless it is the sliced one."""
    base, chosen = work / "base", work / "base.json"
    if chosen.is_file():
        return Path(json.loads(chosen.read_text("utf-8")))
    path = cut.path
    if options.training.start == "cut" and plan.healing is not None:
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        copy_unchanged(cut, base, replaced=as_before(cut, whole), dtype=plan.dtype)
        (base / "slicer" / "plan.json").write_text(replace(plan, healing=None).to_json(), "utf-8")
        path = base
    elif options.training.start == "fold" and plan.healing is None:
        try:
            asked = HealOptions(
                fold=options.fold,
                verify="load",
                device=options.device,
                force=True,
                trust_remote_code=options.trust_remote_code,
            )
            with within_memory("in the fold", ["--train-from cut", "--device cpu"]):
                data = corpus.to_fold_on(options.calibration)
                folded = heal(str(cut.path), str(whole.path), base, asked, data=data, progress=progress)
            path = base if folded.helps else cut.path
            if not folded.helps:
                progress.note("training starts from the bare cut: the fold does not lower the loss")
        except OutOfMemory:
            raise
        except (HealError, ArchitectureError) as error:
            progress.note(f"training starts from the bare cut, which cannot be folded: {error}")
    write_atomically(chosen, json.dumps(str(path)))
    return path
