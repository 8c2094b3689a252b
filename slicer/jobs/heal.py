"""`slicer heal`: a sliced checkpoint and its source -> the sliced checkpoint with the cut closed, verified."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slicer.checkpoint import card, hub
from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.cut import as_before, source_of
from slicer.checkpoint.export import copy_unchanged
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import measure_sizes
from slicer.checkpoint.sublayers import new_keys
from slicer.checkpoint.tensors import DTYPES
from slicer.checkpoint.writer import DEFAULT_SHARD_BYTES
from slicer.data.calibration import TokenBatches, token_batches
from slicer.data.sources import TextSpec
from slicer.errors import HealError, UsageError
from slicer.jobs.repair import Compensation, repair
from slicer.model import verify
from slicer.model.load import load_model
from slicer.model.pruned import pruned_logits
from slicer.model.walk import Walk
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.files import atomic_directory


@dataclass(frozen=True)
class HealOptions:
    """How to heal; every default of the command line lives here.

    Attributes:
        fold: the solver, one of `slicer.heal.compensate.fold.SOLVERS`.
        verify: "none", "load", "logits", or "auto": logits while the source fits in memory, load otherwise.
    """

    fold: str = "resolve"
    calibration: TextSpec = field(default_factory=TextSpec)
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
