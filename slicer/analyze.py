"""Which layers matter: a source measured by every metric into a directory, and plans from what was measured.

resolve -> Checkpoint.open -> Walk -> calibrate -> record (resumable) -> summarise -> analysis.json, figures
analysis.json + amount -> Plan, without the model
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slicer.checkpoint import hub
from slicer.checkpoint.export import DTYPES, refuse_quantized
from slicer.checkpoint.reader import Checkpoint
from slicer.convert import library_versions
from slicer.errors import OutputError, PlanError, SlicerError, UsageError
from slicer.measure.analysis import METRIC, Analysis
from slicer.measure.calibration import CalibrationSpec
from slicer.plan import Amount, Plan
from slicer.progress import Progress
from slicer.select import Cut, Doubt, best_cuts, doubt

POSITIONS = 16
RUNNERS_UP = 3
_PARTIAL = ".partial"


@dataclass(frozen=True)
class AnalyzeOptions:
    """How to analyse; every default of the command line lives here.

    Attributes:
        memory: bytes that weights and states may take; None: a safe part of what is free.
        positions: tokens of each sequence that averages over tokens take, evenly apart.
        losses: block sizes whose every block is also scored by the loss without it; costs further passes.
        greedy: layers to remove one after another by re-scored loss (SLEB); 0 for none.
        taylor: whether to also take |gradient x weight|.
    """

    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    dtype: str | None = None
    device: str = "auto"
    memory: int | None = None
    positions: int = POSITIONS
    losses: tuple[int, ...] = ()
    greedy: int = 0
    taylor: bool = False
    force: bool = False
    trust_remote_code: bool = False
    command: str | None = None


def analyze(
    source: str, out: Path, options: AnalyzeOptions | None = None, *, progress: Progress | None = None
) -> Analysis | None:
    """Measure `source` (Hub id, directory or "demo") into the directory `out`: analysis.json and figures.

    Killed at any moment, the same call goes on after the last finished layer. Under torchrun each process measures its
    share of the samples, and all but the first return None. Raises SlicerError children.
    """
    from slicer.measure.share import Share

    options, progress = options or AnalyzeOptions(), progress or Progress()
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r}: choose one of {', '.join(DTYPES)}")
    progress.stage("Opening the checkpoint")
    found = hub.resolve(source)
    checkpoint = Checkpoint.open(found.path)
    refuse_quantized(checkpoint)
    checkpoint.check_layers()
    _check_sizes(options, checkpoint.depth)
    share = Share.of_environment()
    try:
        with _workplace(
            out, options, _fingerprint(checkpoint, source, options, share.world), share.rank
        ) as work:
            analysis = _measure(checkpoint, options, work, share, progress)
            analysis = Analysis(
                **{
                    **{k: getattr(analysis, k) for k in analysis.__dataclass_fields__},
                    "source": source,
                    "revision": found.revision,
                    "model_type": checkpoint.config.get("model_type"),
                    "versions": library_versions(),
                    "command": options.command,
                }
            )
            if not share.is_first:
                return None
            progress.stage("Drawing")
            _publish(analysis, out)
        shutil.rmtree(out / _PARTIAL, ignore_errors=True)
        return analysis
    finally:
        share.leave()


def _measure(
    checkpoint: Checkpoint, options: AnalyzeOptions, work: Path, share: Any, progress: Progress
) -> Analysis:
    from slicer.measure import importance
    from slicer.measure.analysis import summarise
    from slicer.measure.metrics import points_affordable
    from slicer.measure.stream import Walk, fits
    from slicer.measure.trace import record

    where: dict[str, Any] = {
        "dtype": options.dtype,
        "device": _device(options.device),
        "memory_bytes": options.memory,
    }
    loaded = fits(checkpoint, **where)
    progress.stage("Loading the model" if loaded else "Reading what lies outside the layers")
    if not loaded:
        progress.note(
            "the model does not fit in memory: its layers are read from disk one at a time"
            + (", out of pickled .bin files" if checkpoint.is_bin else "")
        )
    walk = Walk.fitting(checkpoint, directory=work, trust_remote_code=options.trust_remote_code, **where)
    progress.stage("Calibration data")
    batches, provenance = _batches(checkpoint, options, walk, work.parent, share)
    samples, seq_len = sum(len(b) for b in batches), batches[0].shape[1]
    own, first = share.of(batches)
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
    tables = summarise(trace, share, first, samples, points, seq_len, progress)
    losses = importance.measure(
        walk,
        own,
        share,
        first,
        samples,
        sizes=options.losses,
        greedy=options.greedy,
        taylor=options.taylor,
        notebook=work / "losses.json",
        progress=progress,
    )
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
    )


def _batches(
    checkpoint: Checkpoint, options: AnalyzeOptions, walk: Any, work: Path, share: Any
) -> tuple[list[Any], dict[str, Any]]:
    """The same batches in every process, and after a restart: the first one makes and keeps them."""
    from safetensors.torch import load_file, save_file

    from slicer.measure.calibration import token_batches

    saved, about = work / "tokens.safetensors", work / "tokens.json"
    outcome: Any = None
    if share.is_first:
        try:
            if saved.is_file() and about.is_file():
                tokens = load_file(saved)["tokens"]
                outcome = tokens, json.loads(about.read_text("utf-8"))
            else:
                import torch

                data = token_batches(
                    options.calibration,
                    checkpoint.path,
                    walk.model,
                    streamed=walk.streamed,
                    trust_remote_code=options.trust_remote_code,
                )
                tokens = torch.cat(data.batches)
                part = saved.with_name(saved.name + ".part")
                save_file({"tokens": tokens}, part)
                part.replace(saved)
                about.write_text(json.dumps(data.provenance), "utf-8")
                outcome = tokens, data.provenance
        except SlicerError as error:
            outcome = error
    outcome = share.agree(outcome)
    if isinstance(outcome, SlicerError):
        raise outcome
    tokens, provenance = outcome
    return list(tokens.split(options.calibration.batch_size)), provenance


def _device(device: str) -> str:
    """Each process of one machine its own GPU."""
    import os

    rank = os.environ.get("LOCAL_RANK")
    if device != "auto" or rank is None or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < 2:
        return device
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def _check_sizes(options: AnalyzeOptions, depth: int) -> None:
    for n in options.losses:
        if not 0 < n < depth:
            raise UsageError(
                f"--losses {n}: the model has {depth} layers; give sizes between 1 and {depth - 1}"
            )
    if not 0 <= options.greedy < depth:
        raise UsageError(
            f"--greedy {options.greedy}: the model has {depth} layers; remove at most {depth - 1}"
        )


# --- the directory ---------------------------------------------------------------------------------------------------


def _fingerprint(checkpoint: Checkpoint, source: str, options: AnalyzeOptions, world: int) -> str:
    """What must be the same for a run to go on where another ended."""
    spec = options.calibration
    file = Path(spec.source) if spec.source else None
    record = {
        "source": source,
        "config": checkpoint.config,
        "tensors": [[k, s.file.name, s.dtype, s.shape, s.start, s.file.stat().st_mtime_ns]
                    for k, s in checkpoint.tensors.items()],
        "calibration": asdict(spec),
        "text": [file.stat().st_size, file.stat().st_mtime_ns] if file is not None and file.is_file() else None,
        "dtype": options.dtype,
        "positions": options.positions,
        "world": world,
        "versions": library_versions(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _workplace(out: Path, options: AnalyzeOptions, fingerprint: str, rank: int) -> Iterator[Path]:
    """`out/.partial/RANK`, this process's alone, kept only when it belongs to the same run."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; choose another directory with -o")
    if (out / "analysis.json").is_file() and not options.force and not (out / _PARTIAL).exists():
        raise OutputError(
            f"{out}: holds an analysis already; choose another place with -o, or --force to replace it"
        )
    ours = {_PARTIAL, "analysis.json", "plan.json"}
    if out.is_dir() and not (out / _PARTIAL).exists() and not (out / "analysis.json").exists():
        strange = sorted(p.name for p in out.iterdir() if p.name not in ours)
        if strange:
            raise OutputError(
                f"{out}: holds {strange[0]}, which is no analysis; choose another place with -o"
            )
    work = out / _PARTIAL / str(rank)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(
                    f"{out}: another run is at work there; wait for it or choose another -o"
                ) from None
            mark = work / "run"
            if not mark.is_file() or mark.read_text("utf-8") != fingerprint:
                for old in work.iterdir():
                    if old.name != "lock":
                        old.unlink()
                if rank == 0:
                    for old in work.parent.glob("tokens.*"):
                        old.unlink()
                mark.write_text(fingerprint, "utf-8")
            yield work
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error}); choose another -o"
        ) from None


