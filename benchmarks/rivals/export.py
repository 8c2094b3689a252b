"""Benchmark of export against `cp` and mergekit: the same cut of the same synthetic checkpoint, in the same run.

    python -m slicer.benchmarks.rivals.export [--directory DIR] [--rounds 5] [--mergekit PYTHON]

Writes a Llama of 12 layers and 5.4 GB in bfloat16 in shards of 1 GB, and drops layers 4-7 with:

    export    slicer's `export`, in a process that has done its imports (wall time and growth of resident memory)
    convert   the whole command, `slicer convert --drop 4-7 --verify none`, from a cold start
    cp        `cp -r` of the output of export: the same bytes to the same disk
    mergekit  the whole command, `mergekit-yaml` with a passthrough of layers 0-3 and 8-11

Runs in rounds, each in another seeded order, after flushing everything to disk. The first round is a warm-up and is not
counted: a disk is slow for a while after the source was written to it. The source is in the page cache (or, with
    --cold,
dropped from it). Without --mergekit, the first run makes a virtual environment with mergekit 0.1.5 under --directory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

LAYERS, HIDDEN, INNER, VOCABULARY = 12, 4096, 11008, 32000
DROPPED = "4-7"
SHARD_BYTES = 10**9
MERGEKIT = "mergekit==0.1.5"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
}  # fmt: skip
# The export alone, after its imports: seconds, and growth of resident memory in bytes.
INNER_EXPORT = """
import json, sys, time
from pathlib import Path
from transformers import AutoConfig
from slicer import Checkpoint, Plan, export
AutoConfig.from_pretrained(sys.argv[1]).to_dict()

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
before = resident("VmRSS")
started = time.perf_counter()
checkpoint = Checkpoint.open(Path(sys.argv[1]))
export(checkpoint, Plan.dropping(checkpoint.depth, range(4, 8)), Path(sys.argv[2]))
print(json.dumps([time.perf_counter() - started, resident("VmHWM") - before]))
"""
# Runs a command: seconds, and the peak resident memory of it and its children in bytes.
WATCH = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
if done.returncode: sys.exit(done.stderr[-2000:])
print(json.dumps([time.perf_counter() - started, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def make_checkpoint(path: Path) -> None:
    """Write random bfloat16 weights in shards, one tensor at a time."""
    import torch
    from safetensors.torch import save_file

    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        shapes |= {f"{prefix}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{prefix}mlp.{x}_proj.weight": (INNER, HIDDEN) for x in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{prefix}{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shards: list[list[str]] = [[]]
    filled = 0
    for key, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        if filled + size > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    total = 0
    for name, keys in zip(names, shards, strict=True):
        tensors = {k: torch.randn(shapes[k], generator=generator).mul_(0.02).bfloat16() for k in keys}
        total += sum(2 * t.numel() for t in tensors.values())
        save_file(tensors, path / name, metadata={"format": "pt"})
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(CONFIG))


def prepare(path: Path, cold: bool) -> None:
    """Flush to disk; then read the files of `path` into the page cache, or drop them from it."""
    os.sync()
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as stream:
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(1 << 24):
                    pass


def run(code: str, *arguments: object) -> list[float]:
    """Run Python code that prints a JSON list of numbers, and return it."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed: {done.stderr}")
    return list(json.loads(done.stdout))


def mergekit_python(directory: Path, given: str | None) -> Path:
    if given:
        return Path(given)
    environment = directory / "mergekit-environment"
    if not environment.exists():
        print(f"installing {MERGEKIT} in {environment}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [environment / "bin" / "pip", "install", "-q"]
        # the installed torch version: the newest one would bring gigabytes of CUDA that are not needed
        subprocess.run([*pip, f"torch=={metadata.version('torch')}"], check=False)
        subprocess.run([*pip, MERGEKIT], check=True)
    return environment / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="directory with 20 GB of space; kept for later runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", metavar="PYTHON", help="Python interpreter of an environment with mergekit")
    parser.add_argument("--without-mergekit", action="store_true")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache each time")
    options = parser.parse_args()
    scratch = None if options.directory else tempfile.TemporaryDirectory(prefix="slicer-benchmark-")
    directory = (options.directory or Path(scratch.name if scratch else "")).resolve()
    source, kept, target = (directory / name for name in ("source", "kept", "written"))
    for path in (kept, target):
        shutil.rmtree(path, ignore_errors=True)
    if not source.exists():
        print("writing the synthetic checkpoint", file=sys.stderr)
        make_checkpoint(source)
    mergekit = None if options.without_mergekit else mergekit_python(directory, options.mergekit)
    recipe = directory / "passthrough.yaml"
    layers = "".join(f"- sources: [{{model: {source}, layer_range: [{a}, {b}]}}]\n" for a, b in ((0, 4), (8, 12)))
    recipe.write_text(f"merge_method: passthrough\ndtype: bfloat16\nslices:\n{layers}")
    slicer = str(Path(sys.executable).with_name("slicer"))
    convert = [slicer, "convert", source, "--drop", DROPPED, "--verify", "none", "-o", target]
    run(INNER_EXPORT, source, kept)  # what cp copies
    contestants: dict[str, tuple[Path, Callable[[], list[float]]]] = {
        "export": (source, lambda: run(INNER_EXPORT, source, target)),
        "convert": (source, lambda: run(WATCH, *convert)),
        "cp": (kept, lambda: run(WATCH, "cp", "-r", kept, target)),
    }
    if mergekit:
        theirs = [mergekit.with_name("mergekit-yaml"), recipe, target, "--no-copy-tokenizer"]
        contestants["mergekit"] = (source, lambda: run(WATCH, *theirs))
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    memory: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(options.rounds + 1):
        print(f"round {number} of {options.rounds}" if number else "warming up", file=sys.stderr)
        for name in random.Random(number).sample(names, len(names)):
            reads, compete = contestants[name]
            prepare(reads, options.cold)
            seconds, held = compete()
            shutil.rmtree(target)
            if number:
                figures[name].append(seconds)
                memory[name].append(held)
    total, written = (sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (source, kept))
    median = {name: statistics.median(values) for name, values in figures.items()}
    state = "from the disk" if options.cold else "from the page cache"
    print(
        f"{total / 1e9:.2f} GB in ({state}), {written / 1e9:.2f} GB out, {options.rounds} rounds, "
        "medians (all rounds)\n"
    )
    print("| | seconds | relative to cp | memory |\n|---|---|---|---|")
    for name, value in median.items():
        rounds = ", ".join(f"{seconds:.2f}" for seconds in figures[name])
        held = f"{statistics.median(memory[name]) / 1e6:,.0f} MB"
        grown = " of growth" if name == "export" else " at most"
        print(f"| {name} | {value:.2f} ({rounds}) | {value / median['cp']:.2f} x | {held}{grown} |")
    if mergekit:
        ratio = median["mergekit"] / median["convert"]
        print(f"\nmergekit takes {ratio:.1f} x as long as slicer convert, command against command,")
        print(f"and {median['mergekit'] / median['export']:.1f} x as long as the export itself")
    shutil.rmtree(kept)
    if scratch:
        scratch.cleanup()


if __name__ == "__main__":
    main()
