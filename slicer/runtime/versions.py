"""The versions of slicer and of the libraries that a result depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "slicer-llm"
__version__ = version(DISTRIBUTION)


def versions(*more: str) -> dict[str, str]:
    """Distribution -> version, of slicer, torch, transformers, safetensors and `more`; without those not installed."""
    found = {}
    for name in (DISTRIBUTION, "torch", "transformers", "safetensors", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
