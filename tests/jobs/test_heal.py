"""`heal` in closed form: the second half of `convert`, from a cut on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import files
import pytest
import sources

from slicer.checkpoint.cut import open_cut
from slicer.errors import HealError, OutputError, PlanError, SlicerError, UsageError
from slicer.jobs.convert import convert
from slicer.jobs.heal import heal
from slicer.jobs.output import Written
from slicer.jobs.request import Compensation, ConvertRequest, HealRequest, Output, Selection, Text
from slicer.plan.amounts import Goal, parse_amount
from slicer.plan.plan import Plan
from slicer.plan.records import MergeRecord
from slicer.runtime.compute import Compute

CPU = Compute("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    file = sources.save_text(tmp_path_factory.mktemp("text") / "text.jsonl")
    return Text(str(file), samples=12, seq_len=32)


def cut(source: Path, out: Path, text: Text, method: str = "none", **given: object) -> Written:
    request = ConvertRequest(
        str(source),
        Goal(drop=parse_amount("2")),
        selection=Selection(offset="whole"),
        compensation=Compensation(method),
        text=text,
        output=Output(out),
        compute=CPU,
    )
    return convert(replace(request, **given))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bare(source: Path, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(source, tmp_path_factory.mktemp("cuts") / "bare", text).out or Path()


@pytest.fixture(scope="module")
def folded(source: Path, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(source, tmp_path_factory.mktemp("cuts") / "folded", text, "fold").out or Path()


def test_it_is_the_second_half_of_convert(bare: Path, folded: Path, text: Text, tmp_path: Path) -> None:
    """Its companion files and figures stay; a fold that was there before is undone, not folded again."""
    (bare / "chat_template.jinja").write_text("mine")
    for start in (bare, folded):
        out = tmp_path / start.name
        written = heal(HealRequest(str(start), text=text, output=Output(out), compute=CPU, command="slicer heal"))
        assert written is not None and written.verified == "logits"
        assert files.read_tensors(out) == files.read_tensors(folded)
        record = Plan.load(out).healing
        assert record is not None and record.command == "slicer heal" and record.earlier is None
        for name in ("distances.png", "curves.png", "distances.json"):
            assert (out / "slicer" / name).read_bytes() == (start / "slicer" / name).read_bytes()
        assert json.loads((out / "config.json").read_text()) == json.loads((start / "config.json").read_text())
    assert (tmp_path / bare.name / "chat_template.jinja").read_text() == "mine"
    (bare / "chat_template.jinja").unlink()


def test_a_source_that_does_not_fit_in_memory_is_streamed_and_its_logits_compared(
    bare: Path, text: Text, tmp_path: Path
) -> None:
    small = Compute("cpu", memory=200_000)
    output = Output(tmp_path / "out", verify="logits")
    written = heal(HealRequest(str(bare), text=text, output=output, compute=small))
    assert written is not None and written.verified == "logits" and written.plan.healing is not None
    assert written.logits_error is not None and written.logits_error < 1e-5
    assert written.plan.healing.solved and written.plan.healing.loss.after is not None


def test_what_cannot_be_healed_is_refused(
    source: Path, bare: Path, text: Text, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    parts = cut(source, tmp_path / "parts", text, goal=Goal(drop_attention=parse_amount("1")))
    merged, nameless = tmp_path / "merged", tmp_path / "nameless"
    for path, change in ((merged, {"merged": (MergeRecord("adapter"),)}), (nameless, {"source": None})):
        shutil.copytree(bare, path)
        plan = replace(Plan.load(path), **change)  # type: ignore[arg-type]
        (path / "slicer" / "plan.json").write_text(plan.to_json())
    other = sources.save_llama(tmp_path / "other", initializer_range=0.1)
    shallow = sources.save_llama(tmp_path / "shallow", layers=5)
    output = Output(tmp_path / "out")
    cases: list[tuple[type[SlicerError], str, HealRequest]] = [
        (HealError, "lacks attention", HealRequest(str(parts.out), output=output)),
        (HealError, "adapter was merged", HealRequest(str(merged), output=output)),
        (PlanError, "--base-model", HealRequest(str(nameless), output=output)),
        (PlanError, "plan", HealRequest(str(source), output=output)),
        (HealError, "not the source", HealRequest(str(bare), str(other), output=output)),
        (HealError, "has 5", HealRequest(str(bare), str(shallow), output=output)),
        (OutputError, "not empty", HealRequest(str(bare), output=Output(bare.parent / "bare2"))),
        (OutputError, "inside", HealRequest(str(bare), output=Output(bare / "deep"))),
        (OutputError, "inside", HealRequest(str(bare), output=Output(source / "deep"))),
        (UsageError, "--output-dir", HealRequest(str(bare))),
        (UsageError, "bias", HealRequest(str(bare), compensation=Compensation("bias"), output=output)),
    ]
    (bare.parent / "bare2").mkdir()
    (bare.parent / "bare2" / "x").write_text("x")
    for kind, words, request in cases:
        with pytest.raises(kind, match=words):
            heal(replace(request, text=text, compute=CPU))
    assert not (tmp_path / "out").exists()


def test_a_cut_is_compared_with_its_source_but_for_what_was_repaired(source: Path, folded: Path) -> None:
    found = open_cut(str(folded))
    assert found.plan.healing is not None and found.source.path == source
    unrecorded = replace(found.plan, healing=None)
    file = folded / "slicer" / "plan.json"
    before = file.read_text()
    try:
        file.write_text(unrecorded.to_json())
        with pytest.raises(HealError, match="differs"):
            open_cut(str(folded))
    finally:
        file.write_text(before)
