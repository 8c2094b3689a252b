"""What is checked before vLLM starts, and what is chosen for a small machine. No vLLM needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from cuts import export

from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.cli.main import main
from slicer.errors import ServeError
from slicer.plan.plan import Plan
from slicer.runtime import memory
from slicer.serve import server, settings


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "on_cpu", lambda: True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def flags(*arguments: str, path: Path | None = None) -> tuple[str, ...]:
    return settings.prepare(path or DEMO, None, 3, arguments).arguments


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--tensor-parallel-size", "2"], "2"),
        (["--tensor_parallel_size=2"], "2"),
        (["-tp", "2"], "2"),
        (["--other", "2"], None),
        (["-tp"], ""),
    ],
)
def test_a_flag_is_found_in_every_spelling(words: list[str], value: str | None) -> None:
    assert settings.flag(words, "--tensor-parallel-size", "-tp") == value


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-tp", "2"], "5 attention heads"),
        (["-tp", "two"], "whole number"),
        (["--pipeline-parallel-size", "13"], "12 layers"),
    ],
)
def test_parallelism_that_does_not_fit_is_refused(words: list[str], reason: str) -> None:
    with pytest.raises(ServeError, match=reason):
        flags(*words)


def test_pipeline_stages_are_held_against_the_sliced_depth(tmp_path: Path) -> None:
    out = export(Checkpoint.open(DEMO), Plan.dropping(12, range(2, 11)), tmp_path / "o")
    with pytest.raises(ServeError, match="3 layers"):
        flags("-pp", "4", path=out)
    flags("-pp", "3", path=out)


def test_what_vllm_does_not_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="does not serve gpt_neo"):
        flags(path=tiny.save_tiny("gpt_neo", tmp_path / "m"))


def test_a_head_size_without_a_cpu_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="not 24"):
        flags(path=tiny.save_tiny("llama", tmp_path / "m", head_dim=24))


def test_the_cache_leaves_room_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 3 << 30)
    cache = int(settings.flag(flags(), "--kv-cache-memory-bytes") or 0)
    assert 0 < cache <= 1 << 30
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    with pytest.raises(ServeError, match="too little"):
        flags()


def test_a_context_that_does_not_fit_the_cache_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "long"
    shutil.copytree(DEMO, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10_000_000}))
    monkeypatch.setattr(memory, "available", lambda: 4 << 30)
    found = settings.prepare(path, None, 3, ())
    context = int(settings.flag(found.arguments, "--max-model-len") or 0)
    cache = int(settings.flag(found.arguments, "--kv-cache-memory-bytes") or 0)
    assert 0 < context * 7680 <= cache  # 7680 bytes of keys and values a token
    assert any("instead of 10000000" in note for note in found.notes)


def test_what_the_user_says_is_left_alone() -> None:
    given = ("--dtype", "float32", "--kv-cache-memory-bytes", "1000000")
    assert flags(*given) == given


def test_a_draft_must_share_the_vocabulary_and_have_one_kind_of_layer(tmp_path: Path) -> None:
    other = tiny.save_tiny("llama", tmp_path / "other")
    with pytest.raises(ServeError, match="vocabulary differs"):
        settings.prepare(DEMO, other, 3, ())
    mixed = tiny.save_tiny("gemma2", tmp_path / "mixed")
    with pytest.raises(ServeError, match="mixes full_attention and sliding_attention"):
        settings.prepare(mixed, mixed, 3, ())
    found = settings.prepare(DEMO, DEMO, 4, ())
    said = json.loads(settings.flag(found.arguments, "--speculative-config") or "")
    assert said == {"model": str(DEMO), "method": "draft_model", "num_speculative_tokens": 4}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", "demo", "--host", "0.0.0.0"], 2, "--no-auth"),
        (["serve", "{tmp}"], 1, "no config.json"),
        (["serve", "demo", "--host", "192.0.2.1", "--api-key", "k"], 1, "192.0.2.1: not local"),
        (["serve", "demo", "--port", "70000"], 2, "70000"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    given = [word.format(tmp=tmp_path) for word in arguments]
    if "192.0.2.1" in given:
        given += ["--port", "0"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == code and words in result.stderr
    assert "Traceback" not in result.stderr


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda _: None)
    result = CliRunner().invoke(main, ["serve", "demo"])
    assert result.exit_code == 1 and "slicer-llm[serve-cpu]" in result.stderr
