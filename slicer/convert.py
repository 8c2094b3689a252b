"""The main job, its stages in order: open, measure, select, export, verify, and only then appear.

resolve -> Checkpoint.open -> [load -> calibrate -> measure -> select] -> [heal] -> write -> verify -> rename
"""

from __future__ import annotations

import contextlib
import gc
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
from slicer.errors import ArchitectureError, HealError, PlanError, UsageError
from slicer.measure.calibration import CalibrationSpec
from slicer.plan import Amount, Plan
from slicer.progress import Progress
from slicer.select import deepest, rank, tail

if TYPE_CHECKING:
    import torch

    from slicer.heal.healing import Healing
    from slicer.measure.analysis import Distances
    from slicer.measure.calibration import TokenBatches

STRATEGIES = ("similarity", "deepest", "tail")
HEALINGS = ("none", "fold")
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
        heal: "none" or "fold"; None folds where there is calibration data and the architecture allows it.
        fold: the solver, one of `slicer.heal.fold.SOLVERS`.
    """

    strategy: str = "similarity"
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    verify: str = "auto"
    dtype: str | None = None
    device: str = "auto"
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
    """The source as a transformers model, loaded once when first needed and let go before the result is loaded."""

    def __init__(self, checkpoint: Checkpoint, options: Options, progress: Progress) -> None:
        self._checkpoint, self._options, self._progress = checkpoint, options, progress
        self._model: Any = None

    def get(self) -> Any:
        if self._model is None:
            from slicer.checkpoint.model import load_model

            self._progress.stage("Loading the model")
            options = self._options
            self._model = load_model(
                self._checkpoint.path,
                dtype=options.dtype or "auto",
                device=options.device,
                trust_remote_code=options.trust_remote_code,
            )
        return self._model

    def release(self) -> None:
        self._model = None
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

            loaded = self._model.get()
            self._progress.stage("Calibration data")
            self._data = token_batches(
                self.spec,
                self._checkpoint.path,
                loaded,
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
        versions=_versions(),
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
    verify = _verification(options, before, progress)
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
    from slicer.checkpoint import verify
    from slicer.heal.healing import as_written, healed, replacements

    assert summary.out is not None
    probe: tuple[torch.Tensor, torch.Tensor] | None = None
    if summary.verified == "logits":
        reference = model.get()
        progress.stage("Reference logits of the source with those layers bypassed")
        vocabulary = (
            architectures.text_config(checkpoint.config).get("vocab_size") or reference.config.vocab_size
        )
        tokens = verify.probe_tokens(vocabulary, seed=0)
        with contextlib.ExitStack() as stack:
            if healing is not None:
                stack.enter_context(healed(reference, healing.changes))
            probe = tokens, verify.reference_logits(reference, tokens, summary.plan.dropped)
        del reference
    model.release()
    replaced = replacements(checkpoint, healing) if healing is not None else None
    with atomic_directory(summary.out, replace=options.force) as directory:
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
        if summary.verified != "none":
            progress.stage("Checking every key and shape")
            verify.check_load(directory, trust_remote_code=options.trust_remote_code)
        if healing is not None:
            verify.check_tensors(directory, as_written(checkpoint, summary.plan, healing))
        if probe is not None:
            progress.stage("Comparing logits")
            error = verify.check_logits(
                directory,
                probe[1],
                probe[0],
                dtype=options.dtype or "auto",
                device=options.device,
                trust_remote_code=options.trust_remote_code,
            )
            summary = replace(summary, logits_error=error)
    return summary


def _heal(
    checkpoint: Checkpoint,
    summary: Summary,
    model: _Model,
    data: _Data,
    options: Options,
    progress: Progress,
) -> Healing | None:
    """The new weights around the cut, or None; unasked, only where that can be done and helps."""
    asked = options.heal is not None
    if options.heal == "none":
        return None
    if not asked and not data.at_hand:
        progress.note("not healed: there is no calibration data at hand; --calibration DATA heals the cut")
        return None
    from slicer.checkpoint.verify import fits_in_memory
    from slicer.heal.healing import fold_checkpoint
    from slicer.measure.stream import Walk

    batches = data.get()
    if fits_in_memory(summary.before.total_bytes, options.device):
        walk = Walk.in_memory(model.get())
    else:
        walk = Walk.out_of_core(
            checkpoint,
            dtype=options.dtype or "auto",
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
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

    smallest: Sizes | None = None
    for n in counts:
        plan = best(n)
        smallest = measure_sizes(checkpoint, plan.kept, cast)
        if goal.met(smallest):
            return plan, distances
    assert smallest is not None
    raise PlanError(
        f"{goal}: out of reach; one layer alone still has {smallest.parameters} parameters "
        f"and {smallest.total_bytes} bytes"
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
    from slicer.measure.analysis import measure

    loaded, found = model.get(), data.get()
    progress.stage("Measuring layers", len(found.batches), "batches")
    done = 0

    def tick(now: int, _total: int) -> None:
        nonlocal done
        progress.advance(now - done)
        done = now

    return measure(loaded, found.batches, progress=tick), found.provenance


def _verification(options: Options, before: Sizes, progress: Progress) -> str:
    if options.verify != "auto":
        return options.verify
    from slicer.checkpoint.verify import fits_in_memory

    if fits_in_memory(before.total_bytes, options.device):
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


def _versions() -> dict[str, str]:
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
