"""Verifies a written checkpoint: its keys and shapes, and its logits against those of the bypassed source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint import tensors
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import SlicerError, SourceError, VerificationError
from slicer.model.layers import logits_of
from slicer.model.load import build_on_meta, load_model, meta_tensors

# Maximum rounding difference: both runs do the same operations on the same weights, so only the order of summation may
# differ by some units in the last place, while a wrong layer gives a large error.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE_SHAPE = (2, 24)
# Buffers stored by older transformers and no longer loaded (GPT-J, GPT-Neo, CodeGen, DistilGPT-2).
_OLD_BUFFERS = re.compile(
    r"(attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)(rotary(_emb)?\.inv_freq|position_ids)$"
    r"|(^|\.)(embed_positions\.weights|decoder\.version)$"
)


def check_load(path: Path, *, trust_remote_code: bool = False) -> None:
    """Check that exactly the tensors that the architecture expects exist with the right shapes (old buffers may stay).

    Builds the model on the meta device and reads no weights. Raises VerificationError naming the tensor or field.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        checkpoint = Checkpoint.open(path)
        checkpoint.check_layers()
        config = transformers.AutoConfig.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
        if (path / "generation_config.json").exists():
            transformers.GenerationConfig.from_pretrained(str(path), local_files_only=True)
    except SlicerError as error:
        raise VerificationError(f"the written checkpoint cannot be opened: {error}") from None
    except Exception as error:
        raise VerificationError(
            f"the written config cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    tensors = meta_tensors(checkpoint)
    problems = _load_on_meta(path, config, tensors, trust_remote_code)
    for kind, words in (
        ("missing_keys", "is missing"),
        ("unexpected_keys", "is not part of the architecture"),
        ("mismatched_keys", "has the wrong shape"),
    ):
        found = sorted(problems.get(kind) or (), key=str)
        if kind == "unexpected_keys":
            found = [key for key in found if not _OLD_BUFFERS.search(key)]
        if found:
            name = found[0] if isinstance(found[0], str) else found[0][0]
            shapes = (
                "" if isinstance(found[0], str) else f" ({list(found[0][1])}, expected {list(found[0][2])})"
            )
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            raise VerificationError(f"tensor {name} {words}{shapes}{more}; the output was discarded")


def _load_on_meta(
    path: Path, config: Any, tensors: dict[str, torch.Tensor], trust_remote_code: bool
) -> dict[str, Any]:
    try:
        return build_on_meta(path, tensors, config=config, trust_remote_code=trust_remote_code)[1]
    except SourceError as error:
        raise VerificationError(str(error)) from None


def check_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Check that the tensors `expected` are on disk bit for bit. Raises VerificationError naming one that is not."""
    written = Checkpoint.open(path).tensors
    for key, tensor in expected.items():
        if key not in written or not torch.equal(tensors.read(written[key]), tensor.cpu()):
            raise VerificationError(
                f"tensor {key} on disk differs from the healed weights; the output was discarded"
            )


def probe_tokens(vocab_size: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [2, 24], from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, PROBE_SHAPE, generator=generator)


def check_logits(
    out: Path,
    reference: torch.Tensor,
    tokens: torch.Tensor,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    tolerance: float | None = None,
) -> float:
    """Load `out` and compare its logits with `reference` ([batch, seq, vocabulary]); returns max |a - b| / max |b|.

    Raises VerificationError if that exceeds the tolerance (None: that of the dtype), or a value is not finite.
    """
    try:
        model = load_model(out, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    except SlicerError as error:
        raise VerificationError(f"the written checkpoint does not load: {error}") from None
    return compare_logits(logits_of(model, tokens), reference, tolerance)


def compare_logits(logits: torch.Tensor, reference: torch.Tensor, tolerance: float | None = None) -> float:
    """max |a - b| / max |b|. Raises VerificationError as `check_logits`."""
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
