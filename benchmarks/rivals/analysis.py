"""Benchmark of analysis against a bare forward pass, and against one pass per block size, on the same batches.

    python -m slicer.benchmarks.rivals.analysis [--model DIR] [--samples 32] [--seq-len 256] [--rounds 3]

The bare pass is the decoder without its head, as the analysis runs it: the strictest baseline, because it computes no
logits either. `measure` is what `slicer convert` does (angular distance, last token, every n); `all metrics` is what
`slicer analyze` does up to the tables. The rival is PruneMe's algorithm, reimplemented: for one block size n, a forward
pass with output_hidden_states, and for every start the angular distance of the last non-padded token's states in
hidden_states[l] and hidden_states[l + n]; each n is a separate run. It is timed for one n, and multiplied by all.
Each round has another order; the first is a warm-up and is not counted. The default model is the embedded one.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slicer.benchmarks.page import markdown_table
from slicer.benchmarks.process import seconds_of
from slicer.benchmarks.script import in_rounds, options
from slicer.checkpoint.hub import DEMO
from slicer.measure.distances import distance_tables, measure_loaded
from slicer.measure.metrics import points_affordable
from slicer.measure.recorder import Portion, record
from slicer.model.load import load_model
from slicer.model.walk import Walk
from slicer.progress import Progress


def main() -> None:
    defaults = {"model": DEMO, "device": "auto", "samples": 32, "seq_len": 256, "batch_size": 4, "rounds": 3}
    given = options(__doc__, **defaults).parse_args()
    model = load_model(given.model, device=given.device)
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (given.samples, given.seq_len), generator=generator)
    batches = list(torch.split(tokens, given.batch_size))
    depth = model.config.get_text_config().num_hidden_layers

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.base_model(input_ids=batch.to(device), use_cache=False)

    def everything() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            walk = Walk.in_memory(model)
            width = model.config.get_text_config().hidden_size
            inside = sum(p.numel() for p in walk.layers.parameters())
            points = points_affordable(depth + 1, width, given.samples, tokens.numel(), inside)
            portion = Portion.of(batches)
            found = record(walk, portion, Path(scratch), positions=16, points=points, resumable=True)
            distance_tables(found, portion, Progress())

    work = {
        "bare forward": bare,
        "measure": lambda: measure_loaded(model, batches),
        "all metrics": everything,
        "one pass per n, a single n": lambda: one_n(model, batches, depth // 4),
    }
    seconds = in_rounds({name: partial(seconds_of, call, device) for name, call in work.items()}, given.rounds)
    print(f"{depth} layers, {given.samples} sequences of {given.seq_len} tokens on {device}\n")
    rows = []
    for name, taken in seconds.items():
        ratios = [mine / other for mine, other in zip(taken, seconds["bare forward"], strict=True)]
        relative = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        rows.append([name, f"{tokens.numel() / statistics.median(taken):,.0f}", relative])
    print(*markdown_table(["", "tokens/s", "relative to a bare forward pass"], rows), sep="\n")
    rival = statistics.median(seconds["one pass per n, a single n"]) * depth
    ours = statistics.median(seconds["all metrics"])
    print(
        f"\nEvery n: the rival runs {depth} times, {rival:,.0f} s; all metrics take {ours:,.1f} s: {rival / ours:.1f} x"
    )


@torch.inference_mode()
def one_n(model: Any, batches: list[torch.Tensor], n: int) -> list[float]:
    """PruneMe's algorithm: the mean angular distance of every block of n layers, in one pass for this n only."""
    device = model.get_input_embeddings().weight.device
    sums: list[float] = []
    count = 0
    for batch in batches:
        mask = torch.ones_like(batch, device=device)
        hidden = model(input_ids=batch.to(device), attention_mask=mask, output_hidden_states=True).hidden_states
        last = mask.sum(1) - 1
        rows = torch.arange(len(batch), device=device)
        sums = sums or [0.0] * (len(hidden) - n)
        for start in range(len(hidden) - n):
            u, v = hidden[start][rows, last].float(), hidden[start + n][rows, last].float()
            cosine = torch.nn.functional.cosine_similarity(u, v, dim=-1).clamp(-1, 1)
            sums[start] += float((torch.arccos(cosine) / math.pi).sum())
        count += len(batch)
    return [total / count for total in sums]


if __name__ == "__main__":
    main()
