"""Checks slicer on one GPU in a few minutes: speed against plain rivals, streamed against loaded, memory by formula.

    python -m slicer.benchmarks.gpu [--output-dir gpu] [--device auto] [--minutes 8] [--sizes 1b,8b] [--tiny]

Needs no network, no data, and only the libraries that run models: torch, transformers, accelerate, safetensors and
matplotlib; to train, peft and bitsandbytes. Writes checkpoints of random weights into the output directory and deletes
them afterwards: 30 GB for `8b`. Every line says PASS, FAIL or SKIP; `gpu.json` and `gpu.md` are written anew after
each. Each phase has a process of its own: one that fails or dies does not end the others. What exceeds --minutes is
skipped. --tiny takes tiny shapes, for a CPU. Exits with 1 if a line is FAIL, or none is PASS.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slicer.benchmarks import machine
from slicer.benchmarks.lines import LINEAR, fit
from slicer.benchmarks.page import markdown_table
from slicer.benchmarks.process import Peak, memory_of, seconds_of
from slicer.benchmarks.script import options, read_plainly, write_llama
from slicer.benchmarks.transformers_engine import generate
from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.export import copy_companions
from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.data.calibration import token_batches
from slicer.data.sources import TextSpec
from slicer.errors import BenchError, HealError, UsageError
from slicer.heal.finetune.memory import ModelShape
from slicer.heal.finetune.model import require
from slicer.jobs.analyze import analyze
from slicer.jobs.convert import convert
from slicer.jobs.request import AnalyzeRequest, Compensation, ConvertRequest, Output, Text
from slicer.model.load import load_model
from slicer.model.pruned import shortened
from slicer.plan.amounts import Goal, parse_amount
from slicer.plan.plan import METRIC, Plan
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.files import write_atomically
from slicer.runtime.versions import versions

PHASES = ("write", "depth", "analyze", "convert", "train lora", "train qlora")  # of each size: methods of `Bench`
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")  # and 32 heads, 8 of keys
SHAPES = {"tiny": (128, 320, 8, 4096), "1b": (2048, 8192, 16, 128256), "8b": (4096, 14336, 32, 128256)}
VERDICTS = {True: "PASS", False: "FAIL", None: "SKIP"}
TEXT = DEMO.parent / "heldout.txt"  # of the embedded model, whose tokenizer all models here have
ROUNDS = 5
SAME = 1e-4  # nats a token, or units of pi, between loaded and streamed
MORE_TIME, MORE_SECONDS = 1.5, 2.0  # than the rival: a factor, and what files, figures and first calls take
STREAMED_TIME = 2.5  # of a streamed conversion, in times of the loaded one
TRAINING_SPEED, TINY_SPEED = 0.85, 0.5  # of the bare loop; what a step takes beside the model is most of a tiny one
MORE_MEMORY = 1.25  # than the formula
LIBRARIES = {"cuda": 1e8, "cpu": 5e8}  # bytes that no formula counts: workspaces of cuBLAS; what the host imports
# Each phase is a fork of a process that has imported the jobs and not used CUDA, which a fork could not share.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["slicer.jobs.analyze", "slicer.jobs.convert"])


class Line(NamedTuple):
    """One result: whether it passed (None: skipped); what was found, or the reason; all figures, for gpu.json."""

    passed: bool | None
    what: str
    figure: str
    data: dict[str, Any] = {}


def main() -> None:
    parser = options(__doc__, output_dir=Path("gpu"), device="auto", minutes=8.0, sizes="1b,8b", tiny=False)
    given = parser.parse_args()
    sizes = ["tiny"] if given.tiny else given.sizes.split(",")
    if strange := sorted({*sizes} - {*SHAPES}):
        parser.error(f"--sizes {strange[0]}: choose from {', '.join(SHAPES)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that "auto" means the CPU everywhere
    try:
        device = Compute(given.device).torch_device()
    except UsageError as error:
        parser.error(str(error))
    deadline = time.monotonic() + 60 * given.minutes
    given.output_dir.mkdir(parents=True, exist_ok=True)
    about = {**machine.describe(), **versions("accelerate", "peft", "bitsandbytes")}
    report: dict[str, Any] = {"options": " ".join(sys.argv[1:]), "about": about, "lines": []}
    with tempfile.TemporaryDirectory(prefix="models-", dir=given.output_dir, ignore_cleanup_errors=True) as scratch:
        for phase, size in [("demo", "demo"), ("convert", "demo"), *((p, size) for size in sizes for p in PHASES)]:
            name, began = f"{phase} {size}", time.monotonic()
            for line in lines(Bench(Path(scratch), size, device), phase, deadline):
                told = {"phase": name, "verdict": VERDICTS[line.passed], **line._asdict()}
                report["lines"].append({**told, "seconds": round(time.monotonic() - began, 1)})
                print("{verdict}  {phase}: {what}: {figure}".format(**told), flush=True)
                save(report, given.output_dir)
    verdicts = [line["verdict"] for line in report["lines"]]
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS.values()))
    sys.exit("FAIL" in verdicts or "PASS" not in verdicts)


def save(report: dict[str, Any], directory: Path) -> None:
    """Write gpu.json and gpu.md; seconds are those since the phase began."""
    columns = ["phase", "verdict", "what", "figure", "seconds"]
    rows = [[str(line[column]) for column in columns] for line in report["lines"]]
    about = "; ".join(f"{name} {value}" for name, value in report["about"].items())
    page = [f"# slicer.benchmarks.gpu {report['options']}", "", about, "", *markdown_table(columns, rows)]
    write_atomically(directory / "gpu.md", "\n".join(page) + "\n")
    write_atomically(directory / "gpu.json", json.dumps(report, indent=1) + "\n")


def lines(bench: Bench, phase: str, deadline: float) -> Iterator[Line]:
    """The lines of one phase, from a process that is killed at `deadline` (of `time.monotonic`, in seconds)."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    child = PROCESSES.Process(target=work, args=(bench, phase, sender))
    child.start()
    sender.close()  # of this process: the pipe ends with the child
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            yield receiver.recv()
        yield Line(None, "stopped", "the time is over")
    except EOFError:
        child.join()
        if child.exitcode:
            yield Line(False, "stopped", f"its process ended with {child.exitcode}")
    finally:
        child.kill()
        child.join()


