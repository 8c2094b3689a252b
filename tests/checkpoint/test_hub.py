"""Hub ids resolve through huggingface_hub, against a local server that speaks its file API.

Each case is a process of its own: the Hub's settings are read from the environment when its library is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import files
import hub_server
import pytest

CODE = """
import json, sys
from slicer.checkpoint import hub
from slicer.errors import SlicerError
try:
    found = hub.resolve(sys.argv[1])
    print(json.dumps({"path": str(found.path), "revision": found.revision, "name": found.name}))
except SlicerError as error:
    print(json.dumps({"error": str(error), "kind": type(error).__name__}))
"""


def resolve(source: str, cache: Path, **environment: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, source],
        env={**clean, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    files.write_checkpoint(root, shards=3)
    for name in (
        "tokenizer.json",
        "LICENSE",
        "modeling_x.py",
        "chat_template.jinja",
        "pytorch_model.bin",
        "model.gguf",
    ):
        (root / name).write_text("{}")
    (root / "original").mkdir()
    (root / "original" / "consolidated.00.pth").write_text("x")
    (root / "original" / "params.json").write_text("{}")
    return root


def test_only_what_is_needed_is_downloaded_and_the_cache_serves_offline(repository: Path, tmp_path: Path) -> None:
    with hub_server.serve(hub_server.Hub({"org/name": repository})) as hub:
        found = resolve("org/name@v2", tmp_path / "cache", HF_ENDPOINT=hub.url)
        assert "error" not in found, found
        assert found["revision"] == hub_server.COMMIT
        first = list(hub.downloaded)
        assert resolve("org/name@v2", tmp_path / "cache", HF_ENDPOINT=hub.url) == found
        assert hub.downloaded == first
    names = {p.name for p in Path(found["path"]).iterdir()}
    assert names == {p.name for p in repository.iterdir()} - {"pytorch_model.bin", "model.gguf", "original"}
    assert resolve("org/name@v2", tmp_path / "cache", HF_HUB_OFFLINE="1") == found
    from slicer.checkpoint.reader import Checkpoint

    assert Checkpoint.open(Path(found["path"])).depth == 4


def test_bin_weights_are_taken_when_there_is_nothing_else(repository: Path, tmp_path: Path) -> None:
    for file in repository.glob("model*.safetensors*"):
        file.unlink()
    with hub_server.serve(hub_server.Hub({"org/name": repository})) as hub:
        found = resolve("org/name", tmp_path / "cache", HF_ENDPOINT=hub.url)
    assert (Path(found["path"]) / "pytorch_model.bin").exists()


def test_the_token_opens_a_gated_repository(repository: Path, tmp_path: Path) -> None:
    with hub_server.serve(hub_server.Hub({"org/name": repository}, token="secret")) as hub:
        refused = resolve("org/name", tmp_path / "cache", HF_ENDPOINT=hub.url)
        assert "HF_TOKEN" in refused["error"] and "secret" not in refused["error"]
        found = resolve("org/name", tmp_path / "cache", HF_ENDPOINT=hub.url, HF_TOKEN="secret")
        assert "error" not in found, found
        assert "secret" in hub.tokens


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("org/other", "no such local directory or Hub repository"),
        ("org/name@nowhere", "no such revision"),
        ("./not/here", "no such directory"),
    ],
)
def test_what_is_not_there_is_one_line(repository: Path, tmp_path: Path, source: str, word: str) -> None:
    with hub_server.serve(hub_server.Hub({"org/name": repository})) as hub:
        found = resolve(source, tmp_path / "cache", HF_ENDPOINT=hub.url)
    assert word in found["error"] and "\n" not in found["error"]


def test_offline_without_a_cache_says_so(tmp_path: Path) -> None:
    found = resolve("org/name", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert found["kind"] == "HubError" and "HF_HUB_OFFLINE" in found["error"]


def test_a_server_that_is_not_there_says_so(tmp_path: Path) -> None:
    found = resolve("org/name", tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:9")
    assert found["kind"] == "HubError" and "org/name" in found["error"]
