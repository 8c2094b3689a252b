"""`convert --heal` and `slicer heal`, end to end on the embedded model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import files
import pytest
import sources
import torch
from commands import slicer, succeeds

from slicer.checkpoint.hub import DEMO

LAYER_3 = {"model.layers.3.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"}


@pytest.fixture(scope="module")
def text(held_out_file: Path) -> list[object]:
    """Options that calibrate on text the embedded model was not trained on."""
    return ["--calibration", held_out_file, "--samples", 32, "--seq-len", 64]


@pytest.fixture(scope="module")
def bare(text: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bare") / "bare"
    succeeds("convert", "demo", "--drop", "4-6", "--heal", "none", "-o", out)
    return out


@pytest.fixture(scope="module")
def folded(text: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folded") / "folded"
    succeeds("convert", "demo", "--drop", "4-6", "--heal", "fold", *text, "-o", out)
    return out


def test_only_the_healed_tensors_differ(bare: Path, folded: Path) -> None:
    old, new = files.read_tensors(bare), files.read_tensors(folded)
    assert old.keys() == new.keys()
    healed = json.loads((folded / "slicer" / "plan.json").read_text())["healing"]["tensors"]
    kept = [0, 1, 2, 3, 7, 8, 9, 10, 11]
    renumbered = {
        key.replace(f"layers.{i}.", f"layers.{at}.")
        for at, i in enumerate(kept)
        for key in healed
        if f"layers.{i}." in key
    }
    changed = {key for key in old if old[key] != new[key]}
    assert changed == renumbered


def test_it_is_recorded_with_figures(bare: Path, folded: Path) -> None:
    record = json.loads((folded / "slicer" / "plan.json").read_text())["healing"]
    assert record["method"] == "fold" and record["solver"] == "resolve"
    assert record["text"]["samples"] == 32 and record["text"]["sha256"]
    assert record["loss"]["after"] < record["loss"]["before"]
    assert LAYER_3 & set(record["tensors"])
    card = (folded / "README.md").read_text()
    own, *others = record["kinds"]
    assert own["seen"] and own["after"] < own["before"] and not any(kind["seen"] for kind in others)
    assert f"{own['after']:.3f}" in card and "`mlp.down_proj` of layer 3" in card
    assert "nothing was trained or healed" in (bare / "README.md").read_text()
    assert json.loads((bare / "slicer" / "plan.json").read_text())["healing"] is None
    assert "fold" in succeeds("inspect", folded).output


def test_heal_by_hand_gives_the_same_weights(bare: Path, folded: Path, text: list[object], tmp_path: Path) -> None:
    result = succeeds("heal", bare, "--base-model", "demo", *text, "-o", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["verified"] == "logits"
    assert files.read_tensors(tmp_path / "out") == files.read_tensors(folded)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (bare / name).read_bytes()


def test_healing_again_starts_from_the_source(bare: Path, folded: Path, text: list[object], tmp_path: Path) -> None:
    """The source is the one its plan names; what the first healing changed is first put back."""
    succeeds("heal", folded, "--solver", "transform", *text, "-o", tmp_path / "a")
    succeeds("heal", bare, "--solver", "transform", *text, "-o", tmp_path / "b")
    a, b, old = (files.read_tensors(path) for path in (tmp_path / "a", tmp_path / "b", bare))
    assert a == b and {key for key in a if a[key] != old[key]} == {"model.layers.3.mlp.down_proj.weight"}


def test_a_healed_plan_replays_to_the_same_weights(folded: Path, tmp_path: Path) -> None:
    succeeds("convert", "demo", "--plan", folded / "slicer" / "plan.json", "-o", tmp_path / "out")
    assert files.read_tensors(tmp_path / "out") == files.read_tensors(folded)


def test_a_cast_comes_with_the_healing(text: list[object], tmp_path: Path) -> None:
    given = ["--drop", "4-6", "--dtype", "float32", "--heal", "auto", *text]
    succeeds("convert", "demo", *given, "-o", tmp_path / "out")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    succeeds("heal", tmp_path / "out", "--solver", "transform", *text, "-o", tmp_path / "again")


@pytest.mark.parametrize("given", [["--strategy", "tail", "--drop", 2], ["--drop", "4-5"]])
def test_without_calibration_data_nothing_is_healed_and_it_says_so(given: list[object], tmp_path: Path) -> None:
    given = [*given, "--heal", "auto"]
    result = succeeds("convert", sources.save_llama(tmp_path / "tiny"), *given, "-o", tmp_path / "out")
    assert "not healed" in result.stderr and "--calibration" in result.stderr
    assert json.loads((tmp_path / "out" / "slicer" / "plan.json").read_text())["healing"] is None


def test_a_cut_that_cannot_be_healed_is_written_bare_unless_healing_was_asked_for(
    text: list[object], tmp_path: Path
) -> None:
    given = ["convert", "demo", "--drop", "0-1", "--solver", "transform", *text]
    result = succeeds(*given, "--heal", "auto", "-o", tmp_path / "bare")
    assert "not healed: no weights next to the cut" in " ".join(result.stderr.split())
    result = slicer(*given, "--heal", "fold", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "no weights next to the cut" in result.output
    assert os.listdir(tmp_path) == ["bare"]


@pytest.mark.parametrize("wrong", ["bytes", "model"])
def test_a_wrong_write_never_appears(
    text: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """The healed tensors are compared bit for bit, and the logits with those of the pruned source that has them."""
    from slicer.checkpoint import export
    from slicer.jobs import repair

    if wrong == "bytes":
        write: Any = export.write
        monkeypatch.setattr(export, "write", lambda *a, **k: _flipped(a[1], write(*a, **k)))
    else:
        place: Any = repair.place
        monkeypatch.setattr(repair, "place", lambda *given: _scaled(place(*given)))
    result = slicer("convert", "demo", "--drop", "4-6", "--heal", "fold", *text, "-o", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert ("healed weights" if wrong == "bytes" else "logits") in result.output
    assert not os.listdir(tmp_path)


def _flipped(directory: Path, _: None) -> None:
    """One bit of a healed tensor is another one on disk."""
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start, _end = json.loads(content[8 : 8 + size])["model.layers.3.mlp.down_proj.weight"]["data_offsets"]
    content[8 + size + start] ^= 64
    file.write_bytes(content)


def _scaled(patch: Any) -> Any:
    """The tensors that are written are not those that the source was run with."""
    from dataclasses import replace

    spans = {k: replace(s, make=lambda s=s: 1.5 * s.make()) for k, s in patch.replaced.items()}
    return replace(patch, replaced=spans)


def test_bad_input_is_one_line_and_leaves_nothing(bare: Path, text: list[object], tmp_path: Path) -> None:
    tiny = sources.save_llama(tmp_path / "tiny")
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in DEMO.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    content = bytearray((twin / "model.safetensors").read_bytes())
    content[-1000] ^= 64
    (twin / "model.safetensors").write_bytes(content)
    out = tmp_path / "out"
    cases: list[tuple[list[object], str]] = [
        ([bare, "--base-model", tiny, *text], "6"),
        ([bare, "--base-model", twin, *text], "differs"),
        ([tiny, *text], "plan"),
        ([bare, *text[:2], "--samples", 2, "--seq-len", 16], "too few"),
        ([bare, *text[:2], "--solver", "transform", "--samples", 100], "too short"),
        ([bare, "--calibration", tmp_path / "none.txt"], "none.txt"),
    ]
    for given, word in cases:
        result = slicer("heal", *given, "-o", out)
        assert result.exit_code == 1 and word in result.output, result.output
        assert len(result.stderr.strip().splitlines()) == 1 and not out.exists()
    assert slicer("heal", bare, *text, "-o", bare).exit_code == 1
