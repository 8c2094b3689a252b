"""The pruned model: the source without the sublayers that a plan removes, with changed weights and replacements.

`Edits` hold the changes of each layer; the same edits are applied to a loaded model (`pruned`, `shortened`), to the
layers of a streamed walk (`pruned_layer`), and to repeated runs on fixed text (`PrunedRun`).
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicer.errors import ArchitectureError
from slicer.model.layers import decoder_layers, hidden_in, logits_of, norm_eps, on_hidden
from slicer.model.load import Model
from slicer.model.states import Batches, States
from slicer.model.sublayers import attention_outputs, bypass_sublayers, ffn_outputs, without_sublayers
from slicer.model.walk import Walk, walk_loss
from slicer.plan.plan import Plan


@dataclass(frozen=True)
class Replacement:
    """An addition to the residual stream x behind a sublayer: B z + c with z = g x / |x|, or only the constant c.

    Attributes:
        bias: c [d].
        gain, down, up: g [d], and B = up [d, r] down [r, d]; None for a constant. |x| is the root mean square.
    """

    bias: torch.Tensor
    gain: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None

    def update(self, states: torch.Tensor, eps: float) -> torch.Tensor:
        """The addition to `states` [.., d], in their dtype."""
        if self.down is None or self.up is None or self.gain is None:
            return self.bias.to(states).expand_as(states)
        normed = nn.functional.rms_norm(states.float(), states.shape[-1:], None, eps).to(states.dtype)
        normed = self.gain.to(states) * normed
        update: torch.Tensor = normed @ self.down.to(states).T @ self.up.to(states).T + self.bias.to(states)
        return update


@dataclass(frozen=True)
class LayerEdit:
    """The changes of one layer of the source.

    Attributes:
        parameters: name within the layer -> the new tensor, in the shape of the old one.
        transforms: module within the layer -> T [d, d] float32 that its output is multiplied by (experts).
        behind: "attention" or "ffn" -> the addition to the residual stream behind this sublayer, which stays.
    """

    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    transforms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    behind: Mapping[str, Replacement] = field(default_factory=dict)


Edits = Mapping[int, LayerEdit]  # by layer of the source
Gone = tuple[frozenset[int], frozenset[int]]  # (attention, feed-forward sublayers) that a plan removes


@contextlib.contextmanager
def edited(layer: nn.Module, edit: LayerEdit | None, eps: float = 1e-6) -> Iterator[None]:
    """Inside the block, `layer` is changed by `edit`; afterwards its tensors are the old ones.

    `eps`: epsilon of the norm in low-rank replacements.
    """
    edit = edit or LayerEdit()
    own = dict(layer.named_parameters())
    with contextlib.ExitStack() as stack:
        for name, value in edit.parameters.items():
            stack.callback(partial(setattr, own[name], "data", own[name].data))
            own[name].data = value.to(own[name])
        for name, matrix in edit.transforms.items():
            hook = on_hidden(partial(_multiplied, matrix))
            stack.callback(layer.get_submodule(name).register_forward_hook(hook).remove)
        for sublayer, replacement in edit.behind.items():
            for handle in _hooks(layer, sublayer, replacement, eps):
                stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def pruned_layer(layer: nn.Module, i: int, gone: Gone, edit: LayerEdit | None, eps: float) -> Iterator[None]:
    """Inside the block `layer`, number i of the source, lacks its sublayers in `gone` and is changed by `edit`.

    Raises ArchitectureError if the layer has no known sublayer of that kind.
    """
    with without_sublayers(layer, i in gone[0], i in gone[1], i), edited(layer, edit, eps):
        yield


@contextlib.contextmanager
def pruned(model: Model, plan: Plan, edits: Edits) -> Iterator[None]:
    """Inside the block, the loaded source `model` computes the outputs of the cut of `plan` with `edits`.

    Removed layers still run and return their input: for checks and for measuring losses.
    """
    layers = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bypass_sublayers(model, *plan.gone))
        for i, edit in edits.items():
            stack.enter_context(edited(layers[i], edit, norm_eps(model)))
        yield


def pruned_logits(
    walk: Walk, tokens: torch.Tensor, plan: Plan | None = None, edits: Edits | None = None
) -> torch.Tensor:
    """Logits [batch, seq, vocabulary], on the CPU, of `tokens` [batch, seq] by the model of `walk`, loaded or streamed,
    without the sublayers that `plan` removes (None: the whole model) and with `edits`."""
    plan, edits = plan or Plan.whole(walk.depth), edits or {}
    if walk.loaded:
        with pruned(walk.model, plan, edits):
            return logits_of(walk.model, tokens)
    run = PrunedRun(walk, plan, walk.start([tokens]), ())
    (streams,) = run.ends([0], [_given(edits)])
    return walk.head(tokens, streams[0]).cpu()


EditOf = Callable[[int, nn.Module], LayerEdit | None]  # the change of a layer, made while its weights are in place
Streams = dict[int, torch.Tensor]  # by batch: the residual stream, [batch, seq, d]


class PrunedRun:
    """The pruned model of a walk, loaded or streamed, run from one layer on, on fixed text, as a fit does many times.

    Attributes:
        walk: over the source; its batches are those of `origin`.
        gone: the removed sublayers.
        layers: those with a sublayer that stays, from `origin.layer` to the last.
        origin: the residual stream that enters the first of them.
        target: the stream of the source behind its last layer, if it is needed.
        held: numbers of the batches held out of the fit.
    """

    def __init__(
        self, walk: Walk, plan: Plan, origin: States, held: Sequence[int], target: States | None = None
    ) -> None:
        self.walk, self.gone, self.origin, self.held = walk, plan.gone, origin, held
        self.target = origin if target is None else target
        self.layers = [i for i in range(origin.layer, walk.depth) if i not in self.gone[0] & self.gone[1]]

    @classmethod
    def of_source(cls, walk: Walk, plan: Plan, batches: Batches, held: Sequence[int], first: int) -> PrunedRun:
        """From layer `first` on, or an earlier layer with a removed sublayer; runs the source on `batches`."""
        first = min([first, *plan.gone[0], *plan.gone[1]])
        target = walk.run(walk.start(batches), range(first))
        target.layer, origin = first, target.copy()
        return cls(walk, plan, origin, held, walk.run(target, range(first, walk.depth)))

    def ends(
        self,
        batches: Iterable[int],
        edits: Sequence[EditOf],
        entering: Callable[[int, Streams], None] | None = None,
        layers: Sequence[int] | None = None,
    ) -> list[Streams]:
        """The stream behind the last layer, on the device, of the pruned model with each of `edits`.

        Runs layer by layer, so that several edits share one read of each layer. `entering(i, streams)` gets the streams
        that enter layer i, for each edit in turn. `layers`: the first ones, to run no others.
        """
        layers = self.layers if layers is None else layers
        found = [{b: self.origin[b].clone() for b in batches} for _ in edits]  # a layer may write into its input
        with torch.no_grad(), self.walk.along(layers):
            for i in layers:
                with self.walk.layer(i) as layer:
                    for streams, edit in zip(found, edits, strict=True):
                        if entering is not None:
                            entering(i, streams)
                        with self.pruned(i, layer, edit(i, layer)):
                            streams.update({b: self.walk.call(i, b, x) for b, x in streams.items()})
        return found

    def losses(self, edits: Sequence[Edits]) -> list[float]:
        """The loss on the held-out batches, in nats a token, of the pruned model with each of `edits`."""
        found = self.ends(self.held, [_given(each) for each in edits])
        return [walk_loss(self.walk, self.origin.tokens, streams.__getitem__, self.held) for streams in found]

    def pruned(self, i: int, layer: nn.Module, edit: LayerEdit | None) -> contextlib.AbstractContextManager[None]:
        """Inside the block, `layer` (number i) is the layer of the pruned model with `edit`."""
        return pruned_layer(layer, i, self.gone, edit, norm_eps(self.walk.model))

    @contextlib.contextmanager
    def prepared(self, edits: Edits) -> Iterator[None]:
        """Inside the block, all layers of a loaded model are those of the pruned model with `edits`."""
        with contextlib.ExitStack() as stack:
            for i in self.layers:
                stack.enter_context(self.pruned(i, stack.enter_context(self.walk.layer(i)), edits.get(i)))
            yield

    def run(self, b: int, *, gradient: bool = False) -> torch.Tensor:
        """Output of the layers, which are `prepared`, for a batch: [batch, seq, d], on the device.

        With `gradient`, the output is differentiable with respect to everything that the layers compute.
        """
        states = self.origin[b].to(self.walk.device).clone()
        if gradient:
            states = states.requires_grad_().clone()  # a layer may write into its input, but not into a leaf
        for i in self.layers:
            states = self.walk.call(i, b, states, gradient=gradient)
        return states


def _given(edits: Edits) -> EditOf:
    return lambda i, layer: edits.get(i)


@contextlib.contextmanager
def shortened(model: Model, plan: Plan, config: Mapping[str, Any], edits: Edits | None = None) -> Iterator[None]:
    """Inside the block, `model` is cut: it has only the layers that `plan` (of whole layers) keeps, renumbered.

    `config` is the sliced config.json (`slicer.checkpoint.config.sliced_config`). Nothing is copied: all users of
    the model's config object see the new fields. Afterwards everything is as before.
    """
    layers = decoder_layers(model)
    parent, name = _place_of(model, layers)
    old = model.config.get_text_config()
    fields = dict(old.__dict__)
    # Read as transformers reads the file.
    with tempfile.TemporaryDirectory(prefix="slicer-config-") as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config), "utf-8")
        new = type(model.config).from_pretrained(scratch).get_text_config()
    # Fields that loading sets, not config.json: the attention kernel and the precision.
    loaded = ("dtype", "torch_dtype")
    changed = {key: v for key, v in new.__dict__.items() if not key.startswith("_") and key not in loaded}
    numbers = [
        (module, attribute, getattr(module, attribute))
        for layer in layers
        for module in layer.modules()
        for attribute in ("layer_idx", "layer_id", "layer_number")
        if isinstance(getattr(module, attribute, None), int)
    ]
    shifts = {id(module): at - i for at, i in enumerate(plan.kept) for module in layers[i].modules()}
    with contextlib.ExitStack() as stack:
        for i, edit in (edits or {}).items():
            stack.enter_context(edited(layers[i], edit, norm_eps(model)))
        try:
            old.__dict__.update(changed)
            setattr(parent, name, nn.ModuleList(layers[i] for i in plan.kept))
            for module, attribute, number in numbers:
                setattr(module, attribute, number + shifts.get(id(module), 0))
            yield
        finally:
            for module, attribute, number in numbers:
                setattr(module, attribute, number)
            setattr(parent, name, layers)
            old.__dict__.clear()
            old.__dict__.update(fields)


def _place_of(model: Model, child: nn.Module) -> tuple[nn.Module, str]:
    """(parent, attribute) of a module inside the model."""
    for parent in model.modules():
        for name, module in parent.named_children():
            if module is child:
                return parent, name
    raise ArchitectureError(f"{type(model).__name__}: the decoder layers are not part of it")


def _multiplied(matrix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return (states.float() @ matrix.to(states.device).T).to(states.dtype)


def _hooks(layer: nn.Module, sublayer: str, replacement: Replacement, eps: float) -> list[Any]:
    """The handles of the hooks that add `replacement` behind a sublayer of `layer`."""
    outputs = attention_outputs(layer) if sublayer == "attention" else ffn_outputs(layer)
    if replacement.down is None:
        hook = on_hidden(lambda states: states + replacement.bias.to(states))
        return [outputs[0].register_forward_hook(hook)]
    if sublayer == "ffn":
        hook = on_hidden(lambda states: states + replacement.update(states, eps))
        return [layer.register_forward_hook(hook)]
    entering: list[torch.Tensor] = []  # the stream after the attention: the layer's input plus its output

    def into(module: nn.Module, args: Any, kwargs: Any) -> None:
        entering[:] = [hidden_in(args, kwargs)]

    hook = on_hidden(lambda states: states + replacement.update(entering[0] + states, eps))
    return [layer.register_forward_pre_hook(into, with_kwargs=True), outputs[0].register_forward_hook(hook)]
