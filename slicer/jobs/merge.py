"""`slicer merge`: merges a LoRA adapter into a checkpoint, and writes what was verified.

W + (alpha / r) B A is computed in float32 from the stored W while it is written, and rounded once to its dtype; all
other tensors are copied. A model is loaded only to compare logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slicer.checkpoint.adapter import Adapter, check_base
from slicer.checkpoint.hub import Source, open_source
from slicer.errors import HealError
from slicer.heal.patch import Patch
from slicer.jobs.output import Result, Written, check_place, write_verified
from slicer.jobs.recipe import check_device
from slicer.jobs.request import MergeRequest
from slicer.model.adapter import Place, adapter_logits, merged_spans, placed
from slicer.model.verify import Expected
from slicer.plan.plan import Plan
from slicer.plan.records import MergeRecord
from slicer.progress import SILENT, Progress
from slicer.runtime.memory import OVERHEAD, check_free, fits


def merge(request: MergeRequest, progress: Progress = SILENT) -> Written:
    """Merge the adapter into the checkpoint, written whole or not at all.

    With `renumber`, the layer numbers of the adapter are mapped by the checkpoint's plan, and those of dropped layers
    are left out. Raises HealError if the adapter does not fit, other SlicerErrors.
    """
    progress.stage("Opening the checkpoint and the adapter")
    check_device(request.compute)
    source = open_source(request.cut)
    base, trusted = source.checkpoint, request.compute.trust_remote_code
    if not request.renumber:
        check_base(request.adapter, base)
    adapter = Adapter.open(request.adapter)
    places = placed(base, adapter, renumber=request.renumber, trust_remote_code=trusted)
    patch = Patch(replaced=merged_spans(base, adapter, places))
    record = MergeRecord(
        adapter=str(adapter.path),
        sha256=adapter.sha256,
        base_model=adapter.config.get("base_model_name_or_path"),
        renumber=request.renumber,
        tensors=tuple(sorted(patch.replaced)),
        left_out=tuple(sorted(adapter.pairs.keys() - {place.origin for place in places})),
        command=request.command,
    )
    plan = base.plan or replace(Plan.whole(base.depth), source=source.name, revision=source.revision)
    result = Result.of_base(base, plan, patch, merge=record)
    check_place(result, request.output)
    expected = _expected(request, source, adapter, places, progress)
    return write_verified(result, expected, request.output, request.compute, progress)


def _expected(
    request: MergeRequest, source: Source, adapter: Adapter, places: Sequence[Place], progress: Progress
) -> Expected | None:
    """The logits of the checkpoint with the adapter, where they are asked for or the model fits in memory."""
    asked, compute, nbytes = request.output.verify, request.compute, 4 * source.checkpoint.parameters  # in float32
    if asked in ("none", "load"):
        return None
    if asked == "auto" and not fits(nbytes, compute):
        return None
    check_free(OVERHEAD * nbytes, compute)
    progress.stage("Reference logits of the checkpoint with the adapter")
    try:
        return adapter_logits(source.checkpoint, adapter, places, compute)
    except HealError as error:
        if asked == "logits":
            raise
        progress.note(f"checking keys and shapes only, not logits: {error}")
        return None
