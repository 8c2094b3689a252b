"""The paper's table and what is made of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slicer.errors import UsageError
from slicer.heal.finetune.settings import Training, TrainingSettings, of_record, resolve


def settings(source: str, parameters: float, **asked: Any) -> TrainingSettings:
    return resolve(Training(**asked), source, int(parameters), most_tokens=4096, on_gpu=True)[0]


@pytest.mark.parametrize(
    ("source", "parameters", "rank", "lr", "seq_len"),
    [
        ("meta-llama/Llama-2-7b-hf", 6.7e9, 2, 3e-4, 2048),
        ("meta-llama/Llama-2-13b-hf", 13e9, 64, 3e-4, 4096),
        ("/models/Llama-2-70b-chat-hf/", 69e9, 8, 3e-5, 4096),
        ("Qwen/Qwen-7B@main", 7.7e9, 64, 3e-4, 2048),
        ("Qwen/Qwen-14B", 14e9, 64, 3e-4, 4096),
        ("mistralai/Mistral-7B-v0.1", 7.2e9, 4, 3e-6, 2048),
        ("microsoft/phi-2", 2.8e9, 64, 2e-4, 2048),
    ],
)
def test_the_paper(source: str, parameters: float, rank: int, lr: float, seq_len: int) -> None:
    found, words = resolve(Training(), source, int(parameters), most_tokens=4096, on_gpu=True)
    assert (found.lora_r, found.lora_alpha, found.learning_rate, found.seq_len) == (
        rank,
        rank,
        lr,
        seq_len,
    ) and not words
    assert found.warmup_steps == 100 and found.asked == Training()
    assert found.micro_batch * seq_len == 4096


def test_a_model_that_is_not_in_it_gets_the_nearest_by_size_and_a_word() -> None:
    found, words = resolve(Training(), "Qwen/Qwen2.5-0.5B", int(0.5e9), most_tokens=512, on_gpu=False)
    assert found.lora_r == 64 and found.learning_rate == 2e-4 and found.compute == "float32"
    assert "Phi-2" in words[0] and found.seq_len == 512 and "512" in words[1]


def test_what_is_given_wins() -> None:
    found = settings(
        "phi-2", 2.8e9, lora_r=3, learning_rate=1e-5, max_steps=50, batch_size=6, lora_dropout=0.0, seq_len=1024
    )
    assert (found.lora_r, found.lora_alpha, found.learning_rate) == (3, 3, 1e-5)
    assert found.warmup_steps == 5 and found.eval_every == 5 and found.micro_batch == 3


def test_values_that_contradict_each_other_are_refused() -> None:
    for asked, word in (
        ({"max_steps": 5, "batch_size": 6, "micro_batch": 4}, "--micro-batch"),
        ({"seq_len": 5000}, "4096 tokens"),
        ({"lora_dropout": 1.0}, "--lora-dropout"),
        ({"teacher": "x"}, "--kl-weight"),
        ({"teacher_4bit": True}, "--kl-weight"),
        ({"teacher_4bit": True, "teacher_cache": "x", "kl_weight": 1.0}, "--teacher-cache"),
        ({"kl_weight": math.nan}, "--kl-weight nan"),
        ({"mismatch_weight": math.inf}, "--mismatch-weight inf"),
        ({"learning_rate": math.nan}, "--learning-rate nan"),
        ({"lora_alpha": 0.0}, "--lora-alpha 0"),
        ({"lora_dropout": math.nan}, "--lora-dropout nan"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1"),
        ({"method": "full", "lora_r": 4}, "--lora-r"),
        ({"method": "full", "lora_alpha": 4.0}, "--lora-alpha"),
        ({"method": "full", "lora_dropout": 0.1}, "--lora-dropout"),
    ):
        with pytest.raises(UsageError, match=word):
            settings("phi-2", 2.8e9, **asked)
    with pytest.raises(UsageError, match="3 processes"):
        resolve(Training(), "phi-2", 10**9, most_tokens=None, on_gpu=True, processes=3)


def test_what_was_asked_can_be_asked_again_from_its_record() -> None:
    asked = Training(method="lora", max_steps=7, lora_dropout=0.0, validation="text.jsonl", seed=3)
    assert of_record({**asked.chosen, "preset": "paper"}) == asked and len(asked.chosen) == 5
    recorded = settings("phi-2", 2.8e9, method="full", max_steps=7).to_dict()
    assert recorded["max_steps"] == 7 and recorded["seq_len"] == 2048 and "lora_r" not in recorded
