"""Resolves a source to a directory: a local path, a Hub id, or the embedded model.

Token, endpoint, cache and offline mode are those of huggingface_hub (HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE).
Downloads only config, tokenizer, code, licence and one format of the weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from slicer.checkpoint.reader import BIN, BIN_INDEX, INDEX, SINGLE, Checkpoint, refuse_quantized
from slicer.errors import HubError, SourceError

# All files of a checkpoint except its weights; export copies the same files.
COMPANIONS = (
    "*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken", "*.bpe", "*.vocab", "*.spm",
    "LICENSE*", "LICENCE*", "License*", "NOTICE*", "USE_POLICY*", "README.md",
)  # fmt: skip
DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"  # the embedded model
_IGNORED = ("original/*", "onnx/*", ".*")


@dataclass(frozen=True)
class Location:
    """Where a source lies: name as given, local directory, and Hub commit if it came from there."""

    name: str
    path: Path
    revision: str | None = None


@dataclass(frozen=True)
class Source(Location):
    """A source to work on, opened and checked."""

    checkpoint: Checkpoint = field(kw_only=True)


def open_source(name: str) -> Source:
    """Find or download `name` and open it, without reading a tensor: config, headers, and a tensor for every layer.

    Raises SourceError, also for quantized weights, HubError, or ArchitectureError for an unknown model type.
    """
    found = resolve(name)
    checkpoint = Checkpoint.open(found.path)
    refuse_quantized(checkpoint)
    checkpoint.check_layers()
    return Source(found.name, found.path, found.revision, checkpoint=checkpoint)


def resolve(source: str, *, weights: bool = True) -> Location:
    """Find or download `source`: "demo", a local directory, or `org/name[@revision]` on the Hub.

    "demo" is always the embedded model; write "./demo" for a directory of that name. `weights=False` fetches only
    config and companion files. Raises SourceError or HubError.
    """
    if source == "demo":
        return Location("demo", DEMO)
    path = Path(source).expanduser()
    if path.exists():
        real = path.resolve()
        return Location(source, path, real.name if real.parent.name == "snapshots" else None)
    match = re.fullmatch(r"([\w.-]+/)?([\w.-]+)(?:@([\w./-]+))?", source)
    if match is None or source.startswith((".", "/", "~")) or (match[1] is None and match[3] is None):
        raise SourceError(f"{source}: no such directory, and not a Hub id like org/name or org/name@revision")
    repo, revision = (match[1] or "") + match[2], match[3]
    return _download(repo, revision, weights)


def _download(repo: str, revision: str | None, weights: bool) -> Location:
    path = _snapshot(repo, revision, COMPANIONS)
    if weights:
        # An index among the companions lists the shards; without one, try the single file of either format.
        for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN)):
            wanted = _indexed(path / index) or [single]
            path = _snapshot(repo, revision, wanted)
            if all((path / name).exists() for name in wanted):
                break
        else:
            path = _snapshot(repo, revision, ["*.safetensors"])
        if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
            raise HubError(f"{repo}: no safetensors or .bin weights on the Hub; choose another repository")
    commit = path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else revision
    return Location(repo + (f"@{revision}" if revision else ""), path, commit)


def _indexed(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        return sorted({str(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # missing or broken: Checkpoint.open reports it


def _snapshot(repo: str, revision: str | None, patterns: list[str] | tuple[str, ...]) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED))
        )
    except Exception as error:  # huggingface_hub chooses the HTTP library, and so the kinds of errors
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        offline = "the Hub cannot be reached (offline or HF_HUB_OFFLINE is set); go online"
        reasons = {  # a kind before those that it is derived from
            hub.GatedRepoError: "gated; accept its licence on the Hub and set HF_TOKEN",
            hub.RevisionNotFoundError: "the repository has no such revision; check the part after the @",
            hub.RepositoryNotFoundError: "no such local directory or Hub repository (if it is private, set HF_TOKEN)",
            hub.HFValidationError: f"not a valid Hub id ({first})",
            hub.IncompleteSnapshotError: f"only partly in the Hub cache, and {offline} once to complete it",
            hub.LocalEntryNotFoundError: "no such local directory, not in the Hub cache, and "
            f"{offline} or pass a local directory",
            Exception: f"the download failed ({first[:200]}); run the command again to resume it",
        }
        reason = next(words for kind, words in reasons.items() if isinstance(error, kind))
        raise HubError(f"{repo}{f'@{revision}' if revision else ''}: {reason}") from None
