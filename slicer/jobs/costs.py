"""What the stages of a command cost, from config and headers alone: FLOPs, bytes read, memory and disk.

FLOPs of a pass of T tokens through a layer of P parameters, of which sequences have s tokens: T (2 P + 4 s d). Going
back to its input costs as much again, and the gradients of its weights too. The head costs 2 d V a position. The fold
multiplies in float32 and solves in float64: for a map of f inputs f^3 / 3 + 2 d f^2 with each ridge strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from slicer.checkpoint.architectures.table import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS, text_config
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes, width
from slicer.checkpoint.tensors import DTYPE_BITS, DTYPES
from slicer.data.kinds import DOCUMENTS, SHIPPED, TOKENS
from slicer.data.packing import HELD_OUT
from slicer.data.sources import TextSpec
from slicer.heal.compensate.fold import BEFORE, working_bytes
from slicer.heal.compensate.gaps import gaps_of
from slicer.heal.compensate.newton import DRAWN, PARTS, STEPS
from slicer.heal.compensate.objective import LIKELY, SAMPLE, STRIDE
from slicer.heal.compensate.regression import TOGETHER
from slicer.heal.finetune.memory import ModelShape, needed
from slicer.heal.finetune.settings import TrainingSettings
from slicer.jobs.recipe import Recipe
from slicer.jobs.request import CANDIDATES, Measures
from slicer.plan.amounts import Goal
from slicer.plan.plan import Plan
from slicer.plan.records import SOLVERS
from slicer.runtime import memory
from slicer.runtime.compute import Compute
from slicer.runtime.distributed import sharded, world
from slicer.runtime.rates import Rates
from slicer.runtime.workdir import beside as beside_of

LIBRARIES = 600_000_000  # bytes resident before the model is used: Python, torch, transformers, the tokenizer
TRAINING = "Training"  # the stage that counts the steps of a training
_STRENGTHS = 5  # ridge strengths that a solve tries, usually
_LENGTHS, _JUDGED = 6, 4  # lengths of a second-order step that are compared, usually, and in how many sweeps
_CHECKPOINTS = 3  # of a training, while the third is written: weights and two moments
_FLOATS = {name: torch for torch, name in DTYPES.items()} | {"F64": "float64"}


@dataclass(frozen=True)
class Stage:
    """One stage as its progress names it: FLOPs by torch dtype, and bytes to read from the source's disk meanwhile."""

    name: str
    flops: Mapping[str, float] = field(default_factory=dict)
    reads: float = 0.0


