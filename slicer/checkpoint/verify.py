"""Is the written checkpoint what it should be? Its keys and shapes, and its logits against the bypassed source's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint import tensors as torch_tensors
from slicer.checkpoint.model import build_on_meta, load_model, meta_tensors
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import SlicerError, SourceError, VerificationError

# What rounding may do: both runs do the same operations on the same weights, so a whole layer gone wrong shows at
# once, and only a different order of summation may differ by some units of the last place.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE_SHAPE = (2, 24)
# Buffers that older transformers stored and none loads any more (GPT-J, GPT-Neo, CodeGen, DistilGPT-2 have them).
_OLD_BUFFERS = re.compile(
    r"(attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)(rotary(_emb)?\.inv_freq|position_ids)$"
    r"|(^|\.)(embed_positions\.weights|decoder\.version)$"
)


def check_load(path: Path, *, trust_remote_code: bool = False) -> None:
    """Check that every tensor the architecture expects is there, of its shape, and nothing else but old buffers.

    The model is built on the meta device: no weight is read. Raises VerificationError naming the tensor or field.
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
            f"the written config does not reload: {' '.join(str(error).split())[:300]}"
        ) from None
    tensors = meta_tensors(checkpoint)
    problems = _load_on_meta(path, config, tensors, trust_remote_code)
    for kind, words in (
        ("missing_keys", "is missing"),
        ("unexpected_keys", "is there but the architecture has no place for it"),
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
            raise VerificationError(f"tensor {name} {words}{shapes}{more}; nothing was written")


def _load_on_meta(
    path: Path, config: Any, tensors: dict[str, torch.Tensor], trust_remote_code: bool
) -> dict[str, Any]:
    try:
        return build_on_meta(path, tensors, config=config, trust_remote_code=trust_remote_code)[1]
    except SourceError as error:
        raise VerificationError(str(error)) from None


def check_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Check that the tensors `expected` were written bit for bit. Raises VerificationError naming one that was not."""
    written = Checkpoint.open(path).tensors
    for key, tensor in expected.items():
        if key not in written or not torch.equal(torch_tensors.read(written[key]), tensor.cpu()):
            raise VerificationError(f"tensor {key} was not written as healed; nothing was written")


def probe_tokens(vocab_size: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [2, 24], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, PROBE_SHAPE, generator=generator)


@torch.inference_mode()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of every position, [batch, seq, vocabulary], on the CPU."""
    device = model.get_input_embeddings().weight.device
    logits: torch.Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits.cpu()


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
    """Load `out` and compare its logits with `reference`; returns max |a - b| / max |b|.

    Raises VerificationError when that exceeds the tolerance (None: of the dtype), or anything is not finite.
    """
    try:
        model = load_model(out, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    except SlicerError as error:
        raise VerificationError(f"the written checkpoint does not load: {error}") from None
    return compare_logits(logits_of(model, tokens), reference, tolerance)


def compare_logits(logits: torch.Tensor, reference: torch.Tensor, tolerance: float | None = None) -> float:
    """max |a - b| / max |b|. Raises VerificationError as `check_logits` does."""
    if logits.shape != reference.shape:
        raise VerificationError(
            f"logits have the shape {list(logits.shape)}, the source's {list(reference.shape)}"
        )
    if not torch.isfinite(reference).all():
        raise VerificationError(
            "the source's own logits are not finite with these layers bypassed; try --dtype float32, or --verify load"
        )
    apart = (logits.double() - reference.double()).abs()
    relative = float(apart.max() / reference.double().abs().max().clamp_min(1e-30))
    tolerance = TOLERANCE.get(logits.dtype, 1e-4) if tolerance is None else tolerance
    if not relative <= tolerance:
        position = [int(i) for i in torch.unravel_index(apart.argmax(), apart.shape)]
        raise VerificationError(
            f"logits differ from the source's with those layers bypassed by {relative:.2e} (at most {tolerance:.0e}; "
            f"sequence {position[0]}, position {position[1]}, token {position[2]}); nothing was written"
        )
    return relative
