"""Benchmark of export against `cp` and mergekit: the same cut of the same synthetic checkpoint, in the same run.

    python -m slicer.benchmarks.rivals.export [--directory DIR] [--rounds 5] [--mergekit PYTHON]

Writes a Llama of 12 layers and 5.4 GB in bfloat16 in shards of 1 GB, and drops layers 4-7 with:

    export    slicer's export alone, in a process that has done its imports (wall time and growth of resident memory)
    convert   the whole command, `slicer convert --drop 4-7 --verify none`, from a cold start
    cp        `cp -r` of the output of export: the same bytes to the same disk
    mergekit  the whole command, `mergekit-yaml` with a passthrough of layers 0-3 and 8-11

Runs in rounds, each in another seeded order, after flushing everything to disk. The first round is a warm-up and is not
counted: a disk is slow for a while after the source was written to it. The source is in the page cache, or with --cold
dropped from it. Without --mergekit, the first run makes a virtual environment with mergekit 0.1.5 under --directory.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path

from slicer.benchmarks.page import markdown_table
from slicer.benchmarks.process import memory_of, run_module
from slicer.benchmarks.script import drop_cache, in_rounds, options, write_llama

MERGEKIT = "mergekit==0.1.5"


def main() -> None:
    parser = options(__doc__, rounds=5, without_mergekit=False)
    parser.add_argument("--directory", type=Path, help="directory with 20 GB of space; kept for later runs")
    parser.add_argument("--mergekit", metavar="PYTHON", help="Python interpreter of an environment with mergekit")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache each time")
    given = parser.parse_args()
    if given.worker:
        how, *words = given.worker
        print(json.dumps(run_export(*map(Path, words)) if how == "export" else run_command(words)))
        return
    with tempfile.TemporaryDirectory(prefix="slicer-benchmark-") as scratch:
        directory = (given.directory or Path(scratch)).resolve()
        mergekit = None if given.without_mergekit else mergekit_python(directory, given.mergekit)
        compare(directory, given.rounds, given.cold, mergekit)


def compare(directory: Path, rounds: int, cold: bool, mergekit: Path | None) -> None:
    source, kept, target = (directory / name for name in ("source", "kept", "written"))
    for path in (kept, target):
        shutil.rmtree(path, ignore_errors=True)
    if not source.exists():
        write_llama(source, "1GB", num_hidden_layers=12)
    recipe = directory / "passthrough.yaml"
    layers = "".join(f"- sources: [{{model: {source}, layer_range: [{a}, {b}]}}]\n" for a, b in ((0, 4), (8, 12)))
    recipe.write_text(f"merge_method: passthrough\ndtype: bfloat16\nslices:\n{layers}")
    slicer = Path(sys.executable).with_name("slicer")
    commands: dict[str, tuple[object, ...]] = {
        "export": ("export", source, target),
        "convert": ("command", slicer, "convert", source, "--drop", "4-7", "--verify", "none", "-o", target),
        "cp": ("command", "cp", "-r", kept, target),
    }
    if mergekit:
        theirs = mergekit.with_name("mergekit-yaml")
        commands["mergekit"] = ("command", theirs, recipe, target, "--no-copy-tokenizer")

    def compete(name: str) -> dict[str, float]:
        prepare(kept if name == "cp" else source, cold)
        found = run_module(name, "rivals.export", "--worker", *commands[name])
        shutil.rmtree(target)
        return found

    run_module("export", "rivals.export", "--worker", "export", source, kept)  # what cp copies
    found = in_rounds({name: partial(compete, name) for name in commands}, rounds)
    total, written = (sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (source, kept))
    shutil.rmtree(kept)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    state = "from the disk" if cold else "from the page cache"
    print(f"{total / 1e9:.2f} GB in ({state}), {written / 1e9:.2f} GB out, {rounds} rounds, medians (all rounds)\n")
    rows = []
    for name, value in median.items():
        held = f"{statistics.median(run['bytes'] for run in found[name]) / 1e6:,.0f} MB"
        every = ", ".join(f"{number:.2f}" for number in seconds[name])
        memory = f"{held} {'of growth' if name == 'export' else 'at most'}"
        rows.append([name, f"{value:.2f} ({every})", f"{value / median['cp']:.2f} x", memory])
    print(*markdown_table(["", "seconds", "relative to cp", "memory"], rows), sep="\n")
    if mergekit:
        ratio = median["mergekit"] / median["convert"]
        print(f"\nmergekit takes {ratio:.1f} x as long as slicer convert, command against command,")
        print(f"and {median['mergekit'] / median['export']:.1f} x as long as the export itself")


def run_export(source: Path, target: Path) -> dict[str, float]:
    """The export alone, after its imports: seconds, and growth of resident memory in bytes."""
    from transformers import AutoConfig

    from slicer.checkpoint.config import sliced_config
    from slicer.checkpoint.export import sliced, write
    from slicer.checkpoint.reader import Checkpoint
    from slicer.plan.plan import Plan

    AutoConfig.from_pretrained(source).to_dict()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = memory_of("VmRSS")
    started = time.perf_counter()
    checkpoint = Checkpoint.open(source)
    plan = Plan.dropping(checkpoint.depth, range(4, 8))
    target.mkdir()
    write(sliced(checkpoint, plan, sliced_config(checkpoint, plan)), target)
    return {"seconds": time.perf_counter() - started, "bytes": memory_of("VmHWM") - before}


def run_command(command: list[str]) -> dict[str, float]:
    """A command: seconds, and the peak resident memory of it and its children in bytes."""
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}


def prepare(path: Path, cold: bool) -> None:
    """Flush to disk; then read the files of `path` into the page cache, or drop them from it."""
    os.sync()
    if cold:
        drop_cache(path)
        return
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as stream:
            while stream.read(1 << 24):
                pass


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


if __name__ == "__main__":
    main()
