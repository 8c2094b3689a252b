"""The plan -> the directory: reference logits, weights, figures and card, checks; it appears when all is well."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.checkpoint import architectures
from slicer.checkpoint.export import write_checkpoint
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import SourceError, VerificationError
from slicer.materials import SourceModel
from slicer.options import Options, Summary
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime.files import atomic_directory

if TYPE_CHECKING:
    import torch

    from slicer.choose import Measured
    from slicer.heal.carry import Standing
    from slicer.heal.healing import Healing
    from slicer.measure.stream import Walk


def write(
    checkpoint: Checkpoint,
    summary: Summary,
    config: Mapping[str, Any],
    measured: Measured | None,
    model: SourceModel,
    healing: Healing | None,
    standing: Standing | None,
    options: Options,
    progress: Progress,
) -> Summary:
    """Reference logits, then the directory, its figures and card, its checks; renamed into place at the end."""
    assert summary.out is not None
    probe: tuple[torch.Tensor, torch.Tensor] | None = None
    if summary.verified == "logits":
        progress.stage("Reference logits of the source with those layers bypassed")
        probe = _reference(checkpoint, summary.plan, model.walk(), healing, standing)
    model.release()
    replaced = None
    if healing is not None:
        from slicer.heal.healing import replacements

        replaced = replacements(checkpoint, healing)
    added = None
    if standing is not None:
        config, replaced, added = standing.config, dict(standing.replaced), standing.added
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
            added=added,
        )
        if measured is not None:
            _draw(measured, summary.plan, directory / "slicer")
        (directory / "README.md").write_text(_card(checkpoint, summary, measured is not None), "utf-8")
        error = _check(checkpoint, directory, summary, model, healing, probe, options, progress)
    return replace(summary, logits_error=error)


def _reference(
    checkpoint: Checkpoint, plan: Plan, walk: Walk, healing: Healing | None, standing: Standing | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few tokens, and the logits that the result must have: the source's, healed, with those layers bypassed."""
    from slicer.checkpoint import verify
    from slicer.heal.emulation import emulated
    from slicer.heal.healing import healed

    config = architectures.text_config(checkpoint.config)
    tokens = verify.probe_tokens(config.get("vocab_size") or walk.model.config.vocab_size, seed=0)
    changes = healing.changes if healing is not None else {}
    if walk.streamed:
        return tokens, _walked_logits(walk, tokens, plan, changes, standing)
    if standing is not None:
        with emulated(walk.model, plan, standing.found):
            return tokens, verify.logits_of(walk.model, tokens)
    with healed(walk.model, changes):
        return tokens, verify.reference_logits_of(walk.model, tokens, plan)


def _check(
    checkpoint: Checkpoint,
    directory: Path,
    summary: Summary,
    model: SourceModel,
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
    walk: Walk,
    tokens: torch.Tensor,
    plan: Plan | None,
    changes: Mapping[int, Any],
    standing: Standing | None = None,
) -> torch.Tensor:
    """The logits of `tokens` with what `plan` drops left out (None: nothing), healed by `changes` and with `standing`
    in its place: [batch, seq, vocabulary], on the CPU."""
    from slicer.checkpoint.parts import without_parts
    from slicer.heal.emulation import attached, norm_eps
    from slicer.heal.outputs import applied

    no_attention, no_ffn = (frozenset(), frozenset()) if plan is None else plan.gone
    states = walk.start([tokens])
    order = [i for i in range(walk.depth) if i not in no_attention or i not in no_ffn]
    with walk.along(order):
        for i in order:
            with walk.layer(i) as layer, contextlib.ExitStack() as stack:
                if i in changes:
                    stack.enter_context(applied(layer, changes[i]))
                stack.enter_context(without_parts(layer, i in no_attention, i in no_ffn))
                if standing is not None:
                    stack.enter_context(attached(layer, i, standing.found, norm_eps(walk.model)))
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
        logits = _walked_logits(walk, tokens, None, {})
    except SourceError as error:
        raise VerificationError(f"the written checkpoint does not load: {error}") from None
    return verify.compare_logits(logits, reference)


def _draw(measured: Measured, plan: Plan, directory: Path) -> None:
    from slicer.judge import plots

    distances = measured.layers
    (directory / "distances.json").write_text(distances.to_json(), "utf-8")
    if measured.halves is not None and plan.below_layers:
        (directory / "half-layers.json").write_text(measured.halves.to_json(), "utf-8")
    n = len(plan.dropped)
    chosen = (plan.dropped[0], n) if n and not plan.joined else None
    plots.heat_map(distances, directory / "distances.png", chosen=chosen, offset=plan.half_offset)
    plots.curves(distances, directory / "curves.png", chosen=chosen, offset=plan.half_offset)


def _card(checkpoint: Checkpoint, summary: Summary, figures: bool) -> str:
    from slicer.checkpoint import card

    return card.for_slice(checkpoint, summary.plan, summary.before, summary.after, figures=figures)
