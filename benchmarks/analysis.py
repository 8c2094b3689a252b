"""Measuring against a bare forward pass over the same batches, in turn, in the same run.

    python -m slicer.benchmarks.analysis [--model DIR] [--samples 32] [--seq-len 256] [--rounds 5]

The bare pass is the decoder without its head, as the measuring uses it: the hardest rival, since it computes no
logits either. The default model is the embedded one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from slicer import demo
from slicer.checkpoint.model import load_model
from slicer.measure.summary import measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo.path())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = load_model(options.model, device=options.device)
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (options.samples, options.seq_len), generator=generator)
    batches = list(torch.split(tokens, options.batch_size))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.base_model(input_ids=batch.to(device), use_cache=False)

    rates: dict[str, list[float]] = {"bare forward": [], "measure": []}
    for number in range(options.rounds + 1):  # the first round warms up
        print(f"round {number} of {options.rounds}", file=sys.stderr)
        for name, work in (("bare forward", bare), ("measure", lambda: measure(model, batches))):
            started = time.perf_counter()
            work()
            wait()
            if number:
                rates[name].append(tokens.numel() / (time.perf_counter() - started))
    ratios = [ours / theirs for ours, theirs in zip(rates["measure"], rates["bare forward"], strict=True)]
    depth = model.config.get_text_config().num_hidden_layers
    print(f"{depth} layers, {options.samples} sequences of {options.seq_len} tokens on {device}\n")
    print("| | tokens a second |\n|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):,.0f} |")
    print(
        f"\nmeasure / bare forward: {statistics.median(ratios):.3f} ({', '.join(f'{r:.3f}' for r in ratios)})"
    )


if __name__ == "__main__":
    main()
