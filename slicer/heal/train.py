"""The training itself: transformers' Trainer on packed sequences, measured on text held out, resumable, its best kept.

    work/run/checkpoint-N   weights, optimizer, random states; whole where it holds the file `WHOLE`
    work/best               the weights of the best measurement

Given the seed, a run that was killed and is started again has the losses of one that was not: everything is drawn from
seeds and states that the checkpoints hold, and every file is whole before it counts.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from slicer.errors import HealError
from slicer.heal.adapters import packed, sharded, trainable, unpack
from slicer.heal.corpus import IGNORED, Corpus
from slicer.heal.settings import Settings
from slicer.heal.teacher import Lessons
from slicer.progress import Progress

WHOLE = "whole"  # the last file of a checkpoint: a killed run may leave one that lacks it
_KEPT = 2  # checkpoints


@dataclass
class Course:
    """How a training went.

    Attributes:
        weights: the directory of the best weights; None where none was better than those at the start.
        best: the step they are of, 0 being the start.
        held_out: step -> loss on the held-out sequences, nats a token.
        train: step -> loss of the step, with what a teacher adds.
        ended: "done", "early" (no new best for `patience` measurements) or "diverged" (the loss was not finite).
    """

    weights: Path | None = None
    best: int = 0
    held_out: dict[int, float] = field(default_factory=dict)
    train: dict[int, float] = field(default_factory=dict)
    ended: str = "done"


def train(
    model: Any,
    corpus: Corpus,
    settings: Settings,
    work: Path,
    *,
    lessons: Lessons | None = None,
    report_to: str = "none",
    progress: Progress | None = None,
) -> Course:
    """Train `model` (of `slicer.heal.adapters.load`) on the corpus, from the last whole checkpoint in `work` if any.

    Raises HealError where the gradients do not reach what is to be trained, where the loss is not finite before
    anything was gained, and where memory runs out, with the options that help.
    """
    progress = progress or Progress()
    logging.set_verbosity_error()
    last = _last_whole(work / "run")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    device = next(model.parameters()).device
    if processes == 1 and device.type == "cuda":
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    arguments = TrainingArguments(
        output_dir=str(work / "run"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch // processes,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        bf16=settings.compute == "bfloat16",
        use_cpu=device.type == "cpu" and not (sharded() and torch.cuda.is_available()),
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_on_start=last is None,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.eval_every,
        save_total_limit=_KEPT,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        report_to=report_to.split(","),
        disable_tqdm=True,
    )
    arguments._n_gpu = min(
        1, arguments.n_gpu
    )  # a GPU a process: never transformers' threads over all it sees
    course = Course()
    watch = _Watch(course, settings, work, progress)
    with _deterministic(settings.seed), _out_of_memory(settings, lessons is not None):
        try:
            trainer = _Trainer(
                model=model,
                args=arguments,
                train_dataset=corpus.train,
                eval_dataset=corpus.held_out,
                data_collator=_collate,
                callbacks=[watch],
            )
        except (ImportError, RuntimeError, ValueError) as error:
            if report_to == "none":
                raise
            raise HealError(f"--report-to {report_to}: {' '.join(str(error).split())[:200]}") from None
        if trainer.is_fsdp_enabled and "FULL" not in str(
            trainer.accelerator.state.fsdp_plugin.state_dict_type
        ):
            raise HealError(
                "FSDP: set fsdp_state_dict_type to FULL_STATE_DICT, so that the best weights can be kept"
            )
        trainer.lessons = lessons
        _quiet(trainer)
        watch.trainer = trainer
        progress.stage("Training", settings.steps, "steps")
        with lessons.listening(model) if lessons is not None else contextlib.nullcontext():
            try:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            except RuntimeError as error:
                if "does not require grad" in str(error):
                    raise HealError(_UNMOVED) from None
                raise
    if course.ended == "diverged" and course.weights is None:
        raise HealError(
            f"the loss is not finite at step {max(course.train, default=0)} and nothing was gained before: lower --lr "
            f"(it is {settings.lr:g}), or give --compute float32"
        )
    return course


class _Trainer(Trainer):  # type: ignore[misc]
    """The Trainer with the loss taken over all target tokens of a step, whatever its micro-batches, and a teacher's."""

    loss_is_scaled_for_ga = True
    lessons: Lessons | None = None

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # so that target tokens are counted, over all processes

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """With the last batch, which training leaves out where it is not full."""
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tokens, labels = inputs["input_ids"], inputs["labels"]
        outputs = model(input_ids=tokens)
        loss = cross_entropy(outputs.logits, labels) / num_items_in_batch * self.accelerator.num_processes
        if self.lessons is not None and model.training:
            aside = self.lessons.loss(outputs.logits, tokens, inputs["index"], labels[:, 1:] != IGNORED)
            loss = loss + aside / self.current_gradient_accumulation_steps
        return (loss, {"loss": loss}) if return_outputs else loss


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed next-token loss, nats, of logits [batch, seq, V] and labels [batch, seq], in float32."""
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.inference_mode()
def held_out_loss(model: Any, corpus: Corpus, batch_size: int) -> float:
    """Nats a token of `model` (any transformers model) on the held-out sequences."""
    device = model.get_input_embeddings().weight.device
    total = count = 0.0
    for start in range(0, len(corpus.held_out), batch_size):
        rows = [corpus.held_out[i] for i in range(start, min(start + batch_size, len(corpus.held_out)))]
        batch = {name: tensor.to(device) for name, tensor in _collate(rows).items()}
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        total += float(cross_entropy(logits, batch["labels"]))
        count += int((batch["labels"][:, 1:] != IGNORED).sum())
    return total / count


_UNMOVED = (
    "no gradient reaches the weights that are to be trained, so training would change nothing; on a CPU with "
    "AVX512-BF16 this is bitsandbytes packing its 4-bit weights: use --method lora"
)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps the best weights, stops what stalls or diverges, checks the gradients, marks whole checkpoints."""

    trainer: Any

    def __init__(self, course: Course, settings: Settings, work: Path, progress: Progress) -> None:
        self._course, self._settings, self._work, self._progress = course, settings, work, progress
        self._unchecked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for entry in state.log_history:  # of the checkpoint that this run goes on from
            self._enter(entry, entry["step"])
        if self._course.best:
            self._course.weights = self._work / "best"
        self._progress.advance(state.global_step)

    def _enter(self, entry: dict[str, Any], step: int) -> None:
        course = self._course
        if "loss" in entry:
            course.train[step] = entry["loss"]
        if "eval_loss" in entry:
            loss = entry["eval_loss"]
            if course.held_out and loss < course.held_out[course.best] and step > course.best:
                course.best = step
            course.held_out[step] = loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self._unchecked:
            return
        self._unchecked = False
        moved = not packed(model) and any(
            parameter.grad is not None and bool(parameter.grad.ne(0).any()) for parameter in trainable(model)
        )
        accelerator = self.trainer.accelerator
        flags = accelerator.gather(torch.tensor([float(moved)], device=accelerator.device))
        if not bool(flags.any()):
            raise HealError(_UNMOVED)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._progress.advance()
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> Any:
        logs = logs or {}
        if "loss" in logs:
            self._enter(logs, state.global_step)
            self._tell()
            if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm") or 0.0):
                self._course.ended = "diverged"
                control.should_training_stop, control.should_save, control.should_evaluate = (
                    True,
                    False,
                    False,
                )
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> Any:
        self._unchecked = True  # what evaluation may have broken shows in the next step
        unpack(self.trainer.model)
        course, step = self._course, state.global_step
        before = course.best
        self._enter(metrics, step)
        if course.best == step != before:
            self._keep()
        taken = [at for at in course.held_out if at > course.best]
        if not math.isfinite(metrics["eval_loss"]):
            course.ended = "diverged"
            control.should_training_stop, control.should_save = True, False
        elif self._settings.patience and len(taken) >= self._settings.patience and step < state.max_steps:
            course.ended = "early"
            control.should_training_stop = True
        self._tell()
        return control

    def _tell(self) -> None:
        course = self._course
        words = [f"loss {course.train[max(course.train)]:.3f}"] if course.train else []
        if course.held_out:
            words.append(f"held out {course.held_out[max(course.held_out)]:.4f}")
            words.append(f"best {course.held_out[course.best]:.4f}")
        self._progress.detail(", ".join(words))

    def _keep(self) -> None:
        """Save the weights, whole or not at all, in place of the best so far."""
        new, best = self._work / "best.new", self._work / "best"
        if self.trainer.is_world_process_zero():
            shutil.rmtree(new, ignore_errors=True)
        self.trainer.save_model(str(new))  # every process has its part in this, where the model is sharded
        if self.trainer.is_world_process_zero():
            shutil.rmtree(best, ignore_errors=True)
            new.rename(best)
        self._course.weights = best

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


