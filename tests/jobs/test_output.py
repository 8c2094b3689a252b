"""`write_verified`: what is written, that it is checked, that a wrong result never appears."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import files
import pytest
import sources
import torch

from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.hub import Source, open_source
from slicer.errors import OutputError, SourceError, VerificationError
from slicer.heal.patch import NONE, Patch
from slicer.jobs.output import Result, check_place, described, write_verified
from slicer.jobs.request import Output
from slicer.model.load import load_model
from slicer.model.verify import Expected, expected_logits, probe_tokens, text_loss
from slicer.model.walk import Walk
from slicer.plan.plan import Plan
from slicer.plan.records import HealingRecord, Losses, MergeRecord
from slicer.progress import Progress
from slicer.runtime.compute import Compute

KEY = "model.layers.1.mlp.down_proj.weight"
PLAN, CPU, QUIET = Plan.dropping(4, [2]), Compute("cpu"), Progress()
RECORD = HealingRecord("fold", None, Losses(3.0, 2.0, 1.0), (KEY,))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(sources.save_llama(tmp_path_factory.mktemp("models") / "tiny", layers=4)))


class OnDevice(torch.Tensor):
    """A tensor that claims to lie on another device: its bytes cannot be had before `.cpu()`."""

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def cpu(self, **_: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def patched(source: Source, make: Any) -> Patch:
    span = source.checkpoint.tensors[KEY]
    return Patch(replaced={KEY: span.made(KEY, make)}, record=RECORD)


def weight(source: Source, fill: float = 0.5) -> torch.Tensor:
    return torch.full(source.checkpoint.tensors[KEY].shape, fill)


def test_new_weights_on_a_device_are_written(source: Source, tmp_path: Path) -> None:
    tensor = weight(source)
    patch = patched(source, lambda: tensor.as_subclass(OnDevice))
    write_verified(Result.of_cut(source, PLAN, patch), None, Output(tmp_path / "out"), CPU, QUIET)
    assert files.read_tensors(tmp_path / "out")[KEY] == tensor.numpy().tobytes()


@pytest.mark.parametrize("verify", ["load", "none"])
def test_a_changed_tensor_that_is_not_there_bit_for_bit_is_found(source: Source, tmp_path: Path, verify: str) -> None:
    count = itertools.count()
    patch = patched(source, lambda: weight(source, next(count)))  # another one whenever it is made
    with pytest.raises(VerificationError, match=KEY):
        write_verified(Result.of_cut(source, PLAN, patch), None, Output(tmp_path / "o", verify=verify), CPU, QUIET)
    assert not os.listdir(tmp_path)


def test_the_logits_of_loaded_and_streamed_walks_are_those_of_the_result(source: Source, tmp_path: Path) -> None:
    model = load_model(source.path, device="cpu")
    for walk in (Walk.in_memory(model), Walk.out_of_core(source.path, device="cpu")):
        expected = expected_logits(walk, PLAN, {}, "logits")
        assert expected is not None and expected.loads is walk.loaded
        out = Output(tmp_path / f"loaded-{walk.loaded}")
        written = write_verified(Result.of_cut(source, PLAN, NONE), expected, out, CPU, QUIET)
        assert written.verified == "logits" and written.logits_error is not None and written.logits_error < 1e-5
        wrong = replace(expected, logits=expected.logits * 1.01)
        with pytest.raises(VerificationError, match="logits differ"):
            write_verified(Result.of_cut(source, PLAN, NONE), wrong, Output(tmp_path / "wrong"), CPU, QUIET)
    assert expected_logits(walk, PLAN, {}, "load") is None
    assert sorted(os.listdir(tmp_path)) == ["loaded-False", "loaded-True"]


def test_rounded_weights_are_compared_twice(source: Source, tmp_path: Path) -> None:
    model = load_model(source.path, device="cpu")
    expected = expected_logits(Walk.in_memory(model), PLAN, {}, "logits")
    assert expected is not None and expected.logits is not None
    rounded = replace(expected, exact=expected.logits * (1 + 5e-6))
    written = write_verified(Result.of_cut(source, PLAN, NONE), rounded, Output(tmp_path / "out"), CPU, QUIET)
    assert written.rounding_error == pytest.approx(5e-6, rel=0.2)
    off = replace(expected, exact=expected.logits * (1 + 1e-3))
    with pytest.raises(VerificationError):
        write_verified(Result.of_cut(source, PLAN, NONE), off, Output(tmp_path / "off"), CPU, QUIET)


def test_the_loss_after_is_that_of_what_lies_on_disk(source: Source, tmp_path: Path) -> None:
    tokens = probe_tokens(258)
    labels = tokens.clone()
    labels[:, :12] = -100
    patch, expected = patched(source, lambda: weight(source)), Expected(None, None, text=[(tokens, labels)])
    written = write_verified(Result.of_cut(source, PLAN, patch), expected, Output(tmp_path / "out"), CPU, QUIET)
    model = load_model(tmp_path / "out", device="cpu")
    logits = model(tokens).logits[:, 11:-1].flatten(0, 1)
    loss = float(torch.nn.functional.cross_entropy(logits, tokens[:, 12:].flatten()))
    assert text_loss(model, [(tokens, labels)]) == pytest.approx(loss, rel=1e-5)
    assert written.plan.healing is not None and written.verified == "load"
    assert written.plan.healing.loss.after == pytest.approx(loss, rel=1e-5)
    assert Plan.load(tmp_path / "out").healing == written.plan.healing


def test_a_cut_that_is_changed_again_keeps_its_own_files(source: Source, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    write_verified(Result.of_cut(source, PLAN, NONE), None, Output(cut), CPU, QUIET)
    (cut / "chat_template.jinja").write_text("mine")
    (cut / "slicer" / "distances.png").write_bytes(b"\x89PNG")
    patch = patched(source, lambda: weight(source))
    again = Result.of_cut(source, PLAN, patch, origin=cut)
    write_verified(again, None, Output(tmp_path / "again"), CPU, QUIET)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "mine"
    assert (tmp_path / "again" / "slicer" / "distances.png").is_file()
    card = (tmp_path / "again" / "README.md").read_text()
    assert "distances.png" in card and "license: mit" in card
    assert Plan.load(tmp_path / "again").healing == RECORD
    twice = Result.of_cut(open_source(str(cut)), Plan.dropping(3, [1]), NONE)  # the cut as a source
    write_verified(twice, None, Output(tmp_path / "twice"), CPU, QUIET)
    assert not (tmp_path / "twice" / "slicer" / "distances.png").exists()


def test_an_adapter_is_entered_with_its_check(source: Source, tmp_path: Path) -> None:
    cut, merge = tmp_path / "cut", MergeRecord("adapter", tensors=(KEY,))
    write_verified(Result.of_cut(source, PLAN, NONE), None, Output(cut), CPU, QUIET)
    patch = replace(patched(source, lambda: weight(source)), record=None)
    for base, plan in ((open_source(str(cut)), PLAN), (source, Plan.whole(4))):
        out = tmp_path / f"out-{base.checkpoint.depth}"
        result = Result.of_base(base.checkpoint, plan, patch, merge=merge)
        written = write_verified(result, None, Output(out), CPU, QUIET)
        assert written.plan.merged == (replace(merge, verified="load"),)
        assert "LoRA adapter" in (out / "README.md").read_text()
        assert (out / "slicer" / "plan.json").exists() is (plan is PLAN)
        assert json.loads((out / "config.json").read_text()) == base.checkpoint.config
    assert Plan.load(tmp_path / "out-3").merged == written.plan.merged


def test_replaced_tensors_must_have_the_shape_of_the_old_ones(source: Source) -> None:
    span = source.checkpoint.tensors[KEY]
    with pytest.raises(SourceError, match=KEY):
        Result.of_cut(source, PLAN, Patch(replaced={KEY: replace(span, shape=(1, 1))}))


def test_what_a_dry_run_tells_is_what_is_written(source: Source, tmp_path: Path) -> None:
    result = Result.of_cut(source, replace(PLAN, dtype="float16"), NONE)
    told = described(result)
    assert told.out is None and told.verified == "nothing written"
    written = write_verified(result, None, Output(tmp_path / "out"), CPU, QUIET)
    weights = sum(len(data) for data in files.read_tensors(tmp_path / "out").values())
    assert told.after == written.after and weights == told.after.total_bytes == told.before.total_bytes // 2 - (
        told.before.layer_bytes[2] // 2
    )
    assert told.to_dict() == {**written.to_dict(), "out": None, "verified": "nothing written"}


def test_a_place_that_cannot_be_written(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = Result.of_cut(source, PLAN, NONE)
    assert result.name == "tiny-3L"
    check_place(result, Output())
    (tmp_path / "tiny-3L").mkdir()
    (tmp_path / "tiny-3L" / "x").write_text("x")
    for output in (Output(), Output(source.path / "inside"), Output(source.path.parent)):
        with pytest.raises(OutputError):
            check_place(result, output)


def test_the_config_of_a_cut_needs_no_transformers_where_it_is_explicit(source: Source) -> None:
    assert sliced_config(source.checkpoint, PLAN) == {**source.checkpoint.config, "num_hidden_layers": 3}
