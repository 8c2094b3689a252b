"""The phases of `slicer.benchmarks.gpu`: each measures one thing, gives lines with a verdict, and keeps its figures.

Speed is compared with a rival in the same process, what is streamed with what is loaded, peak memory with a formula.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from slicer.benchmarks.lines import LINEAR, fit
from slicer.benchmarks.process import Peak, memory_of, seconds_of
from slicer.benchmarks.rivals import training
from slicer.benchmarks.script import read_plainly, write_llama
from slicer.benchmarks.transformers_engine import generate
from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.export import copy_companions
from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.data.calibration import token_batches
from slicer.data.sources import TextSpec
from slicer.errors import BenchError, HealError
from slicer.heal.finetune.memory import ModelShape
from slicer.heal.finetune.model import require
from slicer.jobs.analyze import analyze
from slicer.jobs.convert import convert
from slicer.jobs.request import AnalyzeRequest, ConvertRequest, Output, Text
from slicer.model.load import load_model
from slicer.model.pruned import shortened
from slicer.plan.amounts import Goal, parse_amount
from slicer.plan.plan import METRIC, Plan
from slicer.plan.records import Losses
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.compute import Compute

T = TypeVar("T")
TEXT = DEMO.parent / "heldout.txt"  # of the embedded model, whose tokenizer all models here have
# d, f, layers, heads, heads of keys and values, vocabulary
SHAPES = {
    "tiny": (64, 160, 8, 4, 2, 4096),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
ROUNDS = 5
SAME = 1e-4  # nats a token, or units of pi, between loaded and streamed
MORE_TIME, MORE_SECONDS = 1.5, 2.0  # than the rival: a factor, and what files, figures and first calls take
STREAMED_TIME = 2.5  # of a streamed conversion, in times of the loaded one
MORE_MEMORY = 1.25  # than the formula
LIBRARIES = {"cuda": 1e8, "cpu": 5e8}  # bytes that no formula counts: workspaces of cuBLAS; what the host imports
TRAINING_SPEED = 0.85  # of the bare loop


class Line(NamedTuple):
    """One result: `verdict` is PASS, FAIL or SKIP; `figure` is what was found, or the reason."""

    verdict: str
    what: str
    figure: str


def check(what: str, passed: bool, figure: str) -> Line:
    """PASS or FAIL."""
    return Line("PASS" if passed else "FAIL", what, figure)


class Clock(Progress):
    """Seconds of every stage of a job, and its notes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self._stage, self._since = "", time.perf_counter()

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = text, now

    def note(self, text: str) -> None:
        self.notes.append(text)

    def check_way(self, way: str) -> None:
        """Raise BenchError where the memory decided otherwise than for `way`, "loaded" or "streamed"."""
        streamed = any("from disk one at a time" in note for note in self.notes)
        if streamed != (way == "streamed"):
            raise BenchError(f"the model was not {way}: nothing to compare; choose another size with --sizes")


