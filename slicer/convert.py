"""The main job, its stages in order: open, measure, select, export, verify, and only then appear.

resolve -> Checkpoint.open -> [load -> calibrate -> measure -> select] -> [heal] -> write -> verify -> rename
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer import __version__
from slicer.checkpoint import architectures, hub
from slicer.checkpoint.export import (
    DTYPES,
    check_output,
    refuse_quantized,
    sliced_config,
    write_checkpoint,
)
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import Sizes, measure_sizes
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES, atomic_directory, check_space
from slicer.errors import (
    ArchitectureError,
    HealError,
    PlanError,
    SourceError,
    UsageError,
    VerificationError,
)
from slicer.measure.calibration import CalibrationSpec
from slicer.plan import Amount, Plan
from slicer.progress import Progress
from slicer.select import deepest, rank, tail

if TYPE_CHECKING:
    import torch

    from slicer.heal.healing import Healing
    from slicer.measure.analysis import Distances
    from slicer.measure.calibration import TokenBatches
    from slicer.measure.stream import Walk

STRATEGIES = ("similarity", "deepest", "tail")
HEALINGS = ("none", "auto", "fold")
RUNNERS_UP = 3


@dataclass(frozen=True)
class Goal:
    """How deep to cut: exactly one field is set. Budgets ask for the smallest n that meets them."""

    drop: Amount | None = None
    keep: int | None = None
    max_params: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in asdict(self).values()) != 1:
            raise UsageError(
                "say how much to drop with exactly one of --drop, --keep, --max-params and --max-bytes"
            )

    def counts(self, depth: int) -> Iterable[int]:
        """The numbers of layers to drop to try, in order; `met` says when to stop."""
        if self.drop is not None:
            return (self.drop.resolve(depth),)
        if self.keep is not None:
            if not 0 < self.keep < depth:
                raise PlanError(
                    f"--keep {self.keep}: the model has {depth} layers; keep between 1 and {depth - 1}"
                )
            return (depth - self.keep,)
        return range(1, depth)

    def met(self, sizes: Sizes) -> bool:
        """Whether `sizes` is within the budget."""
        within_parameters = self.max_params is None or sizes.parameters <= self.max_params
        return within_parameters and (self.max_bytes is None or sizes.total_bytes <= self.max_bytes)

    def __str__(self) -> str:
        return next(f"--{k.replace('_', '-')} {v}" for k, v in asdict(self).items() if v is not None)


@dataclass(frozen=True)
class Options:
    """How to convert; every default of the command line lives here.

    Attributes:
        verify: "none", "load", "logits", or "auto": logits while the model fits in memory, load otherwise.
        dtype: None keeps the stored one; otherwise a key of `export.DTYPES` for the written tensors and the model
            that measures.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        memory: bytes that the weights may take; a larger model is read from disk a layer at a time. None: what is free.
        heal: "none"; "fold"; or "auto", which folds where there is calibration data, the architecture allows it and
            it lowers the loss on held-out text. None is "none", but a plan that was healed is healed again.
        fold: the solver, one of `slicer.heal.fold.SOLVERS`.
    """

    strategy: str = "similarity"
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    verify: str = "auto"
    dtype: str | None = None
    device: str = "auto"
    memory: int | None = None
    heal: str | None = None
    fold: str = "resolve"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    force: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False
    command: str | None = None


@dataclass(frozen=True)
class Summary:
    """What convert did: the plan, what it saves, how the result was checked."""

    out: Path | None
    plan: Plan
    before: Sizes
    after: Sizes
    verified: str
    logits_error: float | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: plain values, the plan under its own names."""
        plan = self.plan
        return {
            "out": None if self.out is None else str(self.out),
            "source": plan.source,
            "revision": plan.revision,
            "model_type": plan.model_type,
            "strategy": plan.strategy,
            "kept": list(plan.kept),
            "dropped": list(plan.dropped),
            "distance": plan.distance,
            "runners_up": list(plan.runners_up),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "healing": None if plan.healing is None else dict(plan.healing),
            "verified": self.verified,
            "logits_error": self.logits_error,
            "warnings": list(self.warnings),
        }


