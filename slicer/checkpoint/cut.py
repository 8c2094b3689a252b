"""`slicer heal`: a sliced checkpoint and its source -> the sliced checkpoint with the cut closed, verified."""

from __future__ import annotations

from pathlib import Path

from slicer.checkpoint import hub, tensors
from slicer.checkpoint.export import check_output
from slicer.checkpoint.reader import Checkpoint, refuse_quantized
from slicer.checkpoint.sublayers import new_keys, tensors_of
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import HealError, PlanError
from slicer.plan.plan import Plan
from slicer.runtime.files import check_space


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
    return next(tensors.chunks(a, a.dtype), b"") == next(tensors.chunks(b, a.dtype), b"")


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
