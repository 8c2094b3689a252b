"""The distance from the source, against plain transformers on the written checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import slicer, succeeds
from torch.nn import functional

from slicer.checkpoint.hub import DEMO
from slicer.data.kinds import KindText, of_all_kinds
from slicer.data.packing import open_tokenizer
from slicer.measure.faithfulness import faithfulness
from slicer.model.load import load_model
from slicer.model.walk import Walk
from slicer.plan.plan import Plan
from slicer.plan.records import KindRecord
from slicer.progress import SILENT


@pytest.fixture(scope="module")
def healed(held_out_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("healed") / "out"
    text = ["--calibration", held_out_file, "--samples", 16, "--seq-len", 96]
    succeeds("convert", "demo", "--drop", "5-7", "--heal", "fold", *text, "-o", out)
    return out


@torch.no_grad()
def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits[0].double().log_softmax(-1)


def test_it_is_that_of_plain_transformers(healed: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    succeeds("convert", "demo", "--drop", "5-7", "--heal", "none", "-o", bare)
    models = [load_model(path, dtype="float32", device="cpu") for path in (DEMO, bare, healed)]
    records = {kind.kind: kind for kind in Plan.load(healed).healing.kinds}  # type: ignore[union-attr]
    for kind in of_all_kinds(open_tokenizer(DEMO, False)):
        far, same, nats = [[], []], [0, 0], [0.0, 0.0, 0.0]
        for tokens in kind.documents:
            p, *others = (log_probabilities(model, tokens) for model in models)
            for k, q in enumerate(others):
                far[k].append(float((p.exp() * (p - q)).sum(-1).mean()))
                same[k] += int((p.argmax(-1) == q.argmax(-1)).sum())
            for k, q in enumerate((p, *others)):
                nats[k] += float(functional.nll_loss(q[:-1], tokens[0, 1:], reduction="sum"))
        found, n = records[kind.kind], sum(tokens.shape[1] for tokens in kind.documents)
        before, after = (sum(each) / len(each) for each in far)
        assert (found.documents, found.tokens, found.seen) == (len(kind.documents), n, False)
        assert found.before == pytest.approx(before, rel=1e-3) and found.after == pytest.approx(after, rel=1e-3)
        assert found.agreement_after == pytest.approx(same[1] / n, abs=2 / n)
        perplexities = [math.exp(x / (n - len(kind.documents))) for x in nats]
        recorded = [found.perplexity_source, found.perplexity_before, found.perplexity_after]
        assert recorded == pytest.approx(perplexities, rel=1e-3)


def test_an_unchanged_cut_is_as_far_as_before() -> None:
    texts = [KindText("x", tuple(torch.arange(5 + k, 45 + k)[None] for k in range(3)))]
    (found,) = faithfulness(Walk.out_of_core(DEMO), Plan.dropping(12, [4]), {}, texts, SILENT)
    assert found.before == found.after > 0 and found.closed == found.closed_error == 0 and not found.rises
    (whole,) = faithfulness(Walk.out_of_core(DEMO), Plan.whole(12), {}, texts, SILENT)
    assert abs(whole.after) < 1e-5 and whole.agreement_after == 1


def test_healing_that_leads_away_is_left_out_unless_it_was_asked_for(
    held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slicer.jobs import repair

    def away(*_: Any) -> tuple[KindRecord, ...]:
        return (KindRecord("code", False, 8, 900, 0.3, 0.4, 0.01, 0.03, 0.8, 0.7, 9.0, 10.0, 11.0),)

    monkeypatch.setattr(repair, "faithfulness", away)
    text = ["--drop", "5-7", "--calibration", held_out_file, "--samples", 8, "--seq-len", 48]
    auto = slicer("convert", "demo", *text, "-o", tmp_path / "auto")
    assert "not healed: it leads away from the source on code (KL 0.300 to 0.400)" in auto.stderr
    assert auto.exit_code == 0 and Plan.load(tmp_path / "auto").healing is None
    asked = slicer("convert", "demo", *text, "--heal", "fold", "-o", tmp_path / "asked")
    assert "healed as asked: it leads away" in asked.stderr and "use the checkpoint without it" in asked.stdout
