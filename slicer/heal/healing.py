"""A fold of a checkpoint: from text to the tensors that are replaced, by their names on disk, and a record of it."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from slicer.checkpoint import tensors as stored
from slicer.checkpoint.architectures import EXPERT_OUTPUTS
from slicer.checkpoint.model import decoder_layers
from slicer.checkpoint.reader import Checkpoint, TensorSpan
from slicer.checkpoint.sublayers import names_of
from slicer.heal.fold import fold
from slicer.heal.held import held_out_sequences
from slicer.heal.outputs import LayerChange, applied
from slicer.heal.precision import in_float32
from slicer.measure.calibration import TokenBatches
from slicer.measure.states import Course
from slicer.measure.stream import Walk
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord
from slicer.progress import Progress


@dataclass(frozen=True)
class Healing:
    """What healing changes, and how it went.

    Attributes:
        changes: layer of the source -> its new weights, as they are applied to a loaded model.
        tensors: raw key of the source -> the tensor to write instead, in the dtype to write.
        record: for plan.json and the card: method, data, layers, losses.
    """

    changes: Mapping[int, LayerChange]
    tensors: Mapping[str, torch.Tensor]
    record: HealingRecord

    @property
    def helps(self) -> bool:
        """Whether the loss on held-out text is lower than that of the bare cut."""
        return self.record.loss.falls


def fold_checkpoint(
    checkpoint: Checkpoint,
    walk: Walk,
    data: TokenBatches,
    dropped: Sequence[int],
    *,
    solver: str = "resolve",
    cast: str | None = None,
    course: Course | None = None,
    progress: Progress | None = None,
) -> Healing:
    """Heal the cut of `dropped` layers out of the source `checkpoint`, over which `walk` goes, in closed form.

    `cast` is the safetensors dtype of the output where it is not that of the source; `course` as in `fold`. Raises
    HealError where no weight can take the fold.
    """
    progress = progress or Progress()
    held = sorted(held_out_sequences(data.batches))
    with in_float32(walk.model):
        precision = str(walk.model.dtype).removeprefix("torch.")
        found = fold(
            walk,
            data.batches,
            dropped,
            storable=_storable(checkpoint),
            solver=solver,
            written=_written(checkpoint, cast),
            course=course,
            progress=progress,
        )
    changes = {i: _in_the_dtype_of(walk.layers[i], change) for i, change in found.changes.items()}
    tensors = _tensors(checkpoint, changes, cast)
    record = {
        "method": "fold",
        "solver": solver,
        "precision": precision,
        "calibration": dict(data.provenance),
        "held_out_sequences": held,
        "loss": {name: round(value, 6) for name, value in found.losses.items()},
        "solved": [entry for _, change in sorted(changes.items()) for entry in change.report],
        "tensors": sorted(tensors),
    }
    return Healing(changes, tensors, HealingRecord.of(record))


@contextlib.contextmanager
def healed(model: Any, changes: Mapping[int, LayerChange]) -> Iterator[None]:
    """Inside the block the loaded source `model` has the new weights."""
    layers = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        for i, change in changes.items():
            stack.enter_context(applied(layers[i], change))
        yield


def replacements(checkpoint: Checkpoint, healing: Healing) -> dict[str, TensorSpan]:
    """Raw key of the source -> what is written in its place."""

    def span(key: str, tensor: torch.Tensor) -> TensorSpan:
        return checkpoint.tensors[key].made(key, lambda: tensor.cpu(), stored.dtype_name(tensor))

    return {key: span(key, tensor) for key, tensor in healing.tensors.items()}


def new_keys(checkpoint: Checkpoint, plan: Plan, keys: Iterable[str]) -> dict[str, str]:
    """Raw key of the source -> key in the sliced checkpoint, of those that stay."""
    names = names_of(checkpoint, plan)
    return {key: names[key] for key in keys if key in names}


def as_written(checkpoint: Checkpoint, plan: Plan, healing: Healing) -> dict[str, torch.Tensor]:
    """The healed tensors under their keys in the sliced checkpoint."""
    return {new: healing.tensors[key] for key, new in new_keys(checkpoint, plan, healing.tensors).items()}


def _storable(checkpoint: Checkpoint) -> Callable[[int, str, nn.Module], bool]:
    """Whether a module's weights lie in the checkpoint under its own name and shape, or as experts."""

    def storable(i: int, name: str, module: nn.Module) -> bool:
        if hasattr(module, "experts"):
            return bool(_expert_keys(checkpoint, i, name))
        return all(
            (span := checkpoint.tensors.get(f"{checkpoint.layer_prefix}{i}.{name}.{part}")) is not None
            and span.shape == tuple(tensor.shape)
            for part, tensor in module.named_parameters(recurse=False)
        )

    return storable


def _written(checkpoint: Checkpoint, cast: str | None) -> torch.dtype:
    """The dtype that most tensors of the layers are written in."""
    names = Counter(
        span.cast(cast)[0]
        for key, span in checkpoint.tensors.items()
        if key.startswith(checkpoint.layer_prefix)
    )
    return stored.torch_dtype(names.most_common(1)[0][0])


def _expert_keys(checkpoint: Checkpoint, i: int, name: str) -> dict[str, int]:
    """Raw key -> axis of the hidden size, of the tensors that a map of the experts' sum goes into."""
    prefix = f"{checkpoint.layer_prefix}{i}."
    found = {}
    for key in checkpoint.tensors:
        if key.startswith(f"{prefix}{name}."):
            for pattern, axis in EXPERT_OUTPUTS:
                if re.search(rf"(^|\.){pattern}$", key.removeprefix(prefix)):
                    found[key] = axis
    return found


def _in_the_dtype_of(layer: nn.Module, change: LayerChange) -> LayerChange:
    """Rounded, where it was solved in a higher precision than the layer's."""
    own = dict(layer.named_parameters())
    return replace(change, parameters={name: t.to(own[name].dtype) for name, t in change.parameters.items()})


def _tensors(
    checkpoint: Checkpoint, changes: Mapping[int, LayerChange], cast: str | None
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for i, change in sorted(changes.items()):
        for name, tensor in change.parameters.items():
            key = f"{checkpoint.layer_prefix}{i}.{name}"
            found[key] = tensor.to(stored.torch_dtype(checkpoint.tensors[key].cast(cast)[0]))
        for name, matrix in change.transforms.items():
            for key, axis in _expert_keys(checkpoint, i, name).items():
                span = checkpoint.tensors[key]
                old = stored.read(span).double()
                new = torch.tensordot(old, matrix.double().cpu(), dims=([axis], [1])).movedim(-1, axis)
                found[key] = new.to(stored.torch_dtype(span.cast(cast)[0]))
    return found
