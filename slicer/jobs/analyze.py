"""`slicer analyze` and `slicer plan`: measure a source by every metric, and make plans from the results.

resolve -> Checkpoint.open -> Walk -> calibrate -> record (resumable) -> summarise -> analysis.json, figures
analysis.json + amount -> Plan, without the model
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint import hub
from slicer.checkpoint.reader import Checkpoint, refuse_quantized
from slicer.checkpoint.tensors import DTYPES
from slicer.data.sources import TextSpec
from slicer.errors import HealError, OutputError, UsageError
from slicer.heal.compensate.fold import fold
from slicer.heal.patch import holds, written_dtype
from slicer.measure.analysis import Analysis, Distances
from slicer.model.walk import Walk
from slicer.plan.blocks import rank
from slicer.plan.plan import METRIC, Plan
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.distributed import Processes
from slicer.runtime.files import atomic_file, write_atomically
from slicer.runtime.versions import versions
from slicer.runtime.workdir import Notebook, claimed

POSITIONS = 16
QUESTIONS = 64
_PARTIAL = ".partial"  # work directories of an analysis, one a process; gone when it is done


@dataclass(frozen=True)
class AnalyzeOptions:
    """Options of an analysis; the defaults of the command line are defined here.

    Attributes:
        memory: bytes for weights and states; None: a safe share of the free memory.
        positions: evenly spaced tokens of each sequence for metrics that average over tokens.
        losses: block sizes for which every block is scored by the loss without it; needs extra passes.
        greedy: number of layers to remove one by one by re-measured loss (SLEB); 0 for none.
        taylor: whether to measure |gradient x weight|.
        sublayers: whether to measure attention and feed-forward sublayers separately, and half-offset cuts: one extra
            pass, and with `losses` the loss and the KL divergence without each sublayer.
        shapley: forward passes for Shapley values of layers (of sublayers with `sublayers`); 0: none.
        against: the cost of the Shapley values: "loss" or "kl" on the calibration text, or "task:NAME", the score of an
            lm-eval task.
        questions: number of questions of that task.
        data: local files of that task, see `slicer.evaluate.local_tasks`; None uses the Hub.
        beside: another analysis of the same model (a directory) on other text, to plot against this one.
        healed: block sizes whose closest blocks are also healed in closed form and compared by loss.
    """

    calibration: TextSpec = field(default_factory=TextSpec)
    dtype: str | None = None
    device: str = "auto"
    memory: int | None = None
    positions: int = POSITIONS
    losses: tuple[int, ...] = ()
    greedy: int = 0
    taylor: bool = False
    healed: tuple[int, ...] = ()
    sublayers: bool = False
    shapley: float = 0
    against: str = "loss"
    questions: int = QUESTIONS
    data: Path | None = None
    beside: Path | None = None
    force: bool = False
    trust_remote_code: bool = False
    command: str | None = None


def analyze(
    source: str, out: Path, options: AnalyzeOptions | None = None, *, progress: Progress | None = None
) -> Analysis | None:
    """Measure `source` (Hub id, directory or "demo") into the directory `out`: analysis.json and figures.

    If stopped, the same call resumes after the last finished layer. In a distributed run each process measures its
    share of the samples, and all but rank 0 return None. Raises SlicerError children.
    """
    options, progress = options or AnalyzeOptions(), progress or Progress()
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r}: choose from {', '.join(DTYPES)}")
    progress.stage("Opening the checkpoint")
    found = hub.resolve(source)
    checkpoint = Checkpoint.open(found.path)
    refuse_quantized(checkpoint)
    checkpoint.check_layers()
    _check_sizes(options, checkpoint.depth)
    other = None if options.beside is None else Analysis.load(options.beside)
    processes = Processes.of_environment()
    if options.healed and processes.world > 1:
        raise UsageError("--healed: solved by one process; run it without torchrun")
    if (options.sublayers or options.shapley) and processes.world > 1:
        raise UsageError("--sublayers and --shapley: measured by one process; run them without torchrun")
    try:
        _check_place(out, force=options.force)
        # Each process has a directory of its own, which need not be on the same disk.
        with claimed(
            out / _PARTIAL / str(processes.rank), what="an unfinished analysis", overwrite=options.force,
            checkpoint=checkpoint.identity, text=options.calibration.identity, source=source, dtype=options.dtype,
            positions=options.positions, processes=processes.world, versions=versions(),
        ) as work:  # fmt: skip
            analysis = _measure(checkpoint, options, work.path, processes, progress)
            analysis = Analysis(
                **{
                    **{k: getattr(analysis, k) for k in analysis.__dataclass_fields__},
                    "source": source,
                    "revision": found.revision,
                    "model_type": checkpoint.config.get("model_type"),
                    "versions": versions(),
                    "command": options.command,
                }
            )
            if not processes.is_first:
                return None
            progress.stage("Drawing")
            _publish(analysis, other, out, progress)
        shutil.rmtree(out / _PARTIAL, ignore_errors=True)
        return analysis
    finally:
        processes.leave()


def _check_place(out: Path, *, force: bool) -> None:
    """Raise OutputError where `out` holds a finished analysis (which gives way to `force`), or something else."""
    if (out / _PARTIAL).is_dir() or not out.is_dir():  # what else is in the way is found when it is made
        return
    if (out / "analysis.json").exists():
        if not force:
            raise OutputError(
                f"{out}: holds an analysis already; choose another place with -o, or --force to replace it"
            )
    elif strange := sorted(p.name for p in out.iterdir()):
        raise OutputError(f"{out}: holds {strange[0]}, which is no analysis; choose another place with -o")


def _measure(
    checkpoint: Checkpoint, options: AnalyzeOptions, work: Path, processes: Processes, progress: Progress
) -> Analysis:
    from slicer.measure import losses as importance
    from slicer.measure.distances import summarise
    from slicer.measure.metrics import points_affordable
    from slicer.measure.recorder import record
    from slicer.model.walk import open_walk
    from slicer.runtime.compute import Compute

    loaded = memory.fits(checkpoint.bytes_as(options.dtype), options.device, options.memory)
    progress.stage("Loading the model" if loaded else "Reading what lies outside the layers")
    if not loaded:
        progress.note(
            "the model does not fit in memory: layers are read from disk one at a time"
            + (", from pickled .bin files" if checkpoint.is_bin else "")
        )
    compute = Compute(options.device, options.dtype, options.memory, options.trust_remote_code)
    walk = contextlib.ExitStack().enter_context(open_walk(checkpoint, compute, loads=loaded, directory=work))
    progress.stage("Calibration data")
    batches, provenance = _batches(checkpoint, options, walk, work, processes)
    samples, seq_len = sum(len(b) for b in batches), batches[0].shape[1]
    own, first = processes.of(batches)
    questions = questions_of(checkpoint, options, walk, progress)
    prefix = checkpoint.layer_prefix
    points = points_affordable(
        walk.depth + 1,
        walk.model.config.get_text_config().hidden_size,
        samples,
        samples * seq_len,
        sum(span.numel for key, span in checkpoint.tensors.items() if key.startswith(prefix)),
    )
    trace = record(
        walk,
        own,
        work,
        positions=options.positions,
        points=points,
        samples=samples,
        resumable=True,
        progress=progress,
    )
    progress.stage("Comparing layers", trace.samples, "sequences")
    tables = summarise(trace, processes, first, samples, points, seq_len, progress)
    losses = importance.measure(
        walk,
        own,
        processes,
        first,
        samples,
        sizes=options.losses,
        greedy=options.greedy,
        taylor=options.taylor,
        notebook=work / "losses.json",
        progress=progress,
    )
    if options.healed:
        healed = rank_after_healing(
            checkpoint,
            walk,
            own,
            tables[METRIC],
            options.healed,
            notebook=work / "healed.json",
            progress=progress,
        )
        losses.tables["healed_loss"] = healed
    halves, about = measure_parts(walk, own, questions, options, losses.tables, progress)
    each = len(trace.point_positions)
    return Analysis(
        depth=walk.depth,
        samples=samples,
        seq_len=seq_len,
        metrics={**tables, **losses.tables},
        dtype=str(walk.model.dtype).removeprefix("torch."),
        positions=trace.positions,
        points=each * min(samples, max(1, points // each)) if each else 0,
        calibration=provenance,
        base_loss=losses.base,
        greedy=losses.greedy,
        sublayers=halves,
        shapley=about,
    )


def _batches(
    checkpoint: Checkpoint, options: AnalyzeOptions, walk: Any, work: Path, processes: Processes
) -> tuple[list[Any], dict[str, Any]]:
    """The same batches in every process and after a restart: rank 0 makes and stores them."""
    from safetensors.torch import load_file, save_file

    from slicer.data.calibration import token_batches

    saved, about = work / "tokens.safetensors", work / "tokens.json"

    def drawn() -> tuple[Any, dict[str, Any]]:
        if saved.is_file() and about.is_file():
            return load_file(saved)["tokens"], json.loads(about.read_text("utf-8"))
        import torch

        data = token_batches(
            options.calibration,
            checkpoint.path,
            walk.model,
            streamed=walk.streamed,
            trust_remote_code=options.trust_remote_code,
        )
        tokens = torch.cat(data.batches)
        with atomic_file(saved) as part:
            save_file({"tokens": tokens}, part)
        write_atomically(about, json.dumps(data.record.to_dict()))
        return tokens, data.record.to_dict()

    tokens, provenance = processes.first(drawn)
    return list(tokens.split(options.calibration.batch_size)), provenance


def _check_sizes(options: AnalyzeOptions, depth: int) -> None:
    for name, n in [*(("losses", n) for n in options.losses), *(("healed", n) for n in options.healed)]:
        if not 0 < n < depth:
            raise UsageError(
                f"--{name} {n}: the model has {depth} layers; pass sizes between 1 and {depth - 1}"
            )
    task = options.against.startswith("task:")
    if options.against not in ("loss", "kl") and not (task and options.against != "task:"):
        raise UsageError(f"--against {options.against}: choose from loss, kl, task:NAME")
    if task and not options.shapley:
        raise UsageError(
            f"--against {options.against}: also pass the number of forward passes: --shapley PASSES"
        )
    if options.data is not None and not task:
        raise UsageError("--data needs a task: pass --against task:NAME")
    if options.questions < 1:
        raise UsageError(f"--questions {options.questions}: pass at least 1")
    if options.shapley < 0:
        raise UsageError(f"--shapley {options.shapley:g}: pass a number of forward passes of at least 1")
    if not 0 <= options.greedy < depth:
        raise UsageError(
            f"--greedy {options.greedy}: the model has {depth} layers; remove at most {depth - 1}"
        )


def _publish(analysis: Analysis, other: Analysis | None, out: Path, progress: Progress) -> None:
    """Write the figures, then analysis.json: if it exists, everything does."""
    from slicer.figures import layers

    layers.analysis_figures(analysis, out)
    if analysis.sublayers:
        layers.parts(analysis, out / "parts.png+svg")
    if other is not None:
        agreement = layers.trade_off(analysis, other, out / "trade-off.png+svg")
        progress.note(
            f"trade-off.png sets the two texts against each other: rank correlation {agreement:.2f}"
        )
    write_atomically(out / "analysis.json", analysis.to_json())


def questions_of(checkpoint: Checkpoint, options: AnalyzeOptions, walk: Any, progress: Progress) -> Any:
    """The questions of --against task:NAME; drawn before any measurement, so that errors show early."""
    if not options.against.startswith("task:"):
        return None
    from slicer.evaluate import lm_tasks

    progress.stage("Drawing questions")
    return lm_tasks.draw(
        options.against.removeprefix("task:"),
        options.questions,
        walk.model,
        checkpoint.path,
        data=options.data,
        seed=options.calibration.seed,
        trust_remote_code=options.trust_remote_code,
    )


def measure_parts(
    walk: Any,
    batches: list[Any],
    questions: Any,
    options: AnalyzeOptions,
    tables: dict[str, Any],
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(tables of sublayers, settings of the Shapley values); adds tables of whole layers to `tables`."""
    from slicer.measure import distances
    from slicer.measure.shapley import Coalitions, leave_one_out, shapley, table_of

    found: dict[str, Any] = {}
    samples, seq_len = sum(len(b) for b in batches), batches[0].shape[1]
    if options.sublayers:
        stacked = distances.record_halves(walk, batches, progress=progress)
        found |= distances.tables_of_halves(stacked, seq_len)
        for against in ("loss", "kl") if options.losses else ():
            coalitions = Coalitions(walk, batches, parts=True, against=against)
            found[against] = table_of(against, leave_one_out(coalitions, progress), seq_len, samples, 1)
    if not options.shapley:
        return found, None
    about: dict[str, Any] = {"against": options.against}
    if questions is None:
        coalitions = Coalitions(walk, batches, parts=options.sublayers, against=options.against)
    else:
        coalitions = Coalitions(walk, questions, parts=options.sublayers)
        count, score = len(questions.right), 1 - float(coalitions.base.mean())
        about |= {"questions": count, "score": score, "guessing": 1 - questions.guessing}
        progress.note(
            f"{options.against}: {score:.1%} of {count} questions right with all layers, chance is "
            f"{1 - questions.guessing:.1%}"
            + ("; not better than chance, so the Shapley values are noise" if coalitions.ceiling > 1 else "")
        )
    values = shapley(coalitions, options.shapley, seed=options.calibration.seed, progress=progress)
    name = "shapley" if questions is None else "shapley_score"
    target = found if options.sublayers else tables
    target[name] = table_of(name, values, seq_len, samples)
    pairs = len(values.samples)
    progress.note(
        f"Shapley values: {pairs} pair{'s' if pairs > 1 else ''} of orders, {values.passes:.0f} forward passes"
    )
    return found, {**about, "pairs": pairs, "passes": round(values.passes, 2)}


