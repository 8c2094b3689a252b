"""The model card of a sliced checkpoint: what it is, what was dropped and why, how to load it, what it lost."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from slicer.checkpoint.sizes import Sizes
from slicer.plan.amounts import spell_layers
from slicer.plan.plan import METRIC, Plan, spell_dropped, spell_left
from slicer.plan.records import HealingRecord, MergeRecord, TrainingRecord

_KEPT_FIELDS = ("license", "license_name", "license_link", "language")
_SIZES = {
    "layers": "depth", "parameters": "parameters", "bytes of weights": "total_bytes",
    "FLOPs per token": "flops_per_token", "KV-cache bytes per token": "kv_bytes_per_token",
}  # fmt: skip
_CARD = """{front}
# {name}, {left}

{what}

| | before | after |
|---|---|---|
{sizes}

## How the layers were chosen

{reason}

{repair}{merged}{figures}## How to load it

{loading}

```python
{load_first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

```sh
vllm serve PATH
```

## Limits

Dropping layers costs ability, and not evenly. Reasoning suffers first: mathematics, code and long chains of thought \
break down after few layers and do not fully come back by healing, while questions of knowledge hold much longer. \
Short answers can look well while long generations repeat or wander. Measure on your own task before you rely on it.

## How it was made

With [slicer](https://pypi.org/project/slicer-llm/){version}; `slicer/plan.json` has every setting.
{commands}"""
_FIGURES = """![Angular distance across every block](slicer/distances.png)

![Angular distance by the layer where the block starts](slicer/curves.png)

"""


def for_plan(origin: Path, plan: Plan, before: Sizes, after: Sizes, *, figures: bool) -> str:
    """The README.md of the output: front matter, then prose. The same card for the same plan.

    `origin`: directory whose card has the licence. `figures`: whether those of the distances are there.
    """
    base = plan.source or "unknown"
    local = Path(base).exists()
    name = Path(base).resolve().name if local else base
    front = ["---"]
    if not local and "/" in base:
        front += [f"base_model: {base.split('@')[0]}", "base_model_relation: finetune"]
    front += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- slicer", "- depth-pruning"]
    kept = f"their weights{f', cast to {plan.dtype}' if plan.dtype else ' bit for bit'}"
    kept += "; nothing was trained or healed." if plan.healing is None else ", but for the repair (below)."
    gone, rest = f"its decoder layers {spell_layers(plan.dropped)}", "other layers"
    if plan.below_layers:
        gone, rest = _without(plan), "tensors that are left"
    rows = ((label, getattr(before, name), getattr(after, name)) for label, name in _SIZES.items())
    merged_into = {key for record in plan.merged for key in record.tensors}
    adapters = f"LoRA adapters merged into it: {len(plan.merged)}, into {len(merged_into)} of its matrices.\n\n"
    commands = [] if local else _commands(plan)
    version = plan.versions.get("slicer-llm")
    return _CARD.format(
        front="\n".join([*front, *_inherited(origin), "---", ""]),
        name=name,
        left=f"{len(plan.kept)} of {plan.depth} layers{spell_left(plan)}",
        what=f"{name} without {gone} (counted from 0). The {rest} keep {kept}",
        sizes="\n".join(f"| {label} | {old:,} | {new:,} |" for label, old, new in rows),
        reason=_reason(plan),
        repair=_repair(plan.healing) if plan.healing is not None else "",
        merged=adapters if plan.merged else "",
        figures=_FIGURES if figures else "",
        loading=_LOADING[plan.form],
        load_first="import slicer\n" if plan.form == "blockwise" else "",
        version=f" {version}" if version else "",
        commands="\n".join(["", "```sh", *commands, "```", ""]) if commands else "",
    )


def merged(record: MergeRecord) -> str:
    """What is added to the card of a checkpoint that an adapter was merged into."""
    return f"\nA LoRA adapter was merged into {len(record.tensors)} of its matrices with slicer.\n"


def _commands(plan: Plan) -> list[str]:
    """The commands that were run, in order: the cut, then each separate healing; files by name, without directories."""
    record, found = plan.healing, list[str | None]()
    while record is not None:
        found, record = [record.command, *found], record.earlier
    commands = dict.fromkeys(command for command in (plan.command, *found) if command)
    return [shlex.join(",".join(map(_name, word.split(","))) for word in shlex.split(command)) for command in commands]


def _name(word: str) -> str:
    """A file by its name alone; any other word as it is."""
    path = Path(word)
    return path.name if path.is_absolute() or ("/" in word and path.exists()) else word


def _without(plan: Plan) -> str:
    text = f"the {spell_dropped(plan)}".replace("; ", ", the ")
    for i, j in plan.joined:
        text = text.replace(
            f"the half-offset block from after attention {i} to after attention {j}",
            f"what lies between the attention of layer {i} and the feed-forward of layer {j}, which are now one layer",
        )
    return text


_LOADING = {
    "native": "It is an ordinary checkpoint of its architecture. Give the path or id of this directory:",
    "zeroed": "It is an ordinary checkpoint of its architecture. The removed sublayers are still there, with their "
    "output matrices set to zero: it loads everywhere, and **saves neither memory nor time**.",
    "blockwise": "Some layers lack attention or feed-forward, which no class of transformers supports. vLLM has such a "
    "class, which keeps no key-value cache for a layer without attention; slicer registers the checkpoint with both: "
    "`pip install slicer-llm`. vLLM then serves it; in transformers, `import slicer` first. No remote code is run. "
    "Give the path or id of this directory:",
}


def _reason(plan: Plan) -> str:
    if plan.strategy == "similarity" and plan.distance is not None:
        angular = plan.metric in (None, METRIC)
        parts = bool(plan.no_attention or plan.no_ffn)
        text = plan.calibration
        where = f"{text.samples} sequences of {text.seq_len} tokens, source: {_name(text.source)}" if text else "text"
        by = (
            "They change the residual stream least: the angular distance between what enters and what leaves "
            f"{'what was cut' if plan.joined else 'them'}, at the last token, is"
            if angular
            else f"They change the model least by `{plan.metric}`, which is"
        )
        unit = "in units of pi, " if angular else ""
        words = f"{by} {plan.distance:.4f}{' in all' if parts else ''} ({unit}mean of {where})."
        if plan.below_layers:
            words += " The stream was read after every attention and every feed-forward."
        elif angular:
            words += " It is equation 7 of Gromov et al., *The Unreasonable Ineffectiveness of the Deeper Layers*."
        others = ", ".join(f"{other.block} ({other.distance:.4f})" for other in plan.runners_up)
        return words + (f" Next best: {others}." if others else "")
    return {
        "deepest": "They are the deepest ones, without the final layer, which stays; nothing was measured.",
        "tail": "They are the last ones; nothing was measured.",
    }.get(plan.strategy, "They were named by hand.")


def _repair(record: HealingRecord) -> str:
    """How the cut was repaired, on what text, and the losses."""
    text, training, loss = record.text, record.training, record.loss
    if training is not None:
        done, held_out = (_trained(record, training), f"{training.corpus.held_out_sequences} held-out sequences")
    else:
        solved = dict.fromkeys((entry.layer, entry.module) for entry in record.solved)
        if record.adds_maps:
            behind = ", ".join(f"the {module} of layer {layer}" for layer, module in solved) or "nothing"
            what = f"A linear map of rank {record.rank} and a constant" if record.rank else "A constant"
            done = f"{what} is added to the residual stream behind {behind} (numbered as in the original), solved"
        else:
            names = ", ".join(f"`{module}` of layer {layer}" for layer, module in sorted(solved))
            done = (
                f"{names} (numbered as in the original) were solved again by ridge regression (`{record.method}`, "
                f"`{record.solver}`), so that the residual stream behind the cut is as it was in the original,"
            )
        done += " in closed form"
        if text is not None:
            done += f" on {text.samples} sequences of {text.seq_len} tokens, seed {text.seed}"
            done += f", source: {_name(text.source)}"
        if record.steps:
            done += f", then trained alone for {record.steps} steps, of which step {record.best_step} was kept"
        held_out = f"{len(text.held_out) if text else 0} of these sequences that were not fitted"
    shown = {"original": loss.source, "cut": loss.before, "as solved": loss.solved, "repaired": loss.after}
    known = {name: value for name, value in shown.items() if value is not None}
    lines = [
        "## What was added for the removed sublayers" if record.adds_maps else "## How the cut was healed",
        "",
        f"{done}. Loss in nats per token on {held_out}:",
        "",
    ]
    if known:
        values = (f"{value:.4f}" for value in known.values())
        lines += [f"| {' | '.join(known)} |", "|---" * len(known) + "|", f"| {' | '.join(values)} |", ""]
    if training is not None:
        lines += ["![Loss while it was trained](slicer/training.png)", ""]
    return "\n".join([*lines, ""])


def _trained(record: HealingRecord, training: TrainingRecord) -> str:
    values, corpus = training.settings, training.corpus
    kind = {
        "qlora": "LoRA adapters on its feed-forward matrices, trained while the weights were in 4 bits (NF4, double "
        "quantization) and merged into the unquantized weights",
        "lora": "LoRA adapters on its feed-forward matrices, trained and merged into the weights",
        "full": "all weights, trained",
    }[record.method]
    adapters = "rank {lora_r}, alpha {lora_alpha:g}, dropout {lora_dropout:g}, " if "lora_r" in values else ""
    start = {"fold": "the weights solved again in closed form", "cut": "the bare cut"}.get(
        training.start, f"weights that were healed before (`{training.start}`)"
    )
    settings = (
        adapters + "{batch_size} sequences of {seq_len} tokens per step, learning rate {learning_rate:g} "
        "({lr_scheduler_type}, {warmup_steps} steps of warm-up), seed {seed}"
    )
    return (
        f"By training (`{record.method}`), from {start}: {kind}. {record.steps} steps with "
        f"{settings.format(**values)}; the weights are those of step {record.best_step}. "
        f"Data: {_name(corpus.source)}; learned: {corpus.learned}"
    )


def _inherited(source: Path) -> list[str]:
    """Licence and language lines of the source's own card."""
    try:
        match = re.match(r"---\n(.*?)\n---", (source / "README.md").read_text("utf-8"), re.DOTALL)
    except (OSError, UnicodeDecodeError):
        return []
    lines: list[str] = []
    keeping = False
    for line in match[1].splitlines() if match else []:
        field = re.match(r"(\w+):", line)
        keeping = field[1] in _KEPT_FIELDS if field else keeping and line.startswith(("-", " "))
        if keeping:
            lines.append(line)
    return lines
