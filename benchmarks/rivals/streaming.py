"""Benchmark of streaming a 13B-shaped checkpoint from disk: rate against plain reading, peak memory, resuming.

    python -m slicer.benchmarks.rivals.streaming [--directory DIR] [--layers 40] [--tokens 4] [--memory 3GB]

Writes the checkpoint (40 layers, hidden size 5120, bfloat16, 26 GB) into DIR and deletes it afterwards; uses fewer
layers if the disk is too small. Every run is a separate process with the files out of the page cache, also the plain
reading (the first ten of the same files, in order, 16 MB at a time). A run of four layers with many tokens measures
the speed of computing; a last run of all layers is compared with the time that the planning formula predicts from
these rates. The walk is that of `slicer analyze`: it records the states of every metric and is resumable.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 5120, 13824, 40, 32000
LAYER_PARAMETERS = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
OUTSIDE_PARAMETERS = 2 * VOCABULARY * HIDDEN + HIDDEN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument(
        "--tokens", type=int, default=16, help="tokens of one sequence: few, so that the disk is the limit"
    )
    parser.add_argument("--compute-tokens", type=int, default=512)
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--worker", nargs=4, metavar=("MODEL", "OUT", "TOKENS", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        model, out, tokens, layers = options.worker
        print(json.dumps(work(Path(model), Path(out), int(tokens), int(layers), options.memory)))
        return
    free = shutil.disk_usage(options.directory).free - 2 * 10**9
    layers = min(options.layers, (free - 2 * OUTSIDE_PARAMETERS) // (2 * LAYER_PARAMETERS))
    if layers < options.layers:
        print(f"{options.directory} has {free / 1e9:.0f} GB free: {layers} layers instead of {options.layers}")
    scratch = Path(tempfile.mkdtemp(prefix="slicer-13b-", dir=options.directory))
    try:
        run(scratch, layers, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run(scratch: Path, layers: int, options: argparse.Namespace) -> None:
    model = scratch / "model"
    write(model, layers)
    bytes_read = 2 * LAYER_PARAMETERS * layers
    plain = read_plainly(model)
    whole = start(model, scratch / "whole", options.tokens, layers, options.memory)
    report = json.loads(whole.communicate()[0].splitlines()[-1])
    plain_again = read_plainly(model)
    drop_cache(model)
    out = scratch / "killed"
    victim = start(model, out, options.tokens, layers, options.memory)
    while not (out / f"layer-{layers // 2:03d}.safetensors").exists():
        if victim.poll() is not None:
            sys.exit("the run finished before it could be killed")
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    drop_cache(model)
    resumed = json.loads(start(model, out, options.tokens, layers, options.memory).communicate()[0].splitlines()[-1])
    same = all(
        (out / f"layer-{i:03d}.safetensors").read_bytes()
        == (scratch / "whole" / f"layer-{i:03d}.safetensors").read_bytes()
        for i in range(layers + 1)
    )
    few = min(4, layers)
    busy = json.loads(
        start(model, scratch / "busy", options.compute_tokens, few, options.memory).communicate()[0].splitlines()[-1]
    )
    work_each = 2.0 * LAYER_PARAMETERS * options.compute_tokens
    flops = work_each * few / busy["advance_seconds"]
    many = json.loads(
        start(model, scratch / "many", options.compute_tokens, layers, options.memory).communicate()[0].splitlines()[-1]
    )
    rate = bytes_read / report["walk_seconds"] / 1e6
    fastest = max(plain, plain_again)
    planned = {  # formula of docs/guide/analyze.md
        tokens: layers * max(2e-6 * LAYER_PARAMETERS / fastest, 2.0 * LAYER_PARAMETERS * tokens / flops)
        for tokens in (options.tokens, options.compute_tokens)
    }
    print(f"\n{layers} layers of {2 * LAYER_PARAMETERS / 1e6:.0f} MB, {options.tokens} tokens, {options.memory}\n")
    print("| | |\n|---|---|")
    print(f"| plain sequential reading, before and after | {plain:,.0f} and {plain_again:,.0f} MB/s |")
    print(f"| walk, start to end of the last layer | {report['walk_seconds']:.1f} s, {rate:,.0f} MB/s |")
    print(f"| walk / plain (the faster) | {rate / fastest:.2f} |")
    print(
        f"| peak resident memory, without file-backed pages | {report['peak']:.2f} GiB, {report['anonymous']:.2f} GiB |"
    )
    print(f"| killed after layer {layers // 2 - 1}, resumed at layer | {resumed['first']} |")
    print(f"| stored states of the resumed run equal byte for byte | {'yes' if same else 'NO'} |")
    print(f"| computing, {options.compute_tokens} tokens, {few} layers | {flops / 1e9:,.0f} GFLOP/s |")
    for tokens, measured in ((options.tokens, report), (options.compute_tokens, many)):
        print(
            f"| {tokens} tokens, all layers: predicted from these rates, measured | {planned[tokens]:.1f} s, "
            f"{measured['walk_seconds']:.1f} s |"
        )


def start(model: Path, out: Path, tokens: int, layers: int, memory: str) -> subprocess.Popen[str]:
    drop_cache(model)
    command = [sys.executable, "-m", "slicer.benchmarks.rivals.streaming", "--memory", memory, "--worker"]
    return subprocess.Popen(
        [*command, str(model), str(out), str(tokens), str(layers)], stdout=subprocess.PIPE, text=True
    )


def work(model: Path, out: Path, tokens: int, layers: int, memory: str) -> dict[str, float]:
    """The walk itself, in its own process; prints the result as one line of JSON."""
    import torch

    from slicer.measure.distances import distance_tables
    from slicer.measure.recorder import Portion, record
    from slicer.model.walk import Walk
    from slicer.plan.amounts import parse_size
    from slicer.progress import Progress

    class Watch(Progress):
        """Records where the run began and when the walk ended."""

        first, seconds, begun = 0, 0.0, 0.0

        def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
            self.begun = time.perf_counter()

        def advance(self, amount: int = 1) -> None:
            if amount > 1:
                self.first = amount
            self.seconds = time.perf_counter() - self.begun

    out.mkdir(parents=True, exist_ok=True)
    anonymous, done = [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            anonymous.append(memory_of("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    watch = Watch()
    walk = Walk.out_of_core(model, device="cpu", memory_bytes=parse_size(memory, "--memory"))
    batch = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    if out.name == "busy":  # only measures the speed of computing
        states = walk.start([batch])
        spent = 0.0
        for i in range(layers):
            with walk.layer(i):
                started = time.perf_counter()
                walk.advance(i, states)
                spent += time.perf_counter() - started
        return {"advance_seconds": spent}
    began = time.perf_counter()
    portion = Portion.of([batch])
    found = record(walk, portion, out, positions=16, points=16, resumable=True, progress=watch)
    walked = time.perf_counter() - began
    distance_tables(found, portion, Progress())
    done.set()
    sampler.join()
    return {"walk_seconds": walked, "first": watch.first, "peak": memory_of("VmHWM"), "anonymous": max(anonymous)}


def memory_of(field: str) -> float:
    """GiB of this process in /proc. (getrusage would include the parent's memory at the fork.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**20


def write(path: Path, layers: int) -> None:
    """Write a Llama checkpoint with the 13B model's shapes, one file per layer, with random weights."""
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    noise = torch.randn(INTERMEDIATE * HIDDEN, generator=torch.Generator().manual_seed(0)) * 0.02
    noise = noise.to(torch.bfloat16)
    index: dict[str, str] = {}

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for at, (key, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            tensors[key] = (
                torch.ones(shape, dtype=torch.bfloat16)
                if len(shape) == 1
                else noise.roll(at * 977 + len(index))[torch.arange(count) % len(noise)].view(shape)
                if count > len(noise)
                else noise.roll(at * 977 + len(index))[:count].clone().view(shape)
            )
            index[key] = name
        save_file(tensors, path / name, metadata={"format": "pt"})
        print(f"\rwriting {name}", end="", file=sys.stderr)

    square, up, down = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    for i in range(layers):
        own = f"model.layers.{i}."
        save(
            f"layer-{i:03d}.safetensors",
            {
                f"{own}input_layernorm.weight": (HIDDEN,),
                **{f"{own}self_attn.{p}_proj.weight": square for p in "qkvo"},
                f"{own}post_attention_layernorm.weight": (HIDDEN,),
                f"{own}mlp.gate_proj.weight": up,
                f"{own}mlp.up_proj.weight": up,
                f"{own}mlp.down_proj.weight": down,
            },
        )
    table = (VOCABULARY, HIDDEN)
    save(
        "outside.safetensors",
        {"model.embed_tokens.weight": table, "model.norm.weight": (HIDDEN,), "lm_head.weight": table},
    )
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    os.sync()
    print(file=sys.stderr)


def drop_cache(path: Path) -> None:
    """Drop the files from the page cache, so that they are read from disk."""
    for file in path.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(path: Path, most: int = 10) -> float:
    """MB/s of reading the first `most` layer files in order."""
    drop_cache(path)
    buffer = bytearray(16 << 20)
    total, started = 0, time.perf_counter()
    for file in sorted(path.glob("layer-*.safetensors"))[:most]:
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started) / 1e6


if __name__ == "__main__":
    main()
