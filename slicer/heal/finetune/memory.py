"""Memory that training needs on each GPU, by formula; table: `docs/reference/training.md`. Standard library only.

python -m slicer.heal.finetune.memory                                     the table
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from slicer.checkpoint.architectures.table import depth, text_config
from slicer.heal.finetune.settings import TrainingSettings, divisor

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, its share of an 8-bit scale, and of the scale of scales
_TRAINED_BYTES = 16  # a trained weight in float32, its gradient, Adam's two moments
_LOGIT_BYTES = 10  # a logit in bfloat16, in float32, and its gradient


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like model: number of kept `layers`, hidden size `d`, feed-forward size `f`, vocabulary `v`, width `kv`
    of the key and value projections; `tied`: the head shares the embedding."""

    layers: int
    d: int
    f: int
    v: int
    kv: int
    tied: bool = False

    @property
    def in_layers(self) -> int:
        """Number of weights in the matrices of all layers, which NF4 quantizes."""
        return self.layers * (2 * self.d * self.d + 2 * self.d * self.kv + 3 * self.d * self.f)

    @property
    def outside(self) -> int:
        """Number of weights in the embedding and the head."""
        return (1 if self.tied else 2) * self.v * self.d

    @classmethod
    def of(cls, config: Mapping[str, Any], layers: int | None = None) -> ModelShape:
        """From a config.json; `layers`: number of layers kept (None: all)."""
        text = text_config(config)
        d, heads = text["hidden_size"], text["num_attention_heads"]
        kv = (text.get("num_key_value_heads") or heads) * (text.get("head_dim") or d // heads)
        tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
        return cls(layers or depth(config), d, text["intermediate_size"], text["vocab_size"], kv, tied)


def needed(
    shape: ModelShape,
    *,
    method: str,
    rank: int,
    micro_batch: int,
    seq_len: int,
    gradient_checkpointing: bool,
    gpus: int = 1,
    bytes_a_value: int = 2,
) -> dict[str, float]:
    """Bytes on each GPU, with everything but the activations sharded over `gpus` (FSDP).

    weights      per weight: NF4_BYTES (qlora) or 2 (lora) in the layers' matrices, 2 in the embedding and the head
    trained      16 per trained weight: all (full), or rank x (d + f) in three matrices per layer
    unpacked     two layers that FSDP gathers at a time, as stored; one d x f matrix that NF4 dequantizes
    activations  2 x (12 d + 5 f) per token and layer; with gradient checkpointing 2 d, plus that of one layer
    logits       10 v per token
    """
    tokens = micro_batch * seq_len
    adapters = shape.layers * 3 * rank * (shape.d + shape.f)
    weight = {"qlora": NF4_BYTES, "lora": float(bytes_a_value), "full": float(bytes_a_value)}[method]
    outside = bytes_a_value * shape.outside
    trained = shape.in_layers + shape.outside if method == "full" else adapters
    unpacked = 2 * weight * shape.in_layers / shape.layers if gpus > 1 else 0.0
    unpacked += bytes_a_value * shape.d * shape.f if method == "qlora" else 0.0
    layer = bytes_a_value * (12 * shape.d + 5 * shape.f) * tokens
    kept = bytes_a_value * shape.d * tokens * shape.layers + layer if gradient_checkpointing else layer * shape.layers
    found = {
        "weights": 0.0 if method == "full" else (weight * shape.in_layers + outside) / gpus,
        "trained": _TRAINED_BYTES * trained / gpus,
        "unpacked": unpacked,
        "activations": float(kept),
        "logits": float(_LOGIT_BYTES * shape.v * tokens),
    }
    return found | {"all": sum(found.values())}


def main() -> None:
    """Print the table of `docs/reference/training.md`: the paper's settings, one sequence at a time, checkpointing."""
    models = (
        ("Llama-2-7B, 22 of 32 layers", ModelShape(22, 4096, 11008, 32000, 4096), 2, 2048),
        ("Llama-2-70B, 48 of 80 layers", ModelShape(48, 8192, 28672, 32000, 1024), 8, 4096),
    )
    print("| model | method | GPUs | weights | trained | unpacked | activations | logits | all |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (name, shape, rank, seq_len), method, gpus in product(models, ("qlora", "lora", "full"), (1, 2, 8)):
        size = {"rank": rank, "micro_batch": 1, "seq_len": seq_len, "gpus": gpus}
        row = needed(shape, method=method, gradient_checkpointing=True, **size)
        figures = " | ".join(f"{value / 1e9:.1f}" for value in row.values())
        print(f"| {name} | {method} | {gpus} | {figures} |")


def to_load(settings: TrainingSettings, *, teacher: bool) -> list[str]:
    """The options with which loading the model to train needs less memory; `teacher`: one is loaded alongside."""
    return [*_methods(settings), *(["--teacher-4bit", "--teacher-cache DIR"] if teacher else []), "--device cpu"]


def to_train(settings: TrainingSettings, *, teacher: bool) -> list[str]:
    """The options with which a step needs less memory. The first two may be given to a training that is resumed."""
    ways = _smaller_passes(settings)
    ways += [] if settings.asked.gradient_checkpointing else ["--gradient-checkpointing"]
    ways += _methods(settings)
    ways += ["--teacher-cache DIR"] if teacher else []
    return [*ways, f"--train-seq-len {max(2, settings.seq_len // 2)}"]


def to_finish(settings: TrainingSettings, verify: str) -> list[str]:
    """The options with which measuring and verifying the result needs less memory; the trained weights are kept."""
    return [*_smaller_passes(settings), *(["--verify load"] if verify == "logits" else []), "--device cpu"]


def _methods(settings: TrainingSettings) -> list[str]:
    return {"full": ["--method lora"], "lora": ["--method qlora"], "qlora": []}[settings.asked.method]


def _smaller_passes(settings: TrainingSettings) -> list[str]:
    """About a quarter of the sequences of a pass, and still a divisor of those of a step."""
    size = settings.micro_batch
    return [f"--micro-batch {divisor(size, max(1, size // 4))}"] if size > 1 else []


if __name__ == "__main__":
    main()