@dataclass(frozen=True)
class Shape:
    """The numbers of a checkpoint that its costs follow from.

    Attributes:
        depth, d, vocabulary: of the text model.
        layer: matrix parameters that a token uses in a layer, the mean over layers.
        maps: inputs of the maps into the residual stream of a typical layer; a sum of experts has one, of d inputs.
        matrices: [out, in] of the matrices of a layer.
        layer_bytes: of the largest layer; outside: parameters outside the layers; total_bytes: all as loaded.
        dtype: torch name of the precision that the model runs in.
    """

    depth: int
    d: int
    vocabulary: int
    layer: float
    maps: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]
    layer_bytes: int
    outside: int
    total_bytes: int
    dtype: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str | None = None) -> Shape:
        """The shape of `checkpoint`, loaded as `dtype`, a torch name; None or "auto": as stored."""
        dtype = None if dtype == "auto" else dtype
        config, sizes = text_config(checkpoint.config), measure_sizes(checkpoint)
        middle = checkpoint.layers[checkpoint.depth // 2]
        d = width(config) or 1
        vocabulary = int(config.get("vocab_size") or 1)
        names = {f"{name}.weight" for name in (*ATTENTION_OUTPUTS, *FEED_FORWARD_OUTPUTS)}
        maps = tuple(s.numel // d for name, s in middle.items() if name in names and len(s.shape) == 2)
        matrices = tuple((s.shape[-2], s.shape[-1]) for s in middle.values() if len(s.shape) >= 2)
        stored = max((s.nbytes, s.dtype) for s in checkpoint.tensors.values())[1]
        own = dtype or _FLOATS.get(stored, "float32")
        cast = DTYPES[dtype] if dtype else None
        within = sum(s.numel for layer in checkpoint.layers for s in layer.values())
        return cls(
            sizes.depth,
            d,
            vocabulary,
            max(0.0, sizes.flops_per_token / 2 - d * vocabulary) / sizes.depth,
            maps or (d, d),
            matrices or ((d, d),),
            max(measure_sizes(checkpoint, cast=cast).layer_bytes),
            sizes.parameters - within,
            checkpoint.bytes_as(dtype),
            own,
        )

    @cached_property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return DTYPE_BITS[DTYPES.get(self.dtype, "F64")] // 8

    def forward(self, tokens: float, seq_len: int) -> float:
        """FLOPs of one layer on so many tokens."""
        return tokens * (2 * self.layer + 4 * seq_len * self.d)

    def head(self, positions: float, vocabulary: int | None = None) -> float:
        """FLOPs of the logits at so many positions."""
        return positions * 2 * self.d * (vocabulary or self.vocabulary)


def measuring(shape: Shape, text: TextSpec, *, streams: bool) -> Stage:
    """One pass of the text through all layers."""
    flops = shape.depth * shape.forward(text.samples * text.seq_len, text.seq_len)
    reads = shape.depth * shape.layer_bytes if streams else 0
    return Stage("Measuring layers", {shape.dtype: flops}, reads)


@dataclass(frozen=True)
class Work:
    """What a command will do, before the rates of the machine are known.

    Attributes:
        stages: in order. host_bytes, device_bytes, disk: as in `slicer.jobs.forecast.Forecast`.
        shape: of the model; tokens: of one pass; file: a large one of the source, to measure reading; None: none is
            here.
        about: words for the announcement.
        cheaper: share -> (option, share of the time that it takes) of options that bring a training down to a share.
    """

    stages: tuple[Stage, ...]
    host_bytes: int
    device_bytes: int
    disk: Mapping[Path, int]
    shape: Shape
    tokens: int
    file: Path | None
    about: str = ""
    cheaper: Callable[[float], Iterable[tuple[str, float]]] | None = None


@dataclass(frozen=True)
class Cut:
    """Where a fold works: `gaps` of removed sublayers, the `first` layer that it changes, and the `rest` that stay."""

    gaps: int
    first: int
    rest: int

    @classmethod
    def of(cls, plan: Plan) -> Cut:
        """Of a plan."""
        gaps, (attention, ffn) = gaps_of(plan), plan.gone
        first = max(0, gaps[0].layer - BEFORE) if gaps else plan.depth
        return cls(len(gaps), first, sum(i not in attention & ffn for i in range(first, plan.depth)))

    @classmethod
    def expected(cls, goal: Goal | None, strategy: str, depth: int, n: int) -> Cut:
        """Of what is still to be chosen: a block of n layers, by similarity as if in the middle; single sublayers could
        begin anywhere."""
        if goal is not None and goal.named is not None:
            return cls.of(Plan.dropping(depth, goal.named))
        if goal is not None and goal.sublayers:
            parts = sum(amount.resolve_sublayers(depth, name) for name, amount in goal.sublayers.items())
            return cls(parts, 0, depth - n)
        ends = {"tail": depth - n, "deepest": depth - 1 - n}
        start = max(0, ends.get(strategy, (depth - n) // 2))
        return cls.of(Plan.dropping(depth, range(start, start + n)))


def folding(shape: Shape, text: TextSpec, cut: Cut, *, streams: bool) -> list[Stage]:
    """A fold: least squares at each gap in a pass of source and cut, then second-order steps."""
    tokens, d, f = text.samples * text.seq_len, shape.d, max(shape.maps)
    held = max(1, text.samples // HELD_OUT) * text.seq_len
    fitted = (tokens - held) / PARTS
    run = cut.rest * shape.forward(held, text.seq_len)  # of the held-out sequences through the cut
    layer, gaps = shape.forward(tokens, text.seq_len), cut.gaps
    ways = (f, *shape.maps)  # the feed-forward alone, and after the attention
    gather = len(ways) * layer + sum(tokens * (1.1 * z * z + 2 * d * z) for z in ways)
    errors = sum(2 * d * z * held * _STRENGTHS for z in ways)
    single = shape.depth * layer + run + 4 * shape.head(held)
    single += gaps * (gather + errors + layer + 2 * run)
    double = gaps * sum(_STRENGTHS * (z**3 / 3 + 2 * d * z * z) for z in ways)
    solving = Stage(
        "Healing the cut", {"float32": single, "float64": double}, (shape.depth + 2 * cut.rest) * shape.layer_bytes
    )
    part = min(shape.vocabulary, max(LIKELY, min(tokens, shape.vocabulary) // 4) + SAMPLE)
    part = shape.vocabulary if 2 * part > shape.vocabulary else part
    judge = run + shape.head(held / STRIDE)
    step = cut.rest * shape.forward(fitted, text.seq_len) * (1 + 2 + 1 / DRAWN)
    step += shape.head(fitted, part) * (3 + 1 / DRAWN)
    step += cut.rest * sum(2 * d * z * fitted + 2 * d * z * (z + d) for z in shape.maps)
    step += _LENGTHS * judge + _JUDGED * shape.head(held / STRIDE)
    once = cut.rest * sum(fitted * (1.1 * z * z + 2 * d * d / DRAWN) + (z**3 + d**3) / 3 for z in shape.maps)
    total = STEPS * step + once + 3 * judge + 2 * shape.head(held)
    sweeps = STEPS * (2 + _JUDGED) + 2
    steps = Stage("Healing the cut: second-order steps", {"float32": total}, sweeps * cut.rest * shape.layer_bytes)
    return [s if streams else replace(s, reads=0.0) for s in (solving, steps)]


def comparing(shape: Shape, cut: Cut, *, streams: bool) -> Stage:
    """The distance from the source on text of all kinds: one pass of the source, and two of the rest of the cut."""
    tokens = (len(SHIPPED) + 2) * DOCUMENTS * TOKENS  # with code, and the kind of the calibration text
    flops = (shape.depth + 2 * cut.rest) * shape.forward(tokens, TOKENS) + 3 * shape.head(tokens)
    reads = streams * (shape.depth + cut.rest) * shape.layer_bytes
    return Stage("Comparing with the source", {"float32": flops}, reads)


def folding_bytes(shape: Shape, text: TextSpec, cut: Cut) -> tuple[int, int]:
    """(bytes on the device where the model runs, bytes on the host) that a fold takes beside the model.

    On the device see `working_bytes`. On the host three states of the whole text; and for each layer from the first
    that changes on, its steps so far, and what enters it on a part of the text.
    """
    tokens, d = text.samples * text.seq_len, shape.d
    layer, casts = shape.layer_bytes // shape.itemsize, shape.itemsize == 2
    batch = min(text.batch_size * text.seq_len, max(TOGETHER, text.seq_len))
    device = working_bytes(layer, d, max(shape.maps), shape.vocabulary, casts=casts, tokens=batch)
    kept = cut.rest * sum(4 * d * z for z in shape.maps)
    states = 4 * d * tokens * (3 + cut.rest / PARTS)
    return device, int(kept + states)


def folding_disk(shape: Shape, text: TextSpec, cut: Cut) -> int:
    """Bytes that the stages of a fold take in the work directory: two states of the text; the factors of A and G, the
    directions, the steps so far and those that replace them; the solutions."""
    states = 2 * 4 * shape.d * text.samples * text.seq_len
    changes = sum(4 * shape.d * z for z in shape.maps)
    factors = sum(4 * (z * z + shape.d**2) for z in shape.maps)
    return states + (3 * cut.rest + cut.gaps) * changes + cut.rest * factors


def training(shape: Shape, settings: TrainingSettings, layers: int, teacher: Shape | None) -> Stage:
    """A training of `layers` layers, with its measurements; `teacher`: runs alongside."""
    asked, length = settings.asked, settings.seq_len

    once = _through(shape, layers, length)
    back = 1 + (asked.method == "full") + asked.gradient_checkpointing
    sequence = once * (1 + back)
    if asked.method != "full":  # adapters on three matrices, forward, back, and their gradients
        sequence += 6 * 3 * layers * settings.lora_r * (shape.d + max(shape.maps)) * length
    if teacher is not None:
        sequence += _through(teacher, teacher.depth, length)
    measured = (1 + math.ceil(asked.max_steps / settings.eval_every)) * asked.validation_samples
    flops = asked.max_steps * asked.batch_size * sequence + measured * once
    return Stage(TRAINING, {settings.compute: flops / world()})


def _through(shape: Shape, layers: int, length: int) -> float:
    """FLOPs of one sequence through so many layers and the head."""
    return layers * shape.forward(length, length) + shape.head(length)


def work_of(
    recipe: Recipe, checkpoint: Checkpoint, out: Path, plan: Plan | None = None, *, measures: bool = False
) -> Work:
    """A conversion or a fold of the source `checkpoint` into `out`.

    `plan`: the cut; None: still to be chosen, as if the block were in the middle. `measures`: whether the model is
    still to be measured.
    """
    shape, text, compute = Shape.of(checkpoint, recipe.compute.dtype), recipe.text, recipe.compute
    streams, on_gpu, solves = not recipe.loads, compute.device_memory is not None, recipe.repair.method != "none"
    dropped = len(plan.dropped) if plan is not None else dropped_by(recipe.goal, checkpoint, compute.dtype)
    cast = DTYPES[compute.dtype] if compute.dtype else None
    kept = None if plan is None else plan.kept
    after = measure_sizes(checkpoint, kept, cast).total_bytes
    if plan is None:
        after -= dropped * min(measure_sizes(checkpoint, cast=cast).layer_bytes)
    stages, disk, about = [Stage("Writing", reads=after)], {out: after}, ""
    # What the model takes where it runs, and what lies on the host beside it.
    weights = shape.total_bytes if recipe.loads else 3 * shape.layer_bytes + shape.outside * shape.itemsize
    beside = device = 0
    if recipe.needs_model and not streams and measures:
        stages.insert(0, Stage("Loading the model", reads=shape.total_bytes))
    if text is not None and recipe.needs_model:
        about = f"; on {text.samples} sequences of {text.seq_len} tokens"
        tokens = text.samples * text.seq_len
        beside = 2 * shape.itemsize * shape.d * tokens
        if measures and recipe.measures:
            stages.insert(-1, measuring(shape, text, streams=streams))
        if solves:
            if plan is None:
                cut = Cut.expected(recipe.goal, recipe.selection.strategy, checkpoint.depth, dropped)
            else:
                cut = Cut.of(plan)
            solving = folding(shape, text, cut, streams=streams)
            folds = recipe.repair.method == "fold" and recipe.repair.solver == SOLVERS[0]
            stages[-1:-1] = [*(solving if folds else solving[:1]), comparing(shape, cut, streams=streams)]
            steps = cut if folds else replace(cut, rest=0)
            device, kept_bytes = folding_bytes(shape, text, steps)
            beside, disk[beside_of(out, "work")] = max(beside, kept_bytes), folding_disk(shape, text, steps)
    limit = max(0, (compute.memory or 0) - (0 if on_gpu else weights + device))
    if compute.memory is not None and beside > limit:  # the rest of the states is in files
        place = beside_of(out, "work")
        disk[place], beside = disk.get(place, 0) + beside - limit, limit
    host = LIBRARIES + beside + (0 if on_gpu or not recipe.needs_model else weights + device)
    batch = (text.batch_size * text.seq_len) if text is not None else 1
    file = max((s.nbytes, s.file) for s in checkpoint.tensors.values())[1]
    return Work(
        tuple(stages), int(host), int(weights + device) if on_gpu and recipe.needs_model else 0, disk, shape,
        min(batch, TOGETHER), file if file.suffix != ".json" else None, about,
    )  # fmt: skip


def work_of_training(
    settings: TrainingSettings, text: TextSpec, compute: Compute, source: Checkpoint, layers: int, out: Path,
    fold: Cut | None, *, base: bool, cut: bool = False,
) -> Work:  # fmt: skip
    """A training of `layers` layers of the model of `source`, into `out`.

    `fold`: what is folded on `text` first; None: nothing. `base`: whether the weights to start from are written; `cut`:
    whether the cut is still to be written too.
    """
    asked, shape = settings.asked, Shape.of(source, compute.dtype)
    sequences, teacher = asked.max_steps * asked.batch_size, shape if asked.distils else None
    once = training(shape, settings, layers, None if asked.teacher_cache else teacher)
    streams = not memory.fits(source.bytes_as(compute.dtype), compute)
    stages = [*(folding(shape, text, fold, streams=streams) if fold else ()), once]
    weights = shape.total_bytes - (shape.depth - layers) * shape.layer_bytes
    adapters = 4 * 3 * layers * settings.lora_r * (shape.d + max(shape.maps))
    trained = adapters if asked.method != "full" else 4 * weights // shape.itemsize
    work = 4 * sequences * settings.seq_len + _CHECKPOINTS * 3 * trained + 2 * trained + base * weights
    disk = {out: weights, beside_of(out): work + (folding_disk(shape, text, fold) if fold else 0)}
    if cut:
        disk[beside_of(out, "cut")] = weights
    if teacher is not None and asked.teacher_cache is not None:
        from slicer.heal.finetune.distillation import TOP

        junctions = (layers < shape.depth) * (asked.mismatch_weight > 0)
        row = settings.seq_len * (2 * shape.d * junctions + 6 * TOP * (asked.kl_weight > 0))
        disk[Path(asked.teacher_cache)] = sequences * row
        passes = {shape.dtype: sequences * _through(shape, shape.depth, settings.seq_len)}
        stages.insert(0, Stage("Caching the teacher's outputs", passes))
    on_gpu, wide = compute.torch_device().type == "cuda", 2 if settings.compute == "bfloat16" else 4
    with suppress(KeyError, TypeError):  # a config with other names
        taken = needed(
            ModelShape.of(source.config, layers), method=asked.method, rank=settings.lora_r,
            micro_batch=settings.micro_batch, seq_len=settings.seq_len, gpus=world() if sharded() else 1,
            gradient_checkpointing=asked.gradient_checkpointing, bytes_a_value=wide,
        )  # fmt: skip
        weights = int(taken["all"])

    def cheaper(share: float) -> Iterator[tuple[str, float]]:
        """The least that brings the time down to the share, or what comes closest."""
        whole = once.flops[settings.compute]

        def left(**changed: Any) -> float:
            own = {name: changed.pop(name) for name in ("seq_len", "lora_r") if name in changed}
            other = replace(settings, asked=replace(asked, **changed), **own)
            return (
                training(shape, other, layers, None if asked.teacher_cache else teacher).flops[settings.compute] / whole
            )

        yield f"--max-steps {(fewer := max(1, int(share * asked.max_steps)))}", left(max_steps=fewer)
        for option, name, value in (
            ("--train-seq-len", "seq_len", settings.seq_len),
            ("--train-batch-size", "batch_size", asked.batch_size),
        ):
            least = value
            while least > 1 and (least == value or left(**{name: least}) > 1.05 * share):
                least //= 2
            if least < value:
                yield f"{option} {least}", left(**{name: least})
        if asked.method != "full" and (rank := settings.lora_r // 2):  # it takes memory rather than time
            yield f"--lora-r {rank}", left(lora_r=rank)

    tokens = min(settings.micro_batch * settings.seq_len, 4 * TOGETHER)
    file = max((s.nbytes, s.file) for s in source.tensors.values())[1]
    about = f"; {asked.max_steps} steps of {asked.batch_size} sequences of {settings.seq_len} tokens"
    host, device = LIBRARIES + (0 if on_gpu else weights), weights if on_gpu else 0
    return Work(tuple(stages), host, device, disk, shape, tokens, file, about, cheaper)


def work_of_analysis(
    wanted: Measures, checkpoint: Checkpoint, text: TextSpec, compute: Compute, out: Path, *, loads: bool
) -> Work:
    """An analysis into `out`; of its questions, if it has any, nothing is known yet."""
    shape, tokens, depth = Shape.of(checkpoint, compute.dtype), text.samples * text.seq_len, checkpoint.depth
    layer, head = shape.forward(tokens, text.seq_len), shape.head(tokens)
    layers = shape.depth * shape.layer_bytes
    # Without each block: the layers behind it, from one pass that all share.
    each = (depth + depth**2 / 2) * layer + (depth + 1) * head
    found = {"Measuring layers": (1 + wanted.sublayers) * depth * layer}
    found |= {f"Loss without each block of {n}": each for n in wanted.losses}
    found |= {f"Greedy removal, {k + 1} of {wanted.greedy}": each for k in range(wanted.greedy)}
    found |= {"Gradients": 4 * depth * layer + 3 * head} if wanted.taylor else {}
    if not wanted.against.startswith("task:"):
        players = depth * (1 + wanted.sublayers)
        leaving = players * (depth / 2 * layer + head) * bool(wanted.shapley or (wanted.sublayers and wanted.losses))
        found |= {"Leaving out each player": leaving, "Shapley values": wanted.shapley * (depth * layer + head)}
    streams, dtype = not loads, shape.dtype
    stages = [Stage(name, {dtype: flops}, layers if streams else 0) for name, flops in found.items() if flops]
    for n in wanted.healed:
        cut = Cut.of(Plan.dropping(depth, range((depth - n) // 2, (depth + n) // 2)))
        for stage in folding(shape, text, cut, streams=streams):
            more = {name: CANDIDATES * amount for name, amount in stage.flops.items()}
            stages.append(replace(stage, flops=more, reads=CANDIDATES * stage.reads))
    states = 2 * shape.itemsize * shape.d * tokens
    weights = shape.total_bytes if loads else 3 * shape.layer_bytes
    on_gpu = compute.device_memory is not None
    host = LIBRARIES + states + (0 if on_gpu else weights)
    recorded = (depth + 1) * text.samples * (wanted.positions + 1) * shape.d * shape.itemsize
    file = max((s.nbytes, s.file) for s in checkpoint.tensors.values())[1]
    about = f"; on {text.samples} sequences of {text.seq_len} tokens"
    batch = min(text.batch_size * text.seq_len, TOGETHER)
    return Work(tuple(stages), host, weights if on_gpu else 0, {out: recorded + states}, shape, batch, file, about)


def dropped_by(goal: Goal | None, checkpoint: Checkpoint, dtype: str | None) -> int:
    """The number of whole layers that `goal` drops; of a budget, by the mean size of a layer."""
    if goal is None or not goal.layers:
        return 0
    if not goal.budget:
        return goal.count(checkpoint.depth)
    shape, sizes, over = Shape.of(checkpoint, dtype), measure_sizes(checkpoint), 0.0
    if goal.max_params is not None:
        over = (sizes.parameters - goal.max_params) / ((sizes.parameters - shape.outside) / sizes.depth)
    if goal.max_bytes is not None:
        over = max(over, (shape.total_bytes - goal.max_bytes) / shape.layer_bytes)
    return min(max(1, math.ceil(over)), sizes.depth - 1)


def seconds_of(stage: Stage, rates: Rates) -> float:
    """Seconds of a stage: reading goes on beside computing."""
    computing = sum(amount / rates.flops[dtype] for dtype, amount in stage.flops.items() if amount)
    return max(computing, stage.reads / rates.reads if rates.reads else 0.0)


def total_flops(stages: Iterable[Stage]) -> dict[str, float]:
    """FLOPs of all stages by dtype."""
    found: dict[str, float] = {}
    for stage in stages:
        for dtype, amount in stage.flops.items():
            found[dtype] = found.get(dtype, 0.0) + amount
    return found