def _publish(analysis: Analysis, out: Path) -> None:
    """Figures first, analysis.json last: where it is, everything is."""
    from slicer.judge import plots

    plots.analysis_figures(analysis, out)
    part = out / "analysis.json.part"
    part.write_text(analysis.to_json(), "utf-8")
    part.replace(out / "analysis.json")


# --- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A plan from an analysis: the chosen cut, the next best, and whether the best two can be told apart."""

    plan: Plan
    metric: str
    cuts: tuple[Cut, ...]
    doubt: Doubt | None
    samples: int


def plan(
    analysis: Analysis,
    amount: Amount,
    *,
    metric: str = METRIC,
    blocks: int = 1,
    protect: frozenset[int] = frozenset(),
    command: str | None = None,
) -> Planned:
    """The best cut of `amount` by `metric` in at most `blocks` separate blocks. Pure. Raises PlanError.

    `metric` "greedy" takes the measured order of removal instead.
    """
    if amount.layers is not None:
        raise UsageError(
            "--drop: give a fraction or a count; convert --drop takes named layers without a plan"
        )
    n = amount.resolve(analysis.depth)
    shared: dict[str, Any] = {
        "source": analysis.source,
        "revision": analysis.revision,
        "model_type": analysis.model_type,
        "calibration": analysis.calibration,
        "seed": (analysis.calibration or {}).get("seed"),
        "versions": analysis.versions,
        "command": command,
        "metric": metric,
    }
    if metric == "greedy":
        if len(analysis.greedy) < n:
            raise PlanError(
                f"this analysis has a greedy order of {len(analysis.greedy)} layers, not {n}; "
                f"run slicer analyze with --greedy {n}"
            )
        order = [int(step["layer"]) for step in analysis.greedy[:n]]
        if set(order) & protect:
            taken = min(set(order) & protect)
            raise PlanError(f"the greedy order takes the protected layer {taken}; choose another metric")
        loss = float(analysis.greedy[n - 1]["loss"])
        chosen = Plan.dropping(analysis.depth, order, strategy="similarity", distance=loss, **shared)
        return Planned(chosen, metric, (), None, analysis.samples)
    distances = analysis.distances(metric)
    cuts = best_cuts(distances, n, blocks, protect, RUNNERS_UP + 1)
    best, *others = cuts
    chosen = Plan.dropping(
        analysis.depth,
        best.dropped,
        strategy="similarity",
        distance=best.distance,
        runners_up=tuple({"block": spell(cut), "distance": cut.distance} for cut in others),
        **shared,
    )
    unsure = doubt(distances, best, others[0]) if others else None
    return Planned(chosen, metric, tuple(cuts), unsure, distances.samples)


def write_plan(plan: Plan, file: Path) -> None:
    """Write `plan`, whole or not at all. Raises OutputError."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(plan.to_json(), "utf-8")
        part.replace(file)
    except OSError as error:
        raise OutputError(
            f"{file}: cannot be written ({error.strerror}); choose another place with -o"
        ) from None


def spell(cut: Cut) -> str:
    """`9-12` or `3, 9-12`."""
    return ", ".join(f"{b.start}-{b.start + b.n - 1}" if b.n > 1 else f"{b.start}" for b in cut.blocks)