def work(bench: Bench, phase: str, sender: Connection) -> None:
    """Run a phase in this process, and send its lines; the last one says so if it ends with an error."""
    try:
        if bench.device.index is not None:
            torch.cuda.set_device(bench.device)  # "auto" means this one
        method, *arguments = phase.split()
        for line in getattr(bench, method)(*arguments):
            sender.send(line)
    except Exception as error:  # whatever it is, the other phases go on
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        sender.send(Line(False, "ended with an error", reason, {"traceback": traceback.format_exc()}))


class Clock(Progress):
    """Seconds of the stages of a job that have ended, and its notes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self._stage, self._began = "Starting", time.perf_counter()

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        last, began, self._stage, self._began = self._stage, self._began, text, time.perf_counter()
        self.seconds[last] = self.seconds.get(last, 0.0) + self._began - began

    def note(self, text: str) -> None:
        self.notes.append(text)


class Bench:
    """The phases. `size` is a key of `SHAPES`, or "demo", the embedded model; a large one takes seconds on the text."""

    def __init__(self, scratch: Path, size: str, device: torch.device) -> None:
        self.scratch, self.size, self.device = scratch, size, device
        self.path = DEMO if size == "demo" else scratch / size
        self.small = size in ("demo", "tiny")
        self.text = TextSpec(str(TEXT), samples=16, seq_len=64 if self.small else 512, batch_size=2)

    def demo(self) -> Iterator[Line]:
        """What `slicer demo` converts: the embedded model, on its own samples."""
        text, output = Text("self", samples=64, seq_len=128), Output(self.scratch / "demo-9L")
        fold, goal = Compensation("fold"), Goal(drop=parse_amount("3"))
        written = convert(ConvertRequest("demo", goal, compensation=fold, text=text, output=output))
        yield falls("default fold", written.plan, {})
        yield Line(written.verified == "logits", "verified by its logits", f"error {written.logits_error or 0:.1e}")

    def write(self) -> Iterator[Line]:
        """The checkpoint with random weights, one file a layer."""
        shape, began = dict(zip(_FIELDS, SHAPES[self.size], strict=True)), time.perf_counter()
        write_llama(self.path, num_key_value_heads=8, bos_token_id=0, eos_token_id=1, **shape)
        copy_companions(DEMO, self.path)
        figure = f"{Checkpoint.open(self.path).total_bytes / 1e6:,.0f} MB in {time.perf_counter() - began:.1f} s"
        yield Line(True, "written with random weights", figure)

    def depth(self) -> Iterator[Line]:
        """Prefill and decoding on plain transformers against the number of layers."""
        model, checkpoint = load_model(self.path), Checkpoint.open(self.path)
        depth, prompt = checkpoint.depth, token_batches(self.text, self.path, model).batches[0][:1].tolist()
        times: dict[str, dict[int, float]] = {"ttft_ms": {}, "tpot_ms": {}}
        for layers in [depth * quarter // 4 for quarter in (4, 3, 2, 1)] * (4 * ROUNDS if self.small else ROUNDS):
            plan = Plan(depth, tuple(range(layers)))
            with shortened(model, plan, sliced_config(checkpoint, plan)):
                run = generate(model, self.device, 8 if self.small else 32, prompt)
            for key, fastest in times.items():
                fastest[layers] = min(fastest.get(layers, math.inf), run[key][0])
        for name, ms, tokens in zip(("prefill", "decode"), times.values(), (self.text.seq_len, 1), strict=True):
            line = fit(list(ms), list(ms.values()))
            speed, gained = (1000 * tokens / line(depth - gone) for gone in (0, 1))
            figure = f"R2 {line.r2:.4f}, {line.slope:.3g} ms a layer, {line.intercept:.3g} ms fixed; "
            figure += f"{speed:,.4g} tokens/s, and {gained - speed:.3g} more without a layer"
            yield Line(line.r2 >= LINEAR and line.slope > 0, f"{name} is linear in the layers", figure, {"ms": ms})

    def analyze(self) -> Iterator[Line]:
        """`slicer analyze`, loaded against a bare forward pass, and streamed against plain reading too."""
        model: Any = load_model(self.path)
        text = token_batches(self.text, self.path, model).batches
        with torch.inference_mode():
            once = partial(seconds_of, lambda: [model.base_model(b.to(self.device), use_cache=False) for b in text])
            bare, model, tables = min(once(self.device) for _ in range(ROUNDS)), None, []
        reading = Checkpoint.open(self.path).total_bytes / (1e6 * read_plainly(self.path))
        for way, rival, least in (("loaded", "bare forward pass", bare), ("streamed", "plain reading", reading)):
            out = self.scratch / f"analysis-{self.size}-{way}"
            request = AnalyzeRequest(str(self.path), out, text=Text.of(self.text), compute=self.compute(way))
            found, data = self.measured(way, partial(analyze, request))
            tables.append(found.metrics[METRIC].mean)
            seconds, most = data["stages"]["Measuring layers"], MORE_TIME * max(bare, least) + MORE_SECONDS
            yield Line(seconds <= most, f"{way}, against {rival}", f"{seconds:.2f} s; {rival} {least:.2f} s", data)
        apart = max(abs(a - b) for n, row in tables[0].items() for a, b in zip(row, tables[1][n], strict=True))
        yield Line(apart <= SAME, "streamed, the same distances as loaded", f"{apart:.1e} apart at most")

    def convert(self) -> Iterator[Line]:
        """A quarter of the layers dropped with the default fold; what is streamed must equal what is loaded."""
        found, goal, out = [], Goal(drop=parse_amount("0.25")), self.scratch / f"converted-{self.size}"
        for way in ("loaded", "streamed"):
            text, compute = Text.of(self.text), self.compute(way)
            given = {"text": text, "output": Output(out), "compute": compute}
            request = ConvertRequest(str(self.path), goal, compensation=Compensation("fold"), **given)
            written, data = self.measured(way, partial(convert, request))
            shutil.rmtree(out)  # the disk may be too small for both
            yield falls(way, written.plan, data)
            formula = conversion_bytes(Checkpoint.open(self.path), self.text, streamed=way == "streamed")
            yield self.within(way, data["peak_bytes"], formula)
            found.append(data)
        (loaded, streamed), (before, seconds) = found, (data["seconds"] for data in found)
        most = STREAMED_TIME * before + MORE_SECONDS
        yield Line(seconds <= most, "streamed, time against loaded", f"{seconds:.1f} s; loaded {before:.1f} s")
        differ = len({*loaded["changed"]} ^ {*streamed["changed"]})
        yield Line(differ == 0, "streamed, the same layers kept and tensors changed", f"{differ} differ")
        apart = abs(loaded["loss"]["after"] - streamed["loss"]["after"])
        yield Line(apart <= SAME, "streamed, the same distance from the source", f"{apart:.1e} nats apart")

    def train(self, method: str) -> Iterator[Line]:
        """Steps of LoRA, on the stored or on NF4 weights, against a bare peft loop on the same batches."""
        try:
            require(method)
            from slicer.benchmarks.rivals import training
        except (HealError, ModuleNotFoundError) as error:
            yield Line(None, "against a bare peft loop", str(error))
            return
        given = argparse.Namespace(
            model=self.path, calibration=str(TEXT), method=method, rank=8, compute="auto",
            batch_size=2 if self.small else 4, steps=6 if self.small else 50, seq_len=self.text.seq_len,
            gradient_checkpointing=False,
        )  # fmt: skip
        found = {}
        for way in training.WAYS:
            memory.release()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found[way] = training.run(given, way, self.scratch / f"{method}-{self.size}")
        mine, bare = (found[way]["tokens_per_second"] for way in ("slicer", "bare"))
        figure = f"{mine:,.0f} tokens/s, {mine / bare:.2f} x the bare loop"
        least = (TINY_SPEED if self.small else TRAINING_SPEED) * bare
        yield Line(mine >= least, f"{given.steps} steps against a bare peft loop", figure, found)
        yield self.within(method, 1e9 * found["slicer"]["taken_gb"], 1e9 * found["slicer"]["formula_gb"])

    def compute(self, way: str) -> Compute:
        """As much memory as there is; or for "streamed", too little to load the model where it would be."""
        limit = "device_memory" if self.device.type == "cuda" else "memory"
        below: dict[str, Any] = {limit: int(0.95 * memory.OVERHEAD * Checkpoint.open(self.path).total_bytes)}
        return Compute(**below) if way == "streamed" else Compute()

    def measured(self, way: str, job: Callable[[Progress], Any]) -> tuple[Any, dict[str, Any]]:
        """The result of a job; its seconds, notes and peak bytes, of the GPU or of the host beyond those before. Raises
        BenchError where the model was not held in this `way`."""
        memory.release()
        on_gpu, clock = self.device.type == "cuda", Clock()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with Peak(lambda: memory_of("RssAnon")) as host:
            result = job(clock)
        clock.stage("")  # ends the last one
        if any("from disk one at a time" in note for note in clock.notes) != (way == "streamed"):
            raise BenchError(f"the model was not {way}: nothing to compare; choose another size with --sizes")
        peak = torch.cuda.max_memory_allocated() if on_gpu else host.most - host.before
        seconds = {"seconds": sum(clock.seconds.values()), "stages": clock.seconds}
        return result, {**seconds, "notes": clock.notes, "peak_bytes": peak}

    def within(self, what: str, peak: float, formula: float) -> Line:
        """Whether peak bytes obey the formula."""
        figure = f"{peak / 1e6:,.0f} MB, {formula / 1e6:,.0f} MB by the formula"
        return Line(peak <= MORE_MEMORY * formula + LIBRARIES[self.device.type], f"{what}, peak memory", figure)


def falls(what: str, plan: Plan, data: dict[str, Any]) -> Line:
    """Whether the fold comes closer to the source, by KL in nats a token on other documents of the text it was fitted
    on. Adds this, and what the plan changes, to `data`."""
    assert plan.healing is not None
    kind = plan.healing.kinds[0]
    data |= {"loss": {"before": kind.before, "after": kind.after}, "changed": [*plan.kept, *plan.healing.tensors]}
    figure = f"KL {kind.before:.4f} to {kind.after:.4f} on {kind.kind}"
    return Line(kind.after < kind.before, f"{what}, the fold comes closer to the source", figure, data)


def conversion_bytes(checkpoint: Checkpoint, text: TextSpec, *, streamed: bool) -> float:
    """Peak bytes of a conversion on its device, by formula.

    Weights as stored: all, or streamed two layers and what lies outside. A 16-bit model computes in float32, one layer
    at a time: a copy of that layer, and of what lies outside. Three states of each token, 4 d each; the logits of a
    sequence, 12 v a token; and the larger of two solves: least squares, 8 (f^2 + 3 d f), and a second-order step of
    one layer, with factors and gradients 4 (f^2 + 3 d f) + 16 d^2 and the activations of a batch, 4 (12 d + 5 f) a
    token.
    """
    shape, width = ModelShape.of(checkpoint.config), checkpoint.total_bytes / checkpoint.parameters
    d, f, layer = shape.d, shape.f, shape.in_layers / shape.layers
    weights = width * (shape.outside + 2 * layer) if streamed else checkpoint.total_bytes
    copies = 4 * (shape.outside + layer) if width < 4 else 0
    states = 12 * d * text.samples * text.seq_len + 12 * shape.v * text.seq_len
    square, batch = f * f + 3 * d * f, text.batch_size * text.seq_len
    solves = 8 * square, 4 * square + 16 * d * d + 4 * (12 * d + 5 * f) * batch
    return float(weights + copies + states + max(solves))


if __name__ == "__main__":
    main()
