"""Trains with transformers' Trainer on packed sequences: measures held-out loss, is resumable, keeps the best weights.

    work/run/checkpoint-N   weights, optimizer, random states; complete if it contains the file `COMPLETE`
    work/best-N             the weights of the best measurement, at step N
    work/history.json       the finished training's history

With the same seed, a stopped and resumed run has the same losses as an uninterrupted one: all randomness comes from
seeds and states in the checkpoints, and files are used only when complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from slicer.data.corpus import IGNORED, Corpus
from slicer.errors import Diverged, HealError, reason_of
from slicer.heal.finetune import model as adapters
from slicer.heal.finetune.callbacks import COMPLETE, NO_GRADIENT, TrainingCallback, TrainingHistory
from slicer.heal.finetune.distillation import DistillationLoss
from slicer.heal.finetune.memory import to_train
from slicer.heal.finetune.settings import TrainingSettings
from slicer.model.load import Model
from slicer.model.verify import cross_entropy
from slicer.progress import SILENT, Progress
from slicer.runtime.distributed import first_process, sharded, world
from slicer.runtime.files import write_atomically
from slicer.runtime.memory import within_memory

HISTORY = "history.json"
_KEPT = 2  # number of checkpoints


def train(
    model: Model,
    corpus: Corpus,
    settings: TrainingSettings,
    work: Path,
    progress: Progress = SILENT,
    *,
    distillation: DistillationLoss | None = None,
) -> TrainingHistory:
    """Train `model` (from `slicer.heal.finetune.model.load`) on the corpus, from the last complete checkpoint in
    `work`, if any.

    Raises HealError if no gradient reaches the trained weights; Diverged if the loss becomes non-finite before it
    improved; OutOfMemory, with the options that need less memory.
    """
    logging.set_verbosity_error()
    last = _last_complete(work / "run")
    device = next(model.parameters()).device
    history = TrainingHistory()
    callback = TrainingCallback(history, settings.asked.patience, work, progress)
    # Only complete steps: the sequences left out then do not depend on the micro-batch size.
    batch = settings.asked.batch_size
    complete = range(len(corpus.train) // batch * batch)
    ways = to_train(settings, teacher=distillation is not None and distillation.alongside)
    with _deterministic(settings.asked.seed), _on(device), within_memory("in training", ways):
        try:
            trainer = _Trainer(
                model=model,
                args=_arguments(settings, work / "run", device, resumed=last is not None),
                train_dataset=torch.utils.data.Subset(corpus.train, complete),
                eval_dataset=corpus.held_out,
                data_collator=torch.utils.data.default_collate,
                callbacks=[callback],
            )
        except (ImportError, RuntimeError, ValueError) as error:
            if settings.asked.report_to == "none":
                raise
            raise HealError(f"--report-to {settings.asked.report_to}: {reason_of(error)}") from None
        if trainer.is_fsdp_enabled and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
            raise HealError("FSDP: set fsdp_state_dict_type to FULL_STATE_DICT, to store the best weights")
        trainer.distillation = distillation
        for printing in (PrinterCallback, ProgressCallback):  # slicer shows progress itself
            trainer.remove_callback(printing)
        callback.trainer = trainer
        progress.stage("Training", settings.asked.max_steps, "steps")
        with distillation.recording(model) if distillation is not None else contextlib.nullcontext():
            try:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            except RuntimeError as error:
                if "does not require grad" in str(error):
                    raise HealError(NO_GRADIENT) from None
                raise
    if history.ended == "diverged" and history.weights is None:
        if trainer.is_world_process_zero():
            shutil.rmtree(work / "run", ignore_errors=True)  # nothing to resume from
        raise Diverged(
            f"the loss is not finite at step {max(history.train, default=0)} before any improvement: lower "
            f"--learning-rate (it is {settings.learning_rate:g}), or use --compute float32"
        )
    if trainer.is_world_process_zero():
        write_atomically(work / HISTORY, history.to_json())
    return history


def finished(work: Path) -> TrainingHistory | None:
    """The history of a training that is finished in the directory `work`."""
    file = work / HISTORY
    return TrainingHistory.from_json(file.read_text("utf-8")) if file.is_file() else None


def resumable(work: Path) -> bool:
    """Whether a training in the directory `work` left something to resume from."""
    return (work / HISTORY).is_file() or any(work.glob(f"run/checkpoint-*/{COMPLETE}"))


def _arguments(settings: TrainingSettings, output: Path, device: torch.device, *, resumed: bool) -> TrainingArguments:
    """The Trainer's arguments; `output`: directory of its checkpoints."""
    asked = settings.asked
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=asked.max_steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=asked.batch_size // settings.micro_batch // world(),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=asked.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=asked.weight_decay,
        bf16=settings.compute == "bfloat16",
        use_cpu=device.type == "cpu" and not (sharded() and torch.cuda.is_available()),
        seed=asked.seed,
        data_seed=asked.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_on_start=not resumed,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_steps=settings.eval_every,
        save_total_limit=_KEPT,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        report_to=asked.report_to.split(","),
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one GPU per process: no data parallelism by threads
    if world() == 1 and device.type == "cuda":  # of a process that is alone it takes the first one
        arguments._setup_devices = device
        torch.cuda.set_device(device)
    return arguments


class _Trainer(Trainer):  # type: ignore[misc]
    """Trainer with the loss summed over all target tokens of a step, whatever the micro-batches, plus distillation."""

    loss_is_scaled_for_ga = True
    distillation: DistillationLoss | None = None

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count target tokens over all processes

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Keep the last incomplete batch, which training drops."""
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = True

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        if state_dict is not None and adapters.wraps_adapter(self.model):
            adapters.save_adapter(self.model, state_dict, Path(output_dir or self.args.output_dir))
        else:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if adapters.wraps_adapter(model):
            adapters.load_adapter(model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tokens, labels = inputs["input_ids"], inputs["labels"]
        logits = model(input_ids=tokens).logits
        loss = cross_entropy(logits, labels) / num_items_in_batch * self.accelerator.num_processes
        if self.distillation is not None and model.training:
            targets = labels[:, 1:] != IGNORED
            added = self.distillation.loss(logits, tokens, inputs["index"], targets)
            loss = loss + added / self.current_gradient_accumulation_steps
        return (loss, {"loss": loss}) if return_outputs else loss


def _last_complete(run: Path) -> Path | None:
    """The last complete checkpoint; removes incomplete ones."""
    complete = {file.parent for file in run.glob(f"checkpoint-*/{COMPLETE}")}
    for path in set(run.glob("checkpoint-*")) - complete if first_process() else ():
        shutil.rmtree(path, ignore_errors=True)
    return max(complete, key=lambda path: int(path.name.split("-")[-1]), default=None)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Inside the block, accelerate and torch's generators use this GPU, in a process that is alone."""
    if world() > 1 or device.type != "cuda":
        yield
        return
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        with torch.cuda.device(device):
            yield
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Inside the block, all randomness comes from `seed`, and deterministic kernels are used."""
    deterministic: Any = torch.utils.deterministic
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    kernels, fill = (cudnn.deterministic, cudnn.benchmark), deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_seed(seed)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.deterministic, cudnn.benchmark = True, False
        deterministic.fill_uninitialized_memory = False  # not needed: uninitialised memory is never read here
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = kernels
        deterministic.fill_uninitialized_memory = fill
