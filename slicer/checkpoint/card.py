"""The model card of a sliced checkpoint: what it is, what was dropped and why, how to load it, what it lost."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import Sizes
from slicer.plan.plan import Plan, spell_dropped, spell_layers

_KEPT_FIELDS = ("license", "license_name", "license_link", "language")


def for_slice(checkpoint: Checkpoint, plan: Plan, before: Sizes, after: Sizes, *, figures: bool) -> str:
    """The README.md of the output: front matter, then prose. The same card for the same plan."""
    base = plan.source or "unknown"
    local = Path(base).exists()
    name = Path(base).resolve().name if local else base
    lines = ["---"]
    if not local and "/" in base:
        lines += [f"base_model: {base.split('@')[0]}", "base_model_relation: finetune"]
    lines += [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- slicer",
        "- depth-pruning",
    ]
    lines += _inherited(checkpoint.path) + ["---", ""]
    kept = f", cast to {plan.dtype}" if plan.dtype else " bit for bit"
    if plan.below_layers:
        what = f"{name} without {_without(plan)} (counted from 0). All that is left keeps its weights{kept}"
    else:
        what = (
            f"{name} without its decoder layers {spell_layers(plan.dropped)} (counted from 0). The other layers keep "
            f"their weights{kept}"
        )
    lines += [
        f"# {name}, {_left(plan)}",
        "",
        what + _but(plan),
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| layers | {before.depth} | {after.depth} |",
        f"| parameters | {before.parameters:,} | {after.parameters:,} |",
        f"| bytes of weights | {before.total_bytes:,} | {after.total_bytes:,} |",
        f"| FLOPs a token | {before.flops_per_token:,} | {after.flops_per_token:,} |",
        f"| KV-cache bytes a token | {before.kv_bytes_per_token:,} | {after.kv_bytes_per_token:,} |",
        "",
        "## How the layers were chosen",
        "",
        _reason(plan),
        "",
    ]
    if plan.healing is not None:
        lines += ["## How the cut was healed", "", *_healing(plan.healing), ""]
    if plan.merged:
        matrices = {key for record in plan.merged for key in record.get("tensors") or ()}
        lines += [
            f"LoRA adapters merged into it: {len(plan.merged)}, into {len(matrices)} of its matrices.",
            "",
        ]
    if plan.emulated is not None:
        lines += ["## What stands for the removed parts", "", *_emulated(plan.emulated), ""]
    if figures:
        lines += [
            "![Angular distance across every block](slicer/distances.png)",
            "",
            "![Angular distance by the layer where the block starts](slicer/curves.png)",
            "",
        ]
    lines += [
        "## How to load it",
        "",
        *_loading(plan),
        "",
        "```python",
        *(["import slicer"] if plan.form == "blockwise" else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
        "```sh",
        "vllm serve PATH",
        "```",
        "",
        "## Limits",
        "",
        "Dropping layers costs ability, and not evenly. Reasoning suffers first: mathematics, code and long chains of "
        "thought break down after few layers and do not fully come back by healing, while questions of knowledge hold "
        "much longer. Short answers can look well while long generations repeat or wander. Measure on your own task "
        "before you rely on it.",
        "",
        "## How it was made",
        "",
        f"With [slicer](https://pypi.org/project/slicer-llm/){_version(plan)}; `slicer/plan.json` has every setting.",
        "",
    ]
    if not local and (commands := _commands(plan)):
        lines += ["```sh", *commands, "```", ""]
    return "\n".join(lines)


def _commands(plan: Plan) -> list[str]:
    """What was run, in order: the cut, then each healing that was a command of its own; files by their names alone."""
    found = []
    record = plan.healing
    while record is not None:
        found.append(record.get("command"))
        record = record.get("earlier")
    commands = dict.fromkeys(command for command in (plan.command, *reversed(found)) if command)
    return [
        shlex.join(",".join(map(_name, word.split(","))) for word in shlex.split(command))
        for command in commands
    ]


def _name(word: str) -> str:
    path = Path(word)
    return path.name if path.is_absolute() or ("/" in word and path.exists()) else word


def _but(plan: Plan) -> str:
    if plan.healing is not None:
        return ", but for those healed (below)."
    return (
        "; nothing was trained or healed."
        if plan.emulated is None
        else "; what was removed is emulated (below)."
    )


def _emulated(record: Mapping[str, Any]) -> list[str]:
    data, loss = record["calibration"], record["loss"]
    source = str(data.get("source", "calibration text"))
    source = Path(source).name if Path(source).exists() else source
    behind = ", ".join(f"the {e['part']} of layer {e['layer']}" for e in record["behind"]) or "nothing"
    what = (
        "a constant"
        if record["method"] == "bias"
        else f"a linear map of rank {record['rank']} and a constant"
    )
    trained = ""
    if "trained" in loss:
        trained = (
            f", then trained alone for {record['steps']} steps, of which step {record['best_step']} was kept"
        )
    columns = {"original": "source", "cut": "cut", "emulated": "emulated", "trained": "trained"}
    shown = {name: loss[key] for name, key in columns.items() if key in loss}
    return [
        f"{what.capitalize()} is added to the residual stream behind {behind} (numbered as in the original), solved in "
        f"closed form on {data.get('samples', '?')} sequences of {data.get('seq_len', '?')} tokens (source: {source})"
        f"{trained}. Loss in nats a token on {len(record['held_out_sequences'])} of these that took no part in that:",
        "",
        f"| {' | '.join(shown)} |",
        "|---" * len(shown) + "|",
        f"| {' | '.join(f'{value:.4f}' for value in shown.values())} |",
    ]


def _left(plan: Plan) -> str:
    words = f"{len(plan.kept)} of {plan.depth} layers"
    if plan.no_attention:
        words += f", {len(plan.kept) - len(plan.no_attention)} with attention"
    return words + (f", {len(plan.kept) - len(plan.no_ffn)} with feed-forward part" if plan.no_ffn else "")


def _without(plan: Plan) -> str:
    text = f"the {spell_dropped(plan)}".replace("; ", ", the ")
    for i, j in plan.joined:
        text = text.replace(
            f"the from after attention {i} to after attention {j} (half-offset)",
            f"what lies between the attention of layer {i} and the feed-forward part of layer {j}, which are now one "
            "layer",
        )
    return text


def _loading(plan: Plan) -> list[str]:
    if plan.form == "zeroed":
        return [
            "It is an ordinary checkpoint of its architecture. The removed parts are still there, with their output "
            "matrices set to zero: it loads everywhere, and **saves neither memory nor time**.",
        ]
    if plan.form == "blockwise":
        return [
            "Some layers lack a part, which no class of transformers' own runs. vLLM has such a class, which "
            "keeps no key-value cache for a layer without attention; slicer makes the checkpoint known to both: "
            "`pip install slicer-llm` beside them. vLLM then serves it; in transformers, `import slicer` first. "
            "No remote code is run. Give the path or id of this directory:",
        ]
    return ["It is an ordinary checkpoint of its architecture. Give the path or id of this directory:"]


def _reason(plan: Plan) -> str:
    if plan.strategy == "similarity" and plan.distance is not None and plan.below_layers:
        data = plan.calibration or {}
        source = str(data.get("source", "calibration text"))
        source = Path(source).name if Path(source).exists() else source
        others = ", ".join(f"{r['block']} ({r['distance']:.4f})" for r in plan.runners_up)
        return (
            "They change the residual stream least: the angular distance between what enters and what leaves "
            f"{'them' if not plan.joined else 'what was cut'}, at the last token, is {plan.distance:.4f}"
            f"{' in all' if plan.no_attention or plan.no_ffn else ''} (in units of pi, mean of "
            f"{data.get('samples', '?')} sequences of {data.get('seq_len', '?')} tokens, source: {source}). The stream "
            "was tapped after every attention and every feed-forward part."
            + (f" Next best: {others}." if others else "")
        )
    if plan.strategy == "similarity" and plan.distance is not None:
        data = plan.calibration or {}
        source = str(data.get("source", "calibration text"))
        source = Path(source).name if Path(source).exists() else source
        sentence = (
            f"Among all blocks of {len(plan.dropped)} layers this one changes the residual stream least: the angular "
            f"distance between what enters it and what leaves it, at the last token, is {plan.distance:.4f} (in units "
            f"of pi, mean of {data.get('samples', '?')} sequences of {data.get('seq_len', '?')} tokens, source: "
            f"{source}). The measure is equation 7 of Gromov et al., *The Unreasonable Ineffectiveness of the Deeper "
            "Layers*."
        )
        others = ", ".join(f"{r['block']} ({r['distance']:.4f})" for r in plan.runners_up)
        return sentence + (f" Next best: {others}." if others else "")
    return {
        "deepest": "They are the deepest ones, without the final layer, which stays; nothing was measured.",
        "tail": "They are the last ones; nothing was measured.",
    }.get(plan.strategy, "They were named by hand.")


def _healing(record: Mapping[str, Any]) -> list[str]:
    """What was solved again or trained, on what, and the loss before and after."""
    if "settings" in record:
        return _trained(record)
    data, loss = record["calibration"], record["loss"]
    source = str(data.get("source", "calibration text"))
    source = Path(source).name if Path(source).exists() else source
    solved = sorted({(entry["layer"], entry["module"]) for entry in record["solved"]})
    names = ", ".join(f"`{module}` of layer {layer}" for layer, module in solved)
    return [
        f"In closed form, without training (`{record['method']}`, `{record['solver']}`): {names} (numbered as in "
        "the original) were solved again by ridge regression, so that the residual stream arrives behind the cut as it "
        f"did in the original. Data: {data.get('samples', '?')} sequences of {data.get('seq_len', '?')} tokens, seed "
        f"{data.get('seed', '?')}, source: {source}. Loss in nats a token on {len(record['held_out_sequences'])} of "
        "these sequences that took no part in the solving:",
        "",
        "| original | cut, not healed | healed |",
        "|---|---|---|",
        f"| {loss['source']:.4f} | {loss['sliced']:.4f} | {loss['healed']:.4f} |",
    ]


def _trained(record: Mapping[str, Any]) -> list[str]:
    values, data, loss = record["settings"], record["data"], record["loss"]
    source = Path(data["source"]).name if Path(data["source"]).exists() else data["source"]
    kind = {
        "qlora": "LoRA adapters on its feed-forward matrices, trained while the weights were in 4 bits (NF4, double "
        "quantization) and merged into the unquantized weights",
        "lora": "LoRA adapters on its feed-forward matrices, trained and merged into the weights",
        "full": "all weights, trained",
    }[record["method"]]
    adapters = (
        f"rank {values['rank']}, alpha {values['alpha']:g}, dropout {values['dropout']:g}, "
        if "rank" in values
        else ""
    )
    start = {"fold": "the weights solved again in closed form", "cut": "the bare cut"}.get(
        record["start"], f"weights that were healed before (`{record['start']}`)"
    )
    tables = [("original", loss["source"]), ("before", loss["before"]), ("healed", loss["healed"])]
    known = [(name, value) for name, value in tables if value is not None]
    lines = [
        f"By training (`{record['method']}`), from {start}: {kind}. {adapters[:1].upper()}{adapters[1:]}"
        f"{record['steps']} steps of {values['batch_size']} sequences of {values['seq_len']} tokens, learning rate "
        f"{values['lr']:g} ({values['scheduler']}, {values['warmup']} steps of warm-up), seed {values['seed']}; the "
        f"weights are those of step {record['best_step']}. Data: {source}; learned: {data['learned']}. Loss in nats a "
        f"token on {data['held_out_sequences']} sequences that were not trained on:",
        "",
    ]
    if known:
        lines += [f"| {' | '.join(n for n, _ in known)} |", "|" + "---|" * len(known)]
        lines += [f"| {' | '.join(f'{v:.4f}' for _, v in known)} |", ""]
    return [*lines, "![Loss while it was trained](slicer/training.png)"]


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


def _version(plan: Plan) -> str:
    version = plan.versions.get("slicer-llm")
    return f" {version}" if version else ""
