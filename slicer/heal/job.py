"""`slicer heal`: a sliced checkpoint and its source -> the sliced checkpoint with the cut closed, verified."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slicer.checkpoint import architectures, card, hub, verify
from slicer.checkpoint import tensors as stored
from slicer.checkpoint.export import DTYPES, check_output, copy_unchanged, refuse_quantized
from slicer.checkpoint.model import load_model
from slicer.checkpoint.reader import Checkpoint, TensorSpan
from slicer.checkpoint.sizes import measure_sizes
from slicer.checkpoint.sublayers import new_keys, tensors_of
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES
from slicer.closing import Compensation, repair
from slicer.errors import HealError, PlanError, UsageError
from slicer.measure.calibration import CalibrationSpec, TokenBatches, token_batches
from slicer.measure.stream import Walk
from slicer.model.pruned import pruned_logits
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.files import atomic_directory, check_space


@dataclass(frozen=True)
class HealOptions:
    """How to heal; every default of the command line lives here.

    Attributes:
        fold: the solver, one of `slicer.heal.compensate.fold.SOLVERS`.
        verify: "none", "load", "logits", or "auto": logits while the source fits in memory, load otherwise.
    """

    fold: str = "resolve"
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    verify: str = "auto"
    device: str = "auto"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    force: bool = False
    trust_remote_code: bool = False
    command: str | None = None


@dataclass(frozen=True)
class Healed:
    """What `heal` did."""

    out: Path
    plan: Plan
    verified: str
    logits_error: float | None
    helps: bool
    rounding_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "source": self.plan.source,
            "dropped": list(self.plan.dropped),
            "healing": self.plan.healing and self.plan.healing.to_dict(),
            "verified": self.verified,
            "logits_error": self.logits_error,
            "rounding_error": self.rounding_error,
        }


def heal(
    sliced: str,
    source: str | None,
    out: Path,
    options: HealOptions | None = None,
    *,
    data: TokenBatches | None = None,
    progress: Progress | None = None,
) -> Healed:
    """Heal `sliced`, which slicer made of `source` (None: what its plan names), into the directory `out`.

    `data`, where given, is what it is folded on, instead of what `options.calibration` names.

    Nothing appears at `out` unless everything succeeded. Raises SlicerError children: PlanError where `sliced` has
    no plan, HealError where `source` is not what it was sliced from.
    """
    options, progress = options or HealOptions(), progress or Progress()
    if options.verify not in ("auto", "none", "load", "logits"):
        raise UsageError(f"verify {options.verify!r}: choose auto, none, load or logits")
    progress.stage("Opening the checkpoints")
    cut = Checkpoint.open(hub.resolve(sliced).path)
    plan = Plan.load(cut.path)
    if not plan.complete:
        raise HealError(
            f"{sliced}: lacks parts of layers, which are healed as they are dropped: slicer convert --heal fold or "
            "--emulate"
        )
    if plan.merged:
        raise HealError(
            f"{sliced}: an adapter was merged into it, and the fold is solved on the source, without it; fold before "
            "merging, or train on: --method lora"
        )
    whole = source_of(cut, plan, sliced, source, out, force=options.force)
    dtype = plan.dtype or "auto"
    fits = memory.fits(whole.bytes_as(dtype), options.device)
    remote = options.trust_remote_code
    if fits:
        progress.stage("Loading the source")
        model = load_model(whole.path, dtype=dtype, device=options.device, trust_remote_code=remote)
        walk = Walk.in_memory(model)
    else:
        walk = Walk.out_of_core(whole, dtype=dtype, device=options.device, trust_remote_code=remote)
        model = walk.model
    if data is None:
        progress.stage("Calibration data")
        data = token_batches(options.calibration, whole.path, model, trust_remote_code=remote)
    cast = DTYPES[plan.dtype] if plan.dtype else None
    patch = repair(whole, walk, plan, data, Compensation(solver=options.fold), cast=cast, progress=progress)
    assert patch.record is not None
    helps = patch.record.loss.falls
    plan = replace(plan, healing=replace(patch.record, command=options.command))
    checked = options.verify if options.verify != "auto" else "logits" if fits else "load"
    probe = None
    if checked == "logits":
        progress.stage("Reference logits of the source, healed, with those layers bypassed")
        vocabulary = architectures.text_config(whole.config).get("vocab_size") or model.config.vocab_size
        tokens = verify.probe_tokens(vocabulary)
        probe = tokens, pruned_logits(walk, tokens, plan, patch.edits)
    del model, walk
    gc.collect()
    error: float | None = None
    with atomic_directory(out, replace=options.force) as directory:
        progress.stage("Writing", cut.total_bytes, "bytes")
        names = new_keys(whole, plan, patch.replaced)
        healed_spans = {names[key]: span for key, span in patch.replaced.items()}
        copy_unchanged(
            cut,
            directory,
            replaced={**as_before(cut, whole), **healed_spans},
            dtype=plan.dtype,
            max_shard_bytes=options.max_shard_bytes,
            progress=progress.advance,
        )
        (directory / "slicer" / "plan.json").write_text(plan.to_json(), "utf-8")
        figures = (directory / "slicer" / "distances.png").is_file()
        text = card.for_slice(whole, plan, measure_sizes(whole), measure_sizes(cut), figures=figures)
        (directory / "README.md").write_text(text, "utf-8")
        if checked != "none":
            progress.stage("Checking every key and shape")
            verify.check_load(directory, trust_remote_code=remote)
        verify.check_tensors(directory, patch.tensors(whole, plan))
        if probe is not None:
            progress.stage("Comparing logits")
            error = verify.check_logits(
                directory, probe[1], probe[0], dtype=dtype, device=options.device, trust_remote_code=remote
            )
    return Healed(out, plan, checked, error, helps)


def source_of(
    cut: Checkpoint, plan: Plan, name: str, source: str | None, out: Path, *, force: bool
) -> Checkpoint:
    """What `cut`, called `name`, was sliced from: `source`, or else what its plan says; checked to be that.

    Raises PlanError where the plan names none, HealError where it is another model, OutputError where a result of the
    size of `cut` cannot be written to `out`.
    """
    origin = source or plan.source
    if origin is None:
        raise PlanError(f"{name}: its plan names no source; give it with --from")
    whole = Checkpoint.open(hub.resolve(origin).path)
    refuse_quantized(whole)
    for path in (cut.path, whole.path):
        check_output(out, path, force=force)
    check_source(cut, whole, plan)
    check_space(out, cut.total_bytes)
    return whole


def check_source(cut: Checkpoint, whole: Checkpoint, plan: Plan) -> None:
    """Raise HealError unless every tensor of `cut` is that of `whole` under its plan (or was healed, or merged)."""
    if plan.depth != whole.depth or len(plan.kept) != cut.depth:
        raise HealError(
            f"{cut.path}: sliced from {plan.depth} layers to {len(plan.kept)}, but {whole.path} has {whole.depth}; "
            "give the source it was sliced from with --from"
        )
    expected = tensors_of(whole, plan)
    before = _healed_before(cut, whole) | _merged(plan)
    other = sorted(expected.keys() ^ cut.tensors.keys())
    if other:
        raise HealError(f"{whole.path}: is not the source of {cut.path}: tensor {other[0]} is in one only")
    for key, span in cut.tensors.items():
        if key in before:
            continue
        if span.shape != expected[key].shape or not _alike(span, expected[key]):
            raise HealError(
                f"{whole.path}: is not the source of {cut.path}: tensor {key} differs; give the source it was sliced "
                "from with --from"
            )


def _alike(a: TensorSpan, b: TensorSpan) -> bool:
    """Whether two tensors of one shape begin alike (their first millions of elements), in the dtype of the first."""
    return next(stored.chunks(a, a.dtype), b"") == next(stored.chunks(b, a.dtype), b"")


def _healed_before(cut: Checkpoint, whole: Checkpoint) -> set[str]:
    """Keys of the sliced checkpoint whose tensors an earlier healing wrote."""
    plan = Plan.load(cut.path)
    return set(new_keys(whole, plan, plan.healing.tensors if plan.healing else ()).values())


def _merged(plan: Plan) -> set[str]:
    """Keys of the sliced checkpoint that adapters were merged into."""
    return {key for record in plan.merged for key in record.tensors}


def as_before(cut: Checkpoint, whole: Checkpoint) -> dict[str, TensorSpan]:
    """What an earlier healing changed, as it was in the source: the new one starts from there.

    Raises HealError where an adapter was merged into such a tensor, which would be lost.
    """
    if both := sorted(_healed_before(cut, whole) & _merged(Plan.load(cut.path))):
        raise HealError(
            f"{cut.path}: {both[0]} was healed and then an adapter was merged into it; the cut as it was cannot be had "
            "without losing the adapter: train with --start fold"
        )
    fresh = tensors_of(whole, Plan.load(cut.path))
    return {key: fresh[key] for key in _healed_before(cut, whole) if key in fresh}