class _Model:
    """The source as a model to run: loaded when first needed, or walked from disk where it does not fit; let go before
    the result is checked."""

    def __init__(self, checkpoint: Checkpoint, options: Options, progress: Progress) -> None:
        self._checkpoint, self._options, self._progress = checkpoint, options, progress
        self._walk: Walk | None = None

    @property
    def fits(self) -> bool:
        """Whether it can be loaded."""
        from slicer.measure.stream import fits

        options = self._options
        return fits(self._checkpoint, dtype=options.dtype, device=options.device, memory_bytes=options.memory)

    def walk(self) -> Walk:
        """A walk over it."""
        if self._walk is None:
            from slicer.measure.stream import Walk

            if self.fits:
                self._progress.stage("Loading the model")
            else:
                self._progress.note(
                    "the model does not fit in memory: its layers are read from disk one at a time"
                    + (", out of pickled .bin files" if self._checkpoint.is_bin else "")
                )
            options = self._options
            self._walk = Walk.fitting(
                self._checkpoint,
                dtype=options.dtype,
                device=options.device,
                memory_bytes=options.memory,
                trust_remote_code=options.trust_remote_code,
            )
        return self._walk

    def release(self) -> None:
        self._walk = None
        gc.collect()


class _Data:
    """The calibration batches, read once when first needed."""

    def __init__(self, checkpoint: Checkpoint, options: Options, model: _Model, progress: Progress) -> None:
        self._checkpoint, self._options, self._model, self._progress = checkpoint, options, model, progress
        self._data: TokenBatches | None = None
        self.spec = options.calibration

    @property
    def at_hand(self) -> bool:
        """Whether healing may use it unasked: it was read already, or named."""
        return self._data is not None or self.spec.source is not None

    def get(self) -> TokenBatches:
        if self._data is None:
            from slicer.measure.calibration import token_batches

            walk = self._model.walk()
            self._progress.stage("Calibration data")
            self._data = token_batches(
                self.spec,
                self._checkpoint.path,
                walk.model,
                streamed=walk.streamed,
                trust_remote_code=self._options.trust_remote_code,
            )
        return self._data