def _last_whole(run: Path) -> Path | None:
    """The last checkpoint that was written to its end; what is not whole is removed."""
    whole = []
    for path in run.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            whole.append(path)
        elif int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(path, ignore_errors=True)
    return max(whole, key=lambda path: int(path.name.split("-")[-1]), default=None)


def _collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _quiet(trainer: Any) -> None:
    """Without the Trainer's own lines: slicer shows its own."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Inside the block everything random comes from `seed`, and of each operation the deterministic kind is taken."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_seed(seed)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def _out_of_memory(settings: Settings, taught: bool) -> Iterator[None]:
    """Turn an allocation that fails into a HealError that names what helps and was not tried yet."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = str(error).lower()
        short = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
            sign in words for sign in ("out of memory", "can't allocate memory", "not enough memory")
        )
        if not short:
            raise
        raise HealError(f"out of memory in training; {advice(settings, taught)}") from None


def advice(settings: Settings, taught: bool) -> str:
    """The options that would take less memory, most helpful first."""
    ways = []
    if settings.micro_batch > 1:
        ways.append(f"--micro-batch {max(1, settings.micro_batch // 4)}")
    if not settings.gradient_checkpointing:
        ways.append("--gradient-checkpointing")
    if settings.method != "qlora":
        ways.append(f"--method {'lora' if settings.method == 'full' else 'qlora'}")
    if taught:
        ways.append("--teacher-cache DIR")
    ways.append(f"--train-seq-len {max(2, settings.seq_len // 2)}")
    return "give " + ", ".join(ways[:-1]) + (" or " if len(ways) > 1 else "") + ways[-1]
