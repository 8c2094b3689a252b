"""Distances between sublayers: the residual stream is also tapped after every attention, all in one pass.

The model is seen as 2L sublayers: 2l is the attention of layer l, 2l+1 its feed-forward part. A block of even size that
starts at an odd one is a half-offset cut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicer.errors import ArchitectureError
from slicer.measure.analysis import Analysis, Distances
from slicer.measure.calibration import TokenBatches
from slicer.measure.metrics import angles, check_finite, per_sequence
from slicer.measure.stream import Walk
from slicer.measure.summary import measure, measure_walk, table
from slicer.model.sublayers import attention_outputs, ffn_outputs, silenced
from slicer.plan.plan import METRIC
from slicer.progress import Progress

Run = Callable[[], torch.Tensor]
Listener = Callable[[int, torch.Tensor], None]


class Midway:
    """Taps the residual stream inside a layer, after its attention.

    The tap is the module whose input is that stream (in most models the norm before the feed-forward part). It is found
    by running the layer with a silenced feed-forward part. If no module has that input (parallel attention and
    feed-forward), every run is made twice.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._places: dict[tuple[Any, ...], str | None] = {}

    def states(self, i: int, batch: int, entering: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream after the attention of layer i, stream after layer i), [batch, seq, d]; `entering` is x(i)."""
        with self._walk.layer(i) as layer:
            run = partial(self._walk.call, i, batch, entering)
            place = self.place(i, layer, run)
            if place is None:
                with silenced(ffn_outputs(layer)):
                    between = run()
                return between, run()
            seen: list[torch.Tensor] = []
            handle = layer.get_submodule(place).register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(_given(args, kwargs)), with_kwargs=True
            )
            try:
                after = run()
            finally:
                handle.remove()
            return seen[0].view(after.shape), after

    def place(self, i: int, layer: nn.Module, run: Run) -> str | None:
        """Name of the module in layer i whose input is the stream after the attention; None if there is none.

        Raises ArchitectureError for a layer without attention or feed-forward part.
        """
        key = (type(layer), *(name for name, _ in layer.named_children()))
        if key not in self._places:
            outputs = ffn_outputs(layer)
            if not outputs or not attention_outputs(layer):
                raise ArchitectureError(
                    f"layer {i} of {type(self._walk.model).__name__} does not have both attention and feed-forward "
                    "sublayers; drop whole layers (--drop, --offset whole)"
                )
            with silenced(outputs):
                between = run()
            self._places[key] = _handed(layer, run, between)
        return self._places[key]


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    value = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
    assert isinstance(value, torch.Tensor)
    return value


def _handed(layer: nn.Module, run: Run, wanted: torch.Tensor) -> str | None:
    """The first module in `layer` whose input equals `wanted` bit for bit."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            first = tensors[0] if tensors else wanted[:0]
            alike = first.numel() == wanted.numel() and first.dtype == wanted.dtype
            if alike and torch.equal(first.reshape(wanted.shape), wanted):
                found.append(name)

        return look

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in layer.named_modules()
        if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def measure_text(walk: Walk, text: TokenBatches, halves: bool | None, progress: Progress) -> Analysis:
    """The angular distances of last tokens over `text`, in one pass.

    `halves`: between half-layers too; None: where the layers can be run within. Raises as `measure_halves`.
    """
    batches, sublayers = text.batches, {}
    if halves is not False:
        try:
            layers, sublayers[METRIC] = measure_halves(walk, batches, progress=progress)
        except ArchitectureError:
            if halves:
                raise
    if not sublayers and walk.streamed:
        with tempfile.TemporaryDirectory(prefix="slicer-") as work:
            layers = measure_walk(walk, batches, Path(work), progress=progress)
    elif not sublayers:
        progress.stage("Measuring layers", len(batches), "batches")
        layers = measure(walk.model, batches, progress=lambda done, total: progress.advance())
    return Analysis(
        layers.depth,
        layers.samples,
        layers.seq_len,
        {METRIC: layers},
        sublayers=sublayers,
        calibration=text.provenance,
    )


def measure_halves(
    walk: Walk, batches: Sequence[torch.Tensor], *, progress: Progress | None = None
) -> tuple[Distances, Distances]:
    """Measure the angular distances of last tokens between layers (as in `summary.measure`) and between sublayers (a
    table of depth 2L), in one pass over `batches` (int64 [batch, seq] each, no padding).

    Raises CalibrationError for states that are not finite, ArchitectureError for a layer without attention or
    feed-forward part, or if the layers cannot be run one by one.
    """
    stacked = record_halves(walk, batches, progress=progress)
    values = torch.cat([angles(some.float()).cpu() for some in torch.split(stacked, 4, 1)])
    length = batches[0].shape[1]
    return table(METRIC, values[:, ::2, ::2], seq_len=length), table(METRIC, values, seq_len=length)


def tables_of_halves(stacked: torch.Tensor, seq_len: int) -> dict[str, Distances]:
    """Every metric that averages over tokens, at each sequence's last token, between sublayers; `stacked`:
    [2L+1, samples, d] from `record_halves`."""
    found: dict[str, list[torch.Tensor]] = {}
    for one in torch.split(stacked, 1, 1):
        for name, value in per_sequence(one[:, :, None]).items():
            if name == "angular_mean":
                continue  # with one token the same as angular_last_token
            found.setdefault(name, []).append(value)
    return {name: table(name, torch.cat(values), seq_len=seq_len) for name, values in found.items()}


def record_halves(
    walk: Walk, batches: Sequence[torch.Tensor], *, progress: Progress | None = None
) -> torch.Tensor:
    """The last token's residual stream before, inside and after every layer: [2L+1, samples, d].

    Raises as `measure_halves`.
    """
    progress = progress or Progress()
    states = walk.start(batches)
    midway = Midway(walk)
    points: list[list[torch.Tensor]] = [[] for _ in range(2 * walk.depth + 1)]
    for state in states:
        points[0].append(_last(state))
    progress.stage("Measuring layers", walk.depth, "layers")
    for i in range(walk.depth):
        with walk.layer(i):
            for b in range(len(states)):
                between, after = midway.states(i, b, states[b])
                points[2 * i + 1].append(_last(between))
                points[2 * i + 2].append(_last(after))
                states[b] = after
        states.layer = i + 1
        progress.advance()
    stacked = torch.stack([torch.cat(each) for each in points])
    check_finite(stacked[::2])
    check_finite(stacked)
    return stacked


def _last(states: torch.Tensor) -> torch.Tensor:
    return states[:, -1].detach().cpu().clone()