def convert(
    source: str,
    goal: Goal | None,
    out: Path | None = None,
    options: Options | None = None,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Slice `source` (Hub id, directory or "demo") by `goal`, or by a saved `plan`, into the directory `out`.

    `out` defaults to the source's name with the new depth, in the working directory. Nothing appears at `out`
    unless everything succeeded. Raises SlicerError children; see `slicer.errors`.
    """
    options, progress = options or Options(), progress or Progress()
    _check_options(options, goal, plan)
    progress.stage("Opening the checkpoint")
    found = hub.resolve(source)
    checkpoint = Checkpoint.open(found.path)
    depth = checkpoint.depth
    refuse_quantized(checkpoint)
    checkpoint.check_layers()
    if out is not None and not options.dry_run:
        check_output(out, found.path, force=options.force)
    model = _Model(checkpoint, options, progress)
    data = _Data(checkpoint, options, model, progress)
    config_of = _Configs(checkpoint, options)
    distances: Distances | None = None
    if plan is not None:
        config_of(plan.kept if plan.depth == depth else _mismatch(plan, checkpoint))
        options = _healing_again(plan, options, data)
    else:
        assert goal is not None
        plan, distances = _choose(checkpoint, goal, options, model, data, config_of, progress)
    plan = replace(
        plan,
        source=source,
        revision=found.revision,
        model_type=checkpoint.config.get("model_type"),
        dtype=options.dtype,
        versions=library_versions(),
        command=options.command,
        parent=_parent(found.path),
        healing=None,
    )
    out = out or Path(f"{_short_name(source)}-{len(plan.kept)}L")
    cast = DTYPES[options.dtype] if options.dtype else None
    before, after = measure_sizes(checkpoint), measure_sizes(checkpoint, plan.kept, cast)
    warnings = tuple(architectures.warnings(checkpoint.config, plan.kept, config_of(plan.kept)))
    if options.dry_run:
        return Summary(None, plan, before, after, "nothing written", warnings=warnings)
    check_output(out, found.path, force=options.force)
    check_space(out, after.total_bytes)
    verify = _verification(options, model, progress)
    summary = Summary(out, plan, before, after, verify, warnings=warnings)
    healing = _heal(checkpoint, summary, model, data, options, progress)
    if healing is not None:
        summary = replace(summary, plan=replace(plan, healing=healing.record))
    return _write(checkpoint, summary, config_of(plan.kept), distances, model, healing, options, progress)


def _write(
    checkpoint: Checkpoint,
    summary: Summary,
    config: Mapping[str, Any],
    distances: Distances | None,
    model: _Model,
    healing: Healing | None,
    options: Options,
    progress: Progress,
) -> Summary:
    """Reference logits, then the directory, its figures and card, its checks; renamed into place at the end."""
    assert summary.out is not None
    probe: tuple[torch.Tensor, torch.Tensor] | None = None
    if summary.verified == "logits":
        progress.stage("Reference logits of the source with those layers bypassed")
        probe = _reference(checkpoint, summary.plan, model.walk(), healing)
    model.release()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(atomic_directory(summary.out, replace=options.force))
        replaced: Mapping[str, Any] = {}
        if healing is not None:
            from slicer.heal.healing import on_disk

            replaced = stack.enter_context(on_disk(healing))
        progress.stage("Writing", summary.after.total_bytes, "bytes")
        write_checkpoint(
            checkpoint,
            summary.plan,
            config,
            directory,
            dtype=options.dtype,
            max_shard_bytes=options.max_shard_bytes,
            progress=progress.advance,
            replaced=replaced,
        )
        if distances is not None:
            _draw(distances, summary.plan, directory / "slicer")
        (directory / "README.md").write_text(_card(checkpoint, summary, distances is not None), "utf-8")
        error = _check(checkpoint, directory, summary, model, healing, probe, options, progress)
    return replace(summary, logits_error=error)


def _reference(
    checkpoint: Checkpoint, plan: Plan, walk: Walk, healing: Healing | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few tokens, and the logits that the result must have: the source's, healed, with those layers bypassed."""
    from slicer.checkpoint import verify
    from slicer.heal.healing import healed

    config = architectures.text_config(checkpoint.config)
    tokens = verify.probe_tokens(config.get("vocab_size") or walk.model.config.vocab_size, seed=0)
    changes = healing.changes if healing is not None else {}
    if walk.streamed:
        return tokens, _walked_logits(walk, tokens, plan.kept, changes)
    with healed(walk.model, changes):
        return tokens, verify.reference_logits(walk.model, tokens, plan.dropped)


def _check(
    checkpoint: Checkpoint,
    directory: Path,
    summary: Summary,
    model: _Model,
    healing: Healing | None,
    probe: tuple[torch.Tensor, torch.Tensor] | None,
    options: Options,
    progress: Progress,
) -> float | None:
    """Check what was written as far as `summary.verified` says; returns how far its logits are off, where compared."""
    if summary.verified == "none" and healing is None:
        return None  # without torch, whose import takes longer than a small copy
    from slicer.checkpoint import verify

    if summary.verified != "none":
        progress.stage("Checking every key and shape")
        verify.check_load(directory, trust_remote_code=options.trust_remote_code)
    if healing is not None:
        from slicer.heal.healing import as_written

        verify.check_tensors(directory, as_written(checkpoint, summary.plan, healing))
    if probe is None:
        return None
    progress.stage("Comparing logits")
    tokens, reference = probe
    if not model.fits:
        return _check_walked(directory, reference, tokens, options)
    return verify.check_logits(
        directory,
        reference,
        tokens,
        dtype=options.dtype or "auto",
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )


def _walked_logits(
    walk: Walk, tokens: torch.Tensor, layers: Iterable[int], changes: Mapping[int, Any]
) -> torch.Tensor:
    """The logits of `tokens` after these layers alone, healed by `changes`: [batch, seq, vocabulary], on the CPU."""
    from slicer.heal.outputs import applied

    states, order = walk.start([tokens]), tuple(layers)
    with walk.along(order):
        for i in order:
            with walk.layer(i) as layer, contextlib.ExitStack() as stack:
                if i in changes:
                    stack.enter_context(applied(layer, changes[i]))
                walk.advance(i, states)
    return walk.logits(states, 0).cpu()


def _check_walked(out: Path, reference: torch.Tensor, tokens: torch.Tensor, options: Options) -> float:
    """`verify.check_logits` with the result's layers read one at a time."""
    from slicer.checkpoint import verify
    from slicer.measure.stream import Walk

    try:
        walk = Walk.out_of_core(
            out,
            dtype=options.dtype or "auto",
            device=options.device,
            memory_bytes=options.memory,
            trust_remote_code=options.trust_remote_code,
        )
        logits = _walked_logits(walk, tokens, range(walk.depth), {})
    except SourceError as error:
        raise VerificationError(f"the written checkpoint does not load: {error}") from None
    return verify.compare_logits(logits, reference)


def _heal(
    checkpoint: Checkpoint,
    summary: Summary,
    model: _Model,
    data: _Data,
    options: Options,
    progress: Progress,
) -> Healing | None:
    """The new weights around the cut, or None; unasked, only where that can be done and helps."""
    asked = options.heal == "fold"
    if options.heal in (None, "none"):
        return None
    if not asked and not data.at_hand:
        progress.note("not healed: there is no calibration data at hand; --calibration DATA heals the cut")
        return None
    from slicer.heal.healing import fold_checkpoint

    walk, batches = model.walk(), data.get()
    cast = DTYPES[options.dtype] if options.dtype else None
    try:
        healing = fold_checkpoint(
            checkpoint, walk, batches, summary.plan.dropped, solver=options.fold, cast=cast, progress=progress
        )
    except (HealError, ArchitectureError) as error:
        if asked:
            raise
        progress.note(f"not healed: {error}")
        return None
    if not healing.helps:
        loss = healing.record["loss"]
        words = (
            f"it does not lower the loss on calibration text held out ({loss['healed']:.4f} nats a token, "
            f"{loss['sliced']:.4f} without)"
        )
        progress.note(f"healed as asked, but {words}" if asked else f"not healed: {words}")
        return healing if asked else None
    return healing


def _healing_again(plan: Plan, options: Options, data: _Data) -> Options:
    """A plan that was healed is healed again on the same text, unless other options are given."""
    record = plan.healing
    if record is None or options.heal is not None or options.calibration.source is not None:
        return options
    given = dict(record.get("calibration") or {})
    names = {f.name for f in fields(CalibrationSpec)}
    data.spec = CalibrationSpec(**{k: v for k, v in given.items() if k in names})
    return replace(options, heal="fold", fold=str(record.get("solver", options.fold)))


class _Configs:
    """The rewritten config of each cut, made once; also the test whether a cut can be expressed."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._made: dict[tuple[int, ...], dict[str, Any]] = {}

    def __call__(self, kept: tuple[int, ...]) -> dict[str, Any]:
        if kept not in self._made:
            self._made[kept] = sliced_config(
                self._checkpoint,
                Plan(self._checkpoint.depth, kept),
                dtype=self._options.dtype,
                trust_remote_code=self._options.trust_remote_code,
            )
        return self._made[kept]

    def expresses(self, kept: tuple[int, ...]) -> bool:
        try:
            self(kept)
        except ArchitectureError:
            return False
        return True


def _choose(
    checkpoint: Checkpoint,
    goal: Goal,
    options: Options,
    model: _Model,
    data: _Data,
    config_of: _Configs,
    progress: Progress,
) -> tuple[Plan, Distances | None]:
    """The plan that reaches the goal, and the distances it was chosen by (similarity only)."""
    depth = checkpoint.depth
    if goal.drop is not None and goal.drop.layers is not None:
        plan = Plan.dropping(depth, goal.drop.layers)
        config_of(plan.kept)
        return plan, None
    counts = goal.counts(depth)
    cast = DTYPES[options.dtype] if options.dtype else None
    if goal.met(measure_sizes(checkpoint, cast=cast)) and (goal.max_params or goal.max_bytes):
        raise PlanError(f"{goal}: the model already meets it with all {depth} layers; nothing to drop")
    _check_reach(checkpoint, goal, cast)
    best: Callable[[int], Plan]
    distances: Distances | None = None
    if options.strategy == "similarity":
        distances, calibration = _measure(model, data, progress)
        best = _by_similarity(distances, calibration, options, config_of, progress)
    else:
        dropped = {"deepest": deepest, "tail": tail}[options.strategy]

        def best(n: int) -> Plan:
            plan = Plan.dropping(depth, dropped(depth, n), strategy=options.strategy)
            config_of(plan.kept)
            return plan

    for n in counts:
        plan = best(n)
        if goal.met(measure_sizes(checkpoint, plan.kept, cast)):
            return plan, distances
    raise PlanError(f"{goal}: out of reach of the strategy {options.strategy}; name the layers to drop")


def _check_reach(checkpoint: Checkpoint, goal: Goal, cast: str | None) -> None:
    """Raise PlanError, before anything is measured, when not even a single layer meets the budget."""
    layers = measure_sizes(checkpoint, cast=cast).layer_bytes
    lightest = measure_sizes(checkpoint, (min(range(len(layers)), key=layers.__getitem__),), cast)
    if not goal.met(lightest):
        raise PlanError(
            f"{goal}: out of reach; one layer alone still has {lightest.parameters} parameters "
            f"and {lightest.total_bytes} bytes"
        )


def _by_similarity(
    distances: Distances,
    calibration: Mapping[str, Any],
    options: Options,
    config_of: _Configs,
    progress: Progress,
) -> Callable[[int], Plan]:
    depth = distances.depth

    def best(n: int) -> Plan:
        """Equation 6, among the blocks that the architecture's config can express."""
        ranked = rank(distances, n)
        cuts = [(c, tuple(i for i in range(depth) if not c.start <= i < c.start + n)) for c in ranked]
        at = next((i for i, (_, kept) in enumerate(cuts) if config_of.expresses(kept)), None)
        if at is None:
            config_of(cuts[0][1])  # raises the reason
            raise AssertionError
        if at:
            first = ranked[0]
            progress.note(
                f"layers {first.start}-{first.start + n - 1} lie closest, but this architecture's config "
                "cannot express that cut; the closest block that it can express was taken"
            )
        others = [c for i, c in enumerate(ranked) if i != at][:RUNNERS_UP]
        return Plan(
            depth,
            cuts[at][1],
            strategy="similarity",
            distance=ranked[at].distance,
            runners_up=tuple(
                {"block": f"{c.start}-{c.start + n - 1}", "distance": c.distance} for c in others
            ),
            calibration=dict(calibration),
            seed=options.calibration.seed,
        )

    return best


def _measure(model: _Model, data: _Data, progress: Progress) -> tuple[Distances, dict[str, Any]]:
    from slicer.measure.summary import measure, measure_walk

    walk, found = model.walk(), data.get()
    if walk.streamed:
        with tempfile.TemporaryDirectory(prefix="slicer-") as work:
            return measure_walk(walk, found.batches, Path(work), progress=progress), found.provenance
    progress.stage("Measuring layers", len(found.batches), "batches")
    done = 0

    def tick(now: int, _total: int) -> None:
        nonlocal done
        progress.advance(now - done)
        done = now

    return measure(walk.model, found.batches, progress=tick), found.provenance


def _verification(options: Options, model: _Model, progress: Progress) -> str:
    if options.verify != "auto":
        return options.verify
    if model.fits:
        return "logits"
    progress.note("the model does not fit in memory: its keys and shapes are checked, its logits are not")
    return "load"


def _draw(distances: Distances, plan: Plan, directory: Path) -> None:
    from slicer.judge import plots

    (directory / "distances.json").write_text(distances.to_json(), "utf-8")
    n = len(plan.dropped)
    plots.heat_map(distances, directory / "distances.png", chosen=(plan.dropped[0], n))
    plots.curves(distances, directory / "curves.png", chosen=(plan.dropped[0], n))


def _card(checkpoint: Checkpoint, summary: Summary, figures: bool) -> str:
    from slicer.checkpoint import card

    return card.for_slice(checkpoint, summary.plan, summary.before, summary.after, figures=figures)


def _check_options(options: Options, goal: Goal | None, plan: Plan | None) -> None:
    if (goal is None) == (plan is None):
        raise UsageError(
            "say how much to drop (--drop, --keep, --max-params, --max-bytes) or give --plan, not both"
        )
    if options.strategy not in STRATEGIES:
        raise UsageError(f"strategy {options.strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if options.heal is not None and options.heal not in HEALINGS:
        raise UsageError(f"heal {options.heal!r}: choose one of {', '.join(HEALINGS)}")
    if options.verify not in ("auto", "none", "load", "logits"):
        raise UsageError(f"verify {options.verify!r}: choose auto, none, load or logits")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r}: choose one of {', '.join(DTYPES)}")


def _mismatch(plan: Plan, checkpoint: Checkpoint) -> tuple[int, ...]:
    raise PlanError(
        f"the plan is for a model of {plan.depth} layers but {checkpoint.path} has {checkpoint.depth}; "
        "make a plan for this one with --dry-run"
    )


def _short_name(source: str) -> str:
    name = source.rsplit("@", 1)[0] if not Path(source).exists() else str(Path(source).resolve())
    return Path(name).name or "model"


def library_versions() -> dict[str, str]:
    """What made an output: slicer and the libraries that its figures depend on."""
    from importlib.metadata import version

    return {"slicer-llm": __version__} | {
        name: version(name) for name in ("torch", "transformers", "safetensors")
    }


def _parent(path: Path) -> dict[str, Any] | None:
    """The plan of a source that was itself sliced."""
    import json

    if not (path / "slicer" / "plan.json").is_file():
        return None
    plan = Plan.load(path)
    return dict(json.loads(plan.to_json()))
