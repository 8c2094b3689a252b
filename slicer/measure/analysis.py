"""Model + batches -> Distances: how far the residual stream turns across every block of layers.

The class is plain data; torch is needed only to measure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slicer.errors import PlanError

if TYPE_CHECKING:
    import torch

METRIC = "angular_last_token"


@dataclass(frozen=True)
class Distances:
    """Angular distances of blocks.

    Attributes:
        depth: L, the number of layers.
        samples: sequences averaged over.
        seq_len: tokens in each.
        mean: n -> [d(0, n), d(1, 1+n), ..., d(L-n, L)], in units of pi.
        standard_error: the same, over samples.
    """

    depth: int
    samples: int
    seq_len: int
    mean: Mapping[int, Sequence[float]]
    standard_error: Mapping[int, Sequence[float]]

    def block(self, n: int) -> Sequence[float]:
        """d(l, l+n) for l = 0..L-n."""
        return self.mean[n]

    def to_json(self) -> str:
        """The distances as JSON, the same bytes for the same figures."""
        record = {
            "metric": METRIC,
            "unit": "pi radians",
            "depth": self.depth,
            "samples": self.samples,
            "seq_len": self.seq_len,
            "distances": {str(n): list(row) for n, row in self.mean.items()},
            "standard_error": {str(n): list(row) for n, row in self.standard_error.items()},
        }
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Distances:
        """Read what `to_json` wrote. Raises PlanError."""
        try:
            record = json.loads(text)
            rows = (
                {int(n): list(row) for n, row in record[k].items()} for k in ("distances", "standard_error")
            )
            return cls(record["depth"], record["samples"], record["seq_len"], *rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not distances that slicer wrote ({error}); measure them again") from None


def measure(
    model: Any, batches: Iterable[torch.Tensor], *, progress: Callable[[int, int], None] | None = None
) -> Distances:
    """One forward pass over `batches` (int64 [batch, seq] each, no padding) gives every d(l, l+n).

    Only the last token's states are kept, [L+1, batch, d], and no logits are computed where the class allows it.
    `progress(done, total)` is told after each batch. Raises CalibrationError for states that are not finite.
    """
    import torch

    from slicer.checkpoint.model import decoder_layers, watch
    from slicer.measure.metrics import AngularDistance

    batches = list(batches)
    depth = len(decoder_layers(model))
    angles = AngularDistance(depth)
    last: list[torch.Tensor] = []
    device = model.get_input_embeddings().weight.device

    def listener(index: int, states: torch.Tensor) -> None:
        last.append(states[:, -1].detach().to(device, torch.float32))

    decoder = model.base_model  # without the head: the logits of every position are not needed
    with torch.inference_mode(), watch(model, listener):
        for done, batch in enumerate(batches, 1):
            last.clear()
            decoder(input_ids=batch.to(device), use_cache=False)
            angles.add(torch.stack(last))
            if progress is not None:
                progress(done, len(batches))
    mean, error = angles.mean(), angles.standard_error()
    return Distances(
        depth=depth,
        samples=angles.count,
        seq_len=batches[0].shape[1],
        mean={n: mean.diagonal(n).tolist() for n in range(1, depth + 1)},
        standard_error={n: error.diagonal(n).tolist() for n in range(1, depth + 1)},
    )
