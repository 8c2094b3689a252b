"""Options that take less memory, for the message where it runs out while healing: the most helpful first."""

from __future__ import annotations

from slicer.heal.settings import Settings, divisor


def to_load(settings: Settings, *, taught: bool) -> list[str]:
    """What takes less where the model to train is loaded; `taught`: beside a teacher."""
    ways = _methods(settings)
    return [*ways, *(["--teacher-4bit", "--teacher-cache DIR"] if taught else []), "--device cpu"]


def to_train(settings: Settings, *, taught: bool) -> list[str]:
    """What takes less of a step. The first two may be given to a training that goes on."""
    ways = [f"--micro-batch {_fewer(settings)}"] if settings.micro_batch > 1 else []
    ways += [] if settings.gradient_checkpointing else ["--gradient-checkpointing"]
    ways += _methods(settings)
    ways += ["--teacher-cache DIR"] if taught else []
    return [*ways, f"--train-seq-len {max(2, settings.seq_len // 2)}"]


def to_finish(settings: Settings, verify: str) -> list[str]:
    """What takes less where the result is measured and verified; the weights that were trained are taken up again."""
    ways = [f"--micro-batch {_fewer(settings)}"] if settings.micro_batch > 1 else []
    return [*ways, *(["--verify load"] if verify in ("auto", "logits") else []), "--device cpu"]


def _methods(settings: Settings) -> list[str]:
    return {"full": ["--method lora"], "lora": ["--method qlora"], "qlora": []}[settings.method]


def _fewer(settings: Settings) -> int:
    """About a quarter of the sequences of a pass, and still a divisor of those of a step."""
    return divisor(settings.micro_batch, max(1, settings.micro_batch // 4))
