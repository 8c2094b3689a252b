"""From what the user calls the source to a directory: a local path, a Hub id, or the embedded model.

The token, the endpoint, the cache and offline mode are huggingface_hub's own (HF_TOKEN, HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE); only config, tokenizer, code, licence and one format of the weights are downloaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from slicer.checkpoint.reader import BIN, BIN_INDEX, INDEX, SINGLE
from slicer.errors import HubError, SourceError

# Everything a checkpoint carries but its weights; export copies the same files.
COMPANIONS = (
    "*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken", "*.bpe", "*.vocab", "*.spm",
    "LICENSE*", "LICENCE*", "License*", "NOTICE*", "USE_POLICY*", "README.md",
)  # fmt: skip
_IGNORED = ("original/*", "onnx/*", ".*")


@dataclass(frozen=True)
class Source:
    """A resolved source: its name as given, the directory it is in, and the Hub commit if it came from there."""

    name: str
    path: Path
    revision: str | None = None


def resolve(source: str, *, weights: bool = True) -> Source:
    """Find or fetch `source`: "demo", a local directory, or `org/name[@revision]` on the Hub.

    "demo" is the embedded model wherever it is said; a directory of that name is "./demo". With `weights=False`
    nothing but config and companions is fetched. Raises SourceError or HubError.
    """
    if source == "demo":
        from slicer import demo

        return Source("demo", demo.path())
    path = Path(source).expanduser()
    if path.exists():
        parts = path.resolve().parts
        revision = parts[-1] if len(parts) > 1 and parts[-2] == "snapshots" else None
        return Source(source, path, revision)
    match = re.fullmatch(r"([\w.-]+/)?([\w.-]+)(?:@([\w./-]+))?", source)
    if match is None or source.startswith((".", "/", "~")) or (match[1] is None and match[3] is None):
        raise SourceError(f"{source}: no such directory, and not a Hub id like org/name or org/name@revision")
    repo, revision = (match[1] or "") + match[2], match[3]
    return _download(repo, revision, weights)


def _download(repo: str, revision: str | None, weights: bool) -> Source:
    path = _snapshot(repo, revision, COMPANIONS)
    if weights:
        # An index among the companions names the shards; without one, the single file of either format.
        for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN)):
            wanted = _indexed(path / index) or [single]
            path = _snapshot(repo, revision, wanted)
            if all((path / name).exists() for name in wanted):
                break
        else:
            path = _snapshot(repo, revision, ["*.safetensors"])
        if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
            raise HubError(
                f"{repo}: the Hub has no safetensors or .bin weights for it; choose another repository"
            )
    commit = path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else revision
    return Source(repo + (f"@{revision}" if revision else ""), path, commit)


def _indexed(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        return sorted({str(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # absent, or broken: Checkpoint.open says how


def _snapshot(repo: str, revision: str | None, patterns: list[str] | tuple[str, ...]) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    named = f"{repo}@{revision}" if revision else repo
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
            )
        )
    except hub.GatedRepoError:
        raise HubError(f"{named}: gated; accept its licence on the Hub and set HF_TOKEN") from None
    except hub.RevisionNotFoundError:
        raise HubError(f"{named}: the repository has no such revision; check what follows the @") from None
    except hub.RepositoryNotFoundError:
        raise HubError(
            f"{named}: no such local directory, and no such repository on the Hub (or it is private: set HF_TOKEN)"
        ) from None
    except hub.HFValidationError as error:
        raise HubError(f"{named}: not a valid Hub id ({str(error).splitlines()[0]})") from None
    except hub.IncompleteSnapshotError:
        raise HubError(
            f"{named}: the Hub cache holds only a part of it and the Hub cannot be reached "
            "(offline or HF_HUB_OFFLINE is set); go online once to complete it"
        ) from None
    except hub.LocalEntryNotFoundError:
        raise HubError(
            f"{named}: no such local directory, not in the Hub cache, and the Hub cannot be reached "
            "(offline or HF_HUB_OFFLINE is set); go online or give a local directory"
        ) from None
    except (
        Exception
    ) as error:  # the HTTP library underneath is huggingface_hub's choice, and so are its errors
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise HubError(
            f"{named}: the download failed ({reason}); run the command again to resume it"
        ) from None
