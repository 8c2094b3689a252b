"""The plan -> the directory: reference logits, weights, figures and card, checks; it appears when all is well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.checkpoint.architectures import table as architectures
from slicer.checkpoint.export import write_checkpoint
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import SourceError, VerificationError
from slicer.jobs.materials import SourceModel
from slicer.jobs.options import Options, Summary
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime.files import atomic_directory

if TYPE_CHECKING:
    import torch

    from slicer.heal.patch import Patch
    from slicer.measure.analysis import Analysis
    from slicer.model.walk import Walk


def write(
    checkpoint: Checkpoint,
    summary: Summary,
    config: Mapping[str, Any],
    measured: Analysis | None,
    model: SourceModel,
    patch: Patch | None,
    options: Options,
    progress: Progress,
) -> Summary:
    """Reference logits, then the directory, its figures and card, its checks; renamed into place at the end."""
    assert summary.out is not None
    probe: tuple[torch.Tensor, torch.Tensor] | None = None
    if summary.verified == "logits":
        progress.stage("Reference logits of the source with those layers bypassed")
        probe = _reference(checkpoint, summary.plan, model.walk(), patch)
    model.release()
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
            replaced=patch.replaced if patch is not None else None,
            added=patch.added if patch is not None else None,
        )
        if measured is not None:
            _draw(measured, summary.plan, directory / "slicer")
        (directory / "README.md").write_text(_card(checkpoint, summary, measured is not None), "utf-8")
        error = _check(checkpoint, directory, summary, model, patch, probe, options, progress)
    return replace(summary, logits_error=error)


def _reference(
    checkpoint: Checkpoint, plan: Plan, walk: Walk, patch: Patch | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few tokens, and the logits that the result must have: those of the pruned source, repaired by `patch`."""
    from slicer.model import verify
    from slicer.model.pruned import pruned_logits

    config = architectures.text_config(checkpoint.config)
    tokens = verify.probe_tokens(config.get("vocab_size") or walk.model.config.vocab_size, seed=0)
    return tokens, pruned_logits(walk, tokens, plan, patch.edits if patch is not None else None)


def _check(
    checkpoint: Checkpoint,
    directory: Path,
    summary: Summary,
    model: SourceModel,
    patch: Patch | None,
    probe: tuple[torch.Tensor, torch.Tensor] | None,
    options: Options,
    progress: Progress,
) -> float | None:
    """Check what was written as far as `summary.verified` says; returns how far its logits are off, where compared."""
    if summary.verified == "none" and patch is None:
        return None  # without torch, whose import takes longer than a small copy
    from slicer.model import verify

    if summary.verified != "none":
        progress.stage("Checking every key and shape")
        verify.check_load(directory, trust_remote_code=options.trust_remote_code)
    if patch is not None:
        verify.check_tensors(directory, patch.tensors(checkpoint, summary.plan))
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


def _check_walked(out: Path, reference: torch.Tensor, tokens: torch.Tensor, options: Options) -> float:
    """`verify.check_logits` with the result's layers read one at a time."""
    from slicer.model import verify
    from slicer.model.pruned import pruned_logits
    from slicer.model.walk import Walk

    try:
        walk = Walk.out_of_core(
            out,
            dtype=options.dtype or "auto",
            device=options.device,
            memory_bytes=options.memory,
            trust_remote_code=options.trust_remote_code,
        )
        logits = pruned_logits(walk, tokens)
    except SourceError as error:
        raise VerificationError(f"the written checkpoint does not load: {error}") from None
    return verify.compare_logits(logits, reference)


def _draw(measured: Analysis, plan: Plan, directory: Path) -> None:
    from slicer.figures import layers

    distances = measured.distances()
    (directory / "distances.json").write_text(distances.to_json(), "utf-8")
    if measured.sublayers and plan.below_layers:
        (directory / "half-layers.json").write_text(measured.halves().to_json(), "utf-8")
    n = len(plan.dropped)
    chosen = (plan.dropped[0], n) if n and not plan.joined else None
    layers.heat_map(distances, directory / "distances.png", chosen=chosen, offset=plan.half_offset)
    layers.curves(distances, directory / "curves.png", chosen=chosen, offset=plan.half_offset)


def _card(checkpoint: Checkpoint, summary: Summary, figures: bool) -> str:
    from slicer.checkpoint import card

    return card.for_slice(checkpoint, summary.plan, summary.before, summary.after, figures=figures)
