"""Trainer callback: keeps the best checkpoint, stops early, and fails on the first step if no gradient is non-zero."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from slicer.errors import HealError
from slicer.heal.finetune.model import packed, unpack
from slicer.progress import Progress

COMPLETE = "complete"  # the last file written to a checkpoint: a stopped run may leave one without it
NO_GRADIENT = (
    "no gradient reaches the weights to train, so training would change nothing; on a CPU with AVX512-BF16 the "
    "cause is bitsandbytes packing its 4-bit weights: use --method lora"
)


@dataclass
class TrainingHistory:
    """History of a training.

    Attributes:
        weights: directory of the best weights; None if none were better than at the start.
        best: their step; 0 is the start.
        held_out: step -> loss on the held-out sequences, nats per token.
        train: step -> training loss of the step, with the distillation loss.
        ended: "done", "early" (no new best in `patience` measurements) or "diverged" (non-finite loss).
    """

    weights: Path | None = None
    best: int = 0
    held_out: dict[int, float] = field(default_factory=dict)
    train: dict[int, float] = field(default_factory=dict)
    ended: str = "done"

    def to_json(self) -> str:
        """As JSON, for `from_json`."""
        return json.dumps(vars(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> TrainingHistory:
        """Read the output of `to_json`."""
        found = json.loads(text)
        for name in ("held_out", "train"):
            found[name] = {int(step): value for step, value in found[name].items()}
        return cls(**{**found, "weights": found["weights"] and Path(found["weights"])})


class TrainingCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps the best weights, stops stalled or diverged training, checks the gradients, marks complete checkpoints."""

    trainer: Any

    def __init__(self, history: TrainingHistory, patience: int, work: Path, progress: Progress) -> None:
        self._history, self._patience, self._work, self._progress = history, patience, work, progress
        self._unchecked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for entry in state.log_history:  # history of the checkpoint that this run resumes
            self._enter(entry, entry["step"])
        if self._history.best:
            self._history.weights = self._work / f"best-{self._history.best}"
        self._progress.advance(state.global_step)

    def _enter(self, entry: dict[str, Any], step: int) -> None:
        history = self._history
        if "loss" in entry:
            history.train[step] = entry["loss"]
        if "eval_loss" in entry:
            loss = entry["eval_loss"]
            if history.held_out and loss < history.held_out[history.best] and step > history.best:
                history.best = step
            history.held_out[step] = loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self._unchecked:
            return
        self._unchecked = False
        gradients = (p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)
        moved = not packed(model) and any(bool(gradient.ne(0).any()) for gradient in gradients)
        accelerator = self.trainer.accelerator
        flags = accelerator.gather(torch.tensor([float(moved)], device=accelerator.device))
        if not bool(flags.any()):
            raise HealError(NO_GRADIENT)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._progress.advance()
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> Any:
        if logs and "loss" in logs:
            self._enter(logs, state.global_step)
            self._show()
            if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm") or 0.0):
                self._history.ended = "diverged"
                control.should_training_stop = True
                control.should_save = control.should_evaluate = False
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> Any:
        self._unchecked = True  # evaluation may pack weights: check the gradients of the next step
        unpack(self.trainer.model)
        history, step = self._history, state.global_step
        before = history.best
        self._enter(metrics, step)
        if history.best == step != before:
            self._keep()
        since = sum(at > history.best for at in history.held_out)
        if not math.isfinite(metrics["eval_loss"]):
            history.ended = "diverged"
            control.should_training_stop, control.should_save = True, False
        elif self._patience and since >= self._patience and step < state.max_steps:
            history.ended = "early"
            control.should_training_stop = True
        self._show()
        return control

    def _show(self) -> None:
        history = self._history
        words = [f"loss {history.train[max(history.train)]:.3f}"] if history.train else []
        if losses := history.held_out:
            words += [f"held out {losses[max(losses)]:.4f}", f"best {losses[history.best]:.4f}"]
        self._progress.detail(", ".join(words))

    def _keep(self) -> None:
        """Save the weights atomically; keeps the previous best, which a checkpoint may still refer to."""
        new, best = self._work / "best.new", self._work / f"best-{self._history.best}"
        if self.trainer.is_world_process_zero():
            shutil.rmtree(new, ignore_errors=True)
        self.trainer.save_model(str(new))  # all processes take part if the model is sharded
        if self.trainer.is_world_process_zero():
            shutil.rmtree(best, ignore_errors=True)
            new.rename(best)
        self._history.weights = best

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
            for old in self._work.glob("best-*"):
                if old != self._history.weights:
                    shutil.rmtree(old)