CANDIDATES = 4


def rank_after_healing(
    checkpoint: Checkpoint,
    walk: Walk,
    batches: Sequence[torch.Tensor],
    distances: Distances,
    sizes: Sequence[int],
    *,
    candidates: int = CANDIDATES,
    notebook: Path | None = None,
    progress: Progress | None = None,
) -> Distances:
    """For each n of `sizes`: the `candidates` closest blocks by `distances`, healed by least squares.

    The table "healed_loss" has the increase over the whole model's loss, nats a token on the sequences that the solver
    held out; NaN for blocks that were not tried, or that cannot be healed. It has no standard errors. Finished
    candidates are kept in `notebook`.
    """
    book = Notebook(notebook)

    def increase(dropped: Sequence[int]) -> float | None:
        try:
            loss = fold(
                walk,
                batches,
                Plan.dropping(walk.depth, dropped),
                holds=holds(checkpoint),
                written=written_dtype(checkpoint, None),
                progress=progress,
            ).losses
        except HealError:
            return None
        assert loss.after is not None and loss.source is not None
        return loss.after - loss.source

    rows: dict[int, list[float]] = {}
    for n in sizes:
        rows[n] = [math.nan] * (distances.depth - n + 1)
        for block in rank(distances, n)[:candidates]:
            value = book.take(f"{block.start}+{n}", partial(increase, block.dropped))
            rows[n][block.start] = math.nan if value is None else value
    rows = {n: row for n, row in rows.items() if not all(map(math.isnan, row))}
    if not rows:
        raise HealError("none of the closest blocks can be healed; leave --healed out")
    unknown = {n: [math.nan] * len(row) for n, row in rows.items()}
    return Distances(
        distances.depth, distances.samples, distances.seq_len, rows, unknown, "healed_loss", dict(unknown)
    )