@dataclass(frozen=True)
class Bench:
    """What the phases share: a directory, the device, whether all is tiny, and the figures of the phases before."""

    scratch: Path
    device: torch.device
    tiny: bool
    figures: dict[str, Any]

    def run(self, name: str) -> Iterator[Line]:
        """The lines of one phase. `name`: a method, the size of the model and what else the method takes."""
        method, *arguments = name.split()
        if method not in ("demo", "write") and not self.model(arguments[0]).exists():
            yield Line("SKIP", "not begun", "the checkpoint was not written")
            return
        yield from getattr(self, method)(*arguments)

    def model(self, size: str) -> Path:
        """The checkpoint of this size."""
        return DEMO if size == "demo" else self.scratch / size

    @property
    def text(self) -> TextSpec:
        """The calibration text: few tokens, so that a large model takes seconds."""
        return TextSpec(str(TEXT), samples=16, seq_len=64 if self.tiny else 512, batch_size=2)

    def compute(self, size: str, way: str) -> Compute:
        """As much memory as there is; or for "streamed", less than the weights, by every limit that there is."""
        below = int(0.9 * Checkpoint.open(self.model(size)).total_bytes)
        limits: dict[str, Any] = {f.name: below for f in fields(Compute) if f.name.endswith("memory")}
        return Compute(**limits) if way == "streamed" else Compute()

    def peak(self, work: Callable[[], T]) -> tuple[T, float]:
        """(result, peak bytes of the GPU, or of the host beyond what this process held before)."""
        memory.release()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return work(), float(torch.cuda.max_memory_allocated())
        with Peak(lambda: memory_of("RssAnon")) as seen:
            found = work()
        return found, float(max(0, seen.most - seen.before))

    def within(self, peak: float, formula: float) -> Line:
        """Whether a peak obeys the formula."""
        figure = f"{peak / 1e6:,.0f} MB, {formula / 1e6:,.0f} MB by the formula"
        most = MORE_MEMORY * formula + LIBRARIES[self.device.type]
        return check("peak memory against the formula", peak <= most, figure)

    def check_device(self) -> None:
        """Free what the last phase left; raises RuntimeError where an error of a kernel has made the GPU unusable."""
        memory.release()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def demo(self) -> Iterator[Line]:
        """What `slicer demo` converts: the embedded model, on its own samples."""
        text, output = Text("self", samples=64, seq_len=128), Output(self.scratch / "demo-9L")
        written = convert(ConvertRequest("demo", Goal(drop=parse_amount("3")), text=text, output=output))
        yield _falls(written.plan)
        yield check("verified by its logits", written.verified == "logits", f"error {written.logits_error or 0:.1e}")

    def write(self, size: str) -> Iterator[Line]:
        """The checkpoint with random weights, one file a layer."""
        path, started, (d, f, layers, heads, groups, vocabulary) = self.model(size), time.perf_counter(), SHAPES[size]
        write_llama(
            path, hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=groups, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        copy_companions(DEMO, path)
        seconds, written = time.perf_counter() - started, Checkpoint.open(path)
        figure = f"{written.parameters / 1e9:.2f} B parameters, {written.total_bytes / 1e6:,.0f} MB in {seconds:.1f} s"
        yield check("written with random weights", True, figure)

    def depth(self, size: str) -> Iterator[Line]:
        """Prefill and decoding on plain transformers against the layers; and the bare forward pass of the analysis."""
        path, spec = self.model(size), self.text
        model, checkpoint = load_model(path), Checkpoint.open(path)
        batches = token_batches(spec, path, model).batches

        def bare() -> None:
            with torch.inference_mode():
                for batch in batches:
                    model.base_model(input_ids=batch.to(self.device), use_cache=False)

        seconds = min([seconds_of(bare, self.device) for _ in range(ROUNDS + 1)][1:])  # the first one warms up
        self.figures[f"depth {size}"] = found = {"bare_seconds": seconds}
        yield check("bare forward pass", True, f"{spec.samples * spec.seq_len / seconds:,.0f} tokens/s")
        depth, prompt = checkpoint.depth, torch.cat(batches)[:1].tolist()
        times: dict[str, dict[int, float]] = {"ttft_ms": {}, "tpot_ms": {}}
        for _ in range(ROUNDS + 1):
            for layers in (depth * quarter // 4 for quarter in (4, 3, 2, 1)):
                plan = Plan(depth, tuple(range(layers)))
                with shortened(model, plan, sliced_config(checkpoint, plan)) if layers < depth else nullcontext():
                    run = generate(model, self.device, 8 if self.tiny else 32, prompt)
                for key, fastest in times.items():
                    fastest[layers] = min(fastest.get(layers, math.inf), run[key][0])
        for name, by_layers, tokens in zip(("prefill", "decode"), times.values(), (spec.seq_len, 1), strict=True):
            line = fit(list(by_layers), list(by_layers.values()))
            gain = 1000 * tokens / line(depth - 1) - 1000 * tokens / line(depth)
            found |= {f"{name}_ms": by_layers, f"{name}_r2": line.r2, f"{name}_tokens_per_second_a_layer": gain}
            figure = f"R2 {line.r2:.4f}, {line.slope:.3g} ms a layer, {line.intercept:.3g} ms fixed; "
            figure += f"{1000 * tokens / line(depth):,.4g} tokens/s, and {gain:.3g} more without a layer"
            yield check(f"{name} is linear in the layers", line.r2 >= LINEAR and line.slope > 0, figure)

    def analyze(self, size: str) -> Iterator[Line]:
        """`slicer analyze`, loaded against the bare forward pass, and streamed against plain reading too."""
        path, bare = self.model(size), self.figures[f"depth {size}"]["bare_seconds"]
        plain = Checkpoint.open(path).total_bytes / (1e6 * read_plainly(path))
        tables, self.figures[f"analyze {size}"] = [], (found := {"plain_reading_seconds": plain})
        for way, rival, least in (("loaded", "bare forward pass", bare), ("streamed", "plain reading", plain)):
            clock, out = Clock(), self.scratch / f"analysis-{size}-{way}"
            compute, text = self.compute(size, way), Text.of(self.text)
            analysis, peak = self.peak(
                partial(analyze, AnalyzeRequest(str(path), out, text=text, compute=compute), clock)
            )
            clock.check_way(way)
            assert analysis is not None  # there is only one process
            seconds = clock.seconds["Measuring layers"]
            found[way] = {"stages": clock.seconds, "peak_bytes": peak}
            tables.append(analysis.metrics[METRIC].mean)
            figure = f"{seconds:.2f} s; {rival} {least:.2f} s"
            yield check(f"{way}, against {rival}", seconds <= MORE_TIME * max(bare, least) + MORE_SECONDS, figure)
        apart = max(abs(a - b) for n, row in tables[0].items() for a, b in zip(row, tables[1][n], strict=True))
        yield check("streamed, the same distances as loaded", apart <= SAME, f"{apart:.1e} apart at most")

    def convert(self, size: str, way: str) -> Iterator[Line]:
        """A quarter of the layers dropped with the default fold; what is streamed must equal what is loaded."""
        clock, out, source = Clock(), self.scratch / "converted", self.model(size)
        request = ConvertRequest(
            str(source), Goal(drop=parse_amount("0.25")), text=Text.of(self.text), output=Output(out),
            compute=self.compute(size, way),
        )  # fmt: skip
        written, peak = self.peak(partial(convert, request, clock))
        clock.stage("")  # ends the last one
        shutil.rmtree(out)  # the disk may be too small for several
        clock.check_way(way)
        plan, seconds = written.plan, sum(clock.seconds.values())
        losses, tensors = (plan.healing.loss, plan.healing.tensors) if plan.healing else (Losses(), ())
        formula = conversion_bytes(Checkpoint.open(source), plan, self.text, streamed=way == "streamed")
        mine: dict[str, Any] = {
            "seconds": seconds, "stages": clock.seconds, "notes": clock.notes, "verified": written.verified,
            "peak_bytes": peak, "formula_bytes": formula, "loss": asdict(losses), "changed": [*plan.kept, *tensors],
        }  # fmt: skip
        self.figures[f"convert {size} {way}"] = mine
        yield _falls(plan)
        yield self.within(peak, formula)
        if way == "loaded":
            return
        loaded = self.figures.get(f"convert {size} loaded")
        if loaded is None:
            yield Line("SKIP", "the same as loaded", "the loaded conversion did not end")
            return
        figure = f"{seconds:.1f} s; loaded {loaded['seconds']:.1f} s"
        yield check("time against loaded", seconds <= STREAMED_TIME * loaded["seconds"] + MORE_SECONDS, figure)
        differ = len({*mine["changed"]} ^ {*loaded["changed"]})
        yield check("the same layers kept and tensors changed as loaded", differ == 0, f"{differ} differ")
        a, b = (math.nan if one["loss"]["after"] is None else one["loss"]["after"] for one in (mine, loaded))
        yield check("the same held-out loss as loaded", abs(a - b) <= SAME, f"{abs(a - b):.1e} nats apart")

    def train(self, size: str, method: str) -> Iterator[Line]:
        """Steps of LoRA on the stored or NF4 weights, against a bare peft loop on the same batches."""
        try:
            require(method)
        except HealError as error:
            yield Line("SKIP", "against a bare peft loop", str(error))
            return
        self.figures[f"train {size} {method}"] = found = {}
        given = argparse.Namespace(
            model=self.model(size), calibration=str(TEXT), method=method, rank=8, compute="auto", batch_size=2,
            steps=6 if self.tiny else 50, seq_len=self.text.seq_len, gradient_checkpointing=False,
        )  # fmt: skip
        for way in training.WAYS:
            found[way], _ = self.peak(partial(training.run, given, way, self.scratch / f"{method}-{size}"))
        mine, bare = found["slicer"], found["bare"]
        ratio = mine["tokens_per_second"] / bare["tokens_per_second"]
        figure = f"{mine['tokens_per_second']:,.0f} tokens/s, {ratio:.2f} x the bare loop"
        yield check(f"{given.steps} steps against a bare peft loop", ratio >= TRAINING_SPEED, figure)
        yield self.within(1e9 * mine["taken_gb"], 1e9 * mine["formula_gb"])


def _falls(plan: Plan) -> Line:
    """Whether the fold lowers the held-out loss, in nats a token."""
    losses = Losses() if plan.healing is None else plan.healing.loss
    figure = ", ".join(f"{name} {value:.4f}" for name, value in asdict(losses).items() if value is not None)
    return check("the fold lowers the held-out loss", losses.falls, figure or "not healed")


def conversion_bytes(checkpoint: Checkpoint, plan: Plan, text: TextSpec, *, streamed: bool) -> float:
    """Peak bytes of a conversion on its device, by formula.

    Weights: all, with a float32 copy if the fold was computed in it; streamed, two layers and what lies outside. Then
    three states of each token, the logits of a sequence, and the larger of the least-squares solve, 2.5 x 8 f^2, and
    the second-order steps: in each layer that steps (streamed: in one), the sums 4 (2 d f + d^2 + f^2) of the
    feed-forward and 16 d^2 of the attention output, and the activations of a batch.
    """
    shape, wide = ModelShape.of(checkpoint.config), plan.healing is not None and plan.healing.precision == "float32"
    d, f, width = shape.d, shape.f, 4 if wide else 2
    weights = 2 * (shape.outside + 2 * shape.in_layers / shape.layers) if streamed else checkpoint.total_bytes
    sums = 4 * (2 * d * f + d * d + f * f) + 16 * d * d
    activations = width * (12 * d + 5 * f) * text.batch_size * text.seq_len
    stepping = 1 if streamed else sum(i >= min(plan.dropped) - 2 for i in plan.kept)
    states = 3 * width * d * text.samples * text.seq_len
    logits = 12 * shape.v * text.seq_len
    return (3 if wide else 1) * weights + states + logits + max(20 * f * f, stepping * (sums + activations))
