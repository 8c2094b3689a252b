"""A checkpoint that slicer made, beside the source it was made of: opened together, and checked to belong together."""

from __future__ import annotations

from dataclasses import dataclass

from slicer.checkpoint import hub, tensors
from slicer.checkpoint.hub import Source, open_source
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sublayers import names_of, tensors_of
from slicer.checkpoint.tensors import TensorSpan
from slicer.errors import HealError, PlanError
from slicer.plan.plan import Plan


@dataclass(frozen=True)
class CutOnDisk:
    """A cut of whole or joined layers, and the source that it was sliced from.

    Every tensor of `checkpoint` is that of `source.checkpoint` under `plan`, but for those that `plan` records as
    repaired or merged.
    """

    checkpoint: Checkpoint
    plan: Plan
    source: Source


def open_cut(cut: str, source: str | None = None) -> CutOnDisk:
    """Open `cut` (Hub id or directory) and its `source`; None: the one that its plan names.

    Raises PlanError if there is no plan or it names no source, HealError if `source` is another model or layers
    of the cut lack attention or feed-forward, SourceError if one of them cannot be opened.
    """
    checkpoint = Checkpoint.open(hub.resolve(cut).path)
    plan = Plan.load(checkpoint.path)
    if not plan.complete:
        raise HealError(
            f"{cut}: lacks attention or feed-forward of some layers; such a cut is repaired while it is made: use "
            "slicer convert --heal fold, bias or linear"
        )
    origin = source or plan.source
    if origin is None:
        raise PlanError(f"{cut}: its plan names no source; pass it with --base-model")
    whole = open_source(origin)
    _check_source(checkpoint, whole.checkpoint, plan)
    return CutOnDisk(checkpoint, plan, whole)


def _check_source(cut: Checkpoint, whole: Checkpoint, plan: Plan) -> None:
    """Raise HealError unless every tensor of `cut` is that of `whole` under its plan, or was repaired or merged."""
    if plan.depth != whole.depth or len(plan.kept) != cut.depth:
        raise HealError(
            f"{cut.path}: sliced from {plan.depth} layers to {len(plan.kept)}, but {whole.path} has {whole.depth}; "
            "pass the source it was sliced from with --base-model"
        )
    expected = tensors_of(whole, plan)
    repaired = plan.healing.tensors if plan.healing else ()
    changed = {new for key, new in names_of(whole, plan).items() if key in repaired}
    changed |= {key for record in plan.merged for key in record.tensors}
    if other := sorted(expected.keys() ^ cut.tensors.keys()):
        raise HealError(f"{whole.path}: is not the source of {cut.path}: tensor {other[0]} is in one only")
    for key, span in cut.tensors.items():
        if span.shape != expected[key].shape or not (key in changed or _alike(span, expected[key])):
            raise HealError(
                f"{whole.path}: is not the source of {cut.path}: tensor {key} differs; pass the source it was sliced "
                "from with --base-model"
            )


def _alike(a: TensorSpan, b: TensorSpan) -> bool:
    """Whether two tensors of one shape begin alike (their first millions of elements), in the dtype of the first."""
    return next(tensors.chunks(a, a.dtype), b"") == next(tensors.chunks(b, a.dtype), b"")
