"""Describes a checkpoint from its config and headers alone, without reading tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicer.checkpoint import architectures, hub
from slicer.checkpoint.reader import Checkpoint
from slicer.checkpoint.sizes import Sizes, measure_sizes
from slicer.plan.plan import Plan


@dataclass(frozen=True)
class Inspection:
    """Architecture and sizes of a checkpoint; `plan` if slicer made it."""

    path: Path
    model_type: str
    classes: tuple[str, ...]
    dtypes: tuple[str, ...]
    files: int
    sizes: Sizes
    plan: Plan | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        import json

        return {
            "path": str(self.path),
            "model_type": self.model_type,
            "architectures": list(self.classes),
            "dtypes": list(self.dtypes),
            "files": self.files,
            **self.sizes.to_dict(),
            "plan": None if self.plan is None else json.loads(self.plan.to_json()),
        }


def inspect(source: str) -> Inspection:
    """Inspect a directory, a Hub id or "demo". Raises SourceError, HubError or ArchitectureError."""
    checkpoint = Checkpoint.open(hub.resolve(source).path)
    checkpoint.check_layers()
    sliced = checkpoint.path / "slicer" / "plan.json"
    return Inspection(
        path=checkpoint.path,
        model_type=str(architectures.text_config(checkpoint.config).get("model_type", "unknown")),
        classes=tuple(checkpoint.config.get("architectures") or ()),
        dtypes=tuple(sorted({span.dtype for span in checkpoint.tensors.values()})),
        files=len({span.file for span in checkpoint.tensors.values()}),
        sizes=measure_sizes(checkpoint),
        plan=Plan.load(checkpoint.path) if sliced.is_file() else None,
    )
