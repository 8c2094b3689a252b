"""Builds the distillation loss: loads the teacher alongside the student, or caches its outputs first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slicer.checkpoint import hub
from slicer.checkpoint.architectures import text_config
from slicer.checkpoint.model import load_model
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import HealError
from slicer.heal.adapters import nf4, require, unpack
from slicer.heal.corpus import Corpus
from slicer.heal.settings import Settings
from slicer.heal.teacher import Cached, Lessons, Live, ask_beforehand, cuts
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime.distributed import Processes
from slicer.runtime.memory import within_memory

if TYPE_CHECKING:
    from slicer.heal.trained import TrainOptions


def lessons_of(
    whole: Checkpoint,
    plan: Plan,
    corpus: Corpus,
    settings: Settings,
    options: TrainOptions,
    processes: Processes,
    device: str,
    progress: Progress,
) -> Lessons:
    """The distillation loss. Raises HealError for a teacher of another depth, width or vocabulary."""
    training, remote = options.training, options.trust_remote_code
    teacher = whole if training.teacher is None else Checkpoint.open(hub.resolve(training.teacher).path)
    streams, logits = settings.mismatch_weight > 0, settings.kl_weight > 0
    mine, its = text_config(whole.config), text_config(teacher.config)
    if streams and (teacher.depth != plan.depth or mine.get("hidden_size") != its.get("hidden_size")):
        raise HealError(
            f"{teacher.path}: depth or width differs from the model that was cut, so the residual streams cannot be "
            "compared; use only --kl-weight, or the source as teacher"
        )
    if logits and mine.get("vocab_size") != its.get("vocab_size"):
        raise HealError(
            f"{teacher.path}: the vocabulary differs from the model that was cut; use the source as teacher"
        )
    at = cuts(plan.dropped)
    if training.teacher_cache is not None:
        directory = Path(training.teacher_cache)

        def asked() -> Cached:
            with within_memory("caching the teacher's outputs", ["--device cpu"]):
                return ask_beforehand(
                    teacher, corpus.train, at, directory, streams=streams, logits=logits,
                    dtype=plan.dtype, device=options.device, trust_remote_code=remote, progress=progress,
                )  # fmt: skip

        answers: Cached | Live = processes.first_then_all(asked)
    else:
        if training.teacher_4bit:
            require("qlora")
        progress.stage("Loading the teacher")
        ways = [*([] if training.teacher_4bit else ["--teacher-4bit"]), "--teacher-cache DIR"]
        with within_memory("loading the teacher", ways):
            model = load_model(
                teacher.path,
                dtype=settings.compute,
                device=device,
                trust_remote_code=remote,
                quantization=nf4(getattr(torch, settings.compute)) if training.teacher_4bit else None,
            )
        unpack(model)
        answers = Live(model, at, streams=streams, logits=logits)
    return Lessons(answers, at, settings.mismatch_weight, settings.kl_weight)
