"""Verifies a written checkpoint: keys and shapes, the changed tensors, its logits, and its loss on held-out text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional

from slicer.checkpoint import tensors
from slicer.checkpoint.export import Contents
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import SlicerError, VerificationError, reason_of
from slicer.model.load import Model, build_on_meta
from slicer.model.pruned import Edits, pruned_logits
from slicer.model.walk import Walk, open_walk
from slicer.plan.plan import Plan
from slicer.progress import SILENT, Progress
from slicer.runtime.compute import Compute

# Maximum rounding difference: both runs do the same operations on the same weights, so only the order of summation may
# differ by some units in the last place, while a wrong layer gives a large error.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Maximum difference between rounded and exact weights, by the dtype that they are stored in.
ROUNDING = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-2, "BF16": 5e-2}
# Buffers stored by older transformers and no longer loaded (GPT-J, GPT-Neo, CodeGen, DistilGPT-2).
_OLD_BUFFERS = re.compile(
    r"(attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)(rotary(_emb)?\.inv_freq|position_ids)$"
    r"|(^|\.)(embed_positions\.weights|decoder\.version)$"
)


@dataclass(frozen=True)
class Expected:
    """What a written checkpoint is checked against, computed before it is written.

    Attributes:
        tokens: int64 [batch, seq] on which the logits were computed; None: no logits are compared.
        logits: that the checkpoint must have, [batch, seq, V], on the CPU.
        exact: logits of weights that are not rounded to their stored dtype (adapters, training); None: nothing was
            rounded. If given, all logits are computed in float32.
        text: (tokens, labels) int64 [batch, seq] of held-out text, labels below 0 at tokens without loss. The loss
            of the written checkpoint is measured on it.
        loads: whether the checkpoint fits in memory; else its layers are read one at a time, and no loss is measured.
        text_dtype: torch name of the precision in which that loss is measured.
    """

    tokens: torch.Tensor | None
    logits: torch.Tensor | None
    exact: torch.Tensor | None = None
    text: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    loads: bool = True
    text_dtype: str = "float32"


@dataclass(frozen=True)
class Errors:
    """What the checks of a written checkpoint measured.

    Attributes:
        same: largest difference from the expected logits, relative to the largest logit; None: not compared.
        rounding: the same for the `exact` ones; None: there are none.
        loss: nats a token on the held-out text; None: not measured.
    """

    same: float | None = None
    rounding: float | None = None
    loss: float | None = None


def expected_logits(
    walk: Walk | None, plan: Plan, edits: Edits, verify: str, progress: Progress = SILENT
) -> Expected | None:
    """The logits of the source, pruned by `plan` with `edits`, on a few random tokens, from a loaded or streamed walk.

    None unless `verify` is "logits".
    """
    if verify != "logits" or walk is None:
        return None
    progress.stage("Reference logits of the pruned source")
    tokens = probe_tokens(walk.model.config.get_text_config().vocab_size)
    return Expected(tokens, pruned_logits(walk, tokens, plan, edits), loads=walk.loaded)


def check_contents(
    directory: Path, contents: Contents, expected: Expected | None, compute: Compute, progress: Progress, load: bool
) -> Errors:
    """Check what was written to `directory`: with `load`, every key and shape on the meta device; the changed tensors
    bit for bit; then logits and loss, as far as they are `expected`.

    `compute.dtype`: the precision of expected logits without `exact` ones; None: as stored. Raises VerificationError
    naming what is wrong.
    """
    if load:
        progress.stage("Checking every key and shape")
        check_load(directory, trust_remote_code=compute.trust_remote_code)
    written = Checkpoint.open(directory).tensors if contents.changed else {}
    for key, make in contents.changed.items():
        if key not in written or not torch.equal(tensors.read(written[key]), make().cpu()):
            raise VerificationError(f"tensor {key} on disk differs from the healed weights; the output was discarded")
    if expected is None:
        return Errors()
    same = rounding = loss = None
    if expected.tokens is not None and expected.logits is not None:
        progress.stage("Comparing logits")
        dtype = compute.dtype if expected.exact is None else "float32"
        try:
            with open_walk(Checkpoint.open(directory), replace(compute, dtype=dtype), loads=expected.loads) as walk:
                logits = pruned_logits(walk, expected.tokens)
        except SlicerError as error:
            raise VerificationError(f"the written checkpoint does not load: {error}") from None
        same = compare_logits(logits, expected.logits)
        if expected.exact is not None:
            rounding = compare_logits(logits, expected.exact, _rounding(contents))
    if expected.text:
        progress.stage("Measuring the loss after")
        precision = replace(compute, dtype=expected.text_dtype)
        with open_walk(Checkpoint.open(directory), precision, loads=True) as walk:
            loss = text_loss(walk.model, expected.text)
    return Errors(same, rounding, loss)


def check_load(path: Path, *, trust_remote_code: bool = False) -> None:
    """Check that exactly the tensors that the architecture expects exist with the right shapes (old buffers may stay).

    Builds the model on the meta device and reads no weights. Raises VerificationError naming the tensor or field.
    """
    import transformers

    try:
        checkpoint = Checkpoint.open(path)
        checkpoint.check_layers()
        if (path / "generation_config.json").exists():
            transformers.GenerationConfig.from_pretrained(str(path), local_files_only=True)
        _, problems = build_on_meta(checkpoint, trust_remote_code=trust_remote_code)
    except SlicerError as error:
        raise VerificationError(f"the written checkpoint cannot be opened: {error}") from None
    except Exception as error:  # config classes raise many kinds
        raise VerificationError(f"the written config cannot be loaded: {reason_of(error)}") from None
    for kind, words in (
        ("missing_keys", "is missing"),
        ("unexpected_keys", "is not part of the architecture"),
        ("mismatched_keys", "has the wrong shape"),
    ):
        found = sorted(problems.get(kind) or (), key=str)
        if kind == "unexpected_keys":
            found = [key for key in found if not _OLD_BUFFERS.search(key)]
        if found:
            name, *shapes = [found[0]] if isinstance(found[0], str) else found[0]
            differ = " ({}, expected {})".format(*map(list, shapes)) if shapes else ""
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            raise VerificationError(f"tensor {name} {words}{differ}{more}; the output was discarded")


def probe_tokens(vocab_size: int) -> torch.Tensor:
    """The same random token ids each time, int64 [2, 24]."""
    return torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def text_loss(model: Model, text: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean next-token cross entropy of a loaded model on (tokens, labels), int64 [batch, seq] each, nats a token."""
    device = model.get_input_embeddings().weight.device
    total = count = 0.0
    for tokens, labels in text:
        total += float(cross_entropy(model(input_ids=tokens.to(device), use_cache=False).logits, labels))
        count += int((labels[:, 1:] >= 0).sum())
    return total / count


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed next-token loss in nats, float32, of logits [batch, seq, V] and labels [batch, seq].

    No loss is taken on the label that torch ignores, -100.
    """
    ahead = labels[:, 1:].flatten().to(logits.device)
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ahead, reduction="sum")


def _rounding(contents: Contents) -> float:
    """The largest difference that rounding may make; unlimited for experts, where it may change the router's choice."""
    if any("expert" in key for key in contents.tensors):
        return math.inf
    return max(ROUNDING.get(span.cast(contents.cast)[0], 1e-5) for span in contents.tensors.values())


def compare_logits(logits: torch.Tensor, reference: torch.Tensor, tolerance: float | None = None) -> float:
    """max |a - b| / max |b| of logits [batch, seq, V].

    Raises VerificationError if that exceeds the tolerance (None: that of the dtype), or a value is not finite.
    """
    if logits.shape != reference.shape:
        raise VerificationError(
            f"the logits have shape {list(logits.shape)}, those of the source {list(reference.shape)}"
        )
    if not torch.isfinite(reference).all():
        raise VerificationError(
            "the source's logits are not finite with these layers bypassed; use --dtype float32 or --verify load"
        )
    apart = (logits.double() - reference.double()).abs()
    relative = float(apart.max() / reference.double().abs().max().clamp_min(1e-30))
    tolerance = TOLERANCE.get(logits.dtype, 1e-4) if tolerance is None else tolerance
    if not relative <= tolerance:
        position = [int(i) for i in torch.unravel_index(apart.argmax(), apart.shape)]
        raise VerificationError(
            f"logits differ from the source's with those layers bypassed by {relative:.2e} (at most {tolerance:.0e}; "
            f"sequence {position[0]}, position {position[1]}, token {position[2]}); the output was discarded"
        )
    return relative
