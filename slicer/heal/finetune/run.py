"""Trains a cut and returns what changes in it. Writes to its work directory only, from which a stopped run resumes.

work/run, best-N, history.json   see `slicer.heal.finetune.trainer`
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from slicer.checkpoint.cut import CutOnDisk
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sublayers import names_of
from slicer.data.corpus import Corpus
from slicer.heal.finetune.callbacks import TrainingHistory
from slicer.heal.finetune.distillation import distillation_loss
from slicer.heal.finetune.memory import to_finish, to_load
from slicer.heal.finetune.model import load
from slicer.heal.finetune.result import result_of
from slicer.heal.finetune.settings import TrainingSettings
from slicer.heal.finetune.trainer import finished, train
from slicer.heal.patch import NONE, Patch
from slicer.model.load import load_model
from slicer.model.verify import Expected, text_loss
from slicer.plan.records import HealingRecord, Losses, TrainingRecord
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import Processes


def finetune(
    base: CutOnDisk,
    corpus: Corpus,
    settings: TrainingSettings,
    compute: Compute,
    work: Path,
    processes: Processes,
    progress: Progress,
    verify: str = "auto",
) -> tuple[Patch, Expected | None, TrainingHistory]:
    """Train `base`, a cut in the form that training starts from, on `corpus`, resuming what is in `work`.

    Returns what to change in the base (raw keys of the base), the logits and the held-out loss to check the result by
    (as far as `verify` asks for: "none", "load", "logits" or "auto"), and the history. Every process of a launch calls
    this; those that are not the first get `NONE`. Raises HealError if the model cannot be trained, Diverged if the loss
    is not finite, OutOfMemory.
    """
    started = time.monotonic()
    history = finished(work)
    if history is None:
        distillation = None
        if settings.asked.distils:
            distillation = distillation_loss(base, corpus, settings, compute, processes, progress)
        ways = to_load(settings, teacher=distillation is not None and distillation.alongside)
        progress.stage("Loading the model to train")
        with memory.within_memory("loading the model to train", ways):
            model = load(base.checkpoint, settings, compute)
        history = train(model, corpus, settings, work, progress, distillation=distillation)
        del model, distillation
        memory.release()  # the first process now needs the memory of the others
    found: list[tuple[Patch, Expected | None]] = []

    def result() -> None:
        with memory.within_memory("measuring the result", to_finish(settings, verify)):
            found.append(_result(base, corpus, settings, history, compute, verify, progress))

    processes.first(result)
    patch, expected = found[0] if found else (NONE, None)
    if patch.record is not None and patch.record.training is not None:
        seconds = round(time.monotonic() - started, 1)
        training = replace(patch.record.training, processes=processes.world, seconds=seconds)
        patch = replace(patch, record=replace(patch.record, training=training))
    return patch, expected, history


def _result(
    base: CutOnDisk,
    corpus: Corpus,
    settings: TrainingSettings,
    history: TrainingHistory,
    compute: Compute,
    verify: str,
    progress: Progress,
) -> tuple[Patch, Expected | None]:
    plan, source, asked = base.plan, base.source.checkpoint, settings.asked
    text = corpus.held_out_batches(settings.micro_batch)

    @memory.released()
    def loss(checkpoint: Checkpoint) -> float | None:
        """On the held-out text, nats a token; None if the model does not fit in memory."""
        if not memory.fits(getattr(torch, settings.compute).itemsize * checkpoint.parameters, compute):
            return None
        return text_loss(load_model(checkpoint.path, compute, dtype=settings.compute), text)

    progress.stage("Measuring the loss before")
    losses = Losses(loss(source), loss(base.checkpoint))
    replaced, expected = result_of(base.checkpoint, history.weights, settings, compute, verify, progress)
    if losses.before is not None:
        expected = replace(expected or Expected(None, None), text=text, text_dtype=settings.compute)
    sources = {new: old for old, new in names_of(source, plan).items()}
    earlier = plan.healing.tensors if plan.healing else ()
    tensors = tuple(sorted({*earlier, *(sources[key] for key in replaced)}))
    begun = plan.healing.method if plan.healing else "cut"
    held_out = {step: round(value, 6) for step, value in history.held_out.items()}
    training = TrainingRecord(begun, asked.chosen, settings.to_dict(), corpus.record, held_out, history.ended)
    record = HealingRecord(asked.method, None, losses, tensors, training=training, earlier=plan.healing)
    record = replace(record, steps=max(history.train, default=0), best_step=history.best)
    return Patch(replaced=replaced, record=record), expected
