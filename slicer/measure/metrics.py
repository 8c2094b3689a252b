"""Accumulators over the residual stream. One forward pass feeds every l and every n."""

from __future__ import annotations

import math

import torch

from slicer.errors import CalibrationError


class AngularDistance:
    """Mean over sequences of d(l, l+n), the angular distance of last-token states (equation 7 of the paper).

    d = arccos(x(l) . x(l+n) / |x(l)| |x(l+n)|) / pi, in [0, 1], for every pair 0 <= l < l+n <= L at once.
    The angle is taken as 2 atan2(|u - v|, |u + v|) of the unit vectors: arccos loses half the digits near 0.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.count = 0
        self._sum = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)
        self._square = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)

    def add(self, last: torch.Tensor) -> None:
        """`last`: the last token's states, [L+1, batch, d]. Raises CalibrationError when they are not finite."""
        if not torch.isfinite(last).all():
            layer = int((~torch.isfinite(last)).flatten(1).any(1).nonzero()[0])
            raise CalibrationError(
                f"the residual stream entering layer {layer} holds infinite or undefined values; "
                "measure in another dtype (--dtype float32)"
            )
        unit = last.to(torch.float64)
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        for state in unit.unbind(1):  # [L+1, d]
            apart = torch.cdist(state, state, compute_mode="donot_use_mm_for_euclid_dist")
            together = torch.cdist(state, -state, compute_mode="donot_use_mm_for_euclid_dist")
            distance = 2 * torch.atan2(apart, together) / math.pi  # [L+1, L+1]
            self._sum += distance.cpu()
            self._square += (distance**2).cpu()
            self.count += 1

    def mean(self) -> torch.Tensor:
        """[L+1, L+1]: entry (l, m) is the mean of d(l, m)."""
        return self._sum / self.count

    def standard_error(self) -> torch.Tensor:
        """[L+1, L+1]: the standard error of each mean over sequences; 0 for a single one."""
        if self.count < 2:
            return torch.zeros_like(self._sum)
        variance = (self._square - self._sum**2 / self.count).clamp_min(0) / (self.count - 1)
        return (variance / self.count).sqrt()
