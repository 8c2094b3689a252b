"""The page holds everything itself, says what was found, and looks the same twice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from slicer.cli.main import main
from slicer.evaluate.generation import judge
from slicer.evaluate.loss import TextLoss
from slicer.evaluate.results import Evaluation, Score
from slicer.measure.analysis import Distances
from slicer.plan.plan import Plan
from slicer.report import figures
from slicer.report.page import write_report
from slicer.sweep.grid import UNPRUNED, Cell
from slicer.sweep.run import record_cells
from slicer.sweep.store import Store
from slicer.sweep.table import curves_of, read_table
from slicer.sweep.verdict import judge as judge_table


def evaluation(right: int, nats: float) -> Evaluation:
    """400 questions, the first `right` of them answered rightly."""
    error = (right / 400 * (1 - right / 400) / 399) ** 0.5
    items = {"mmlu/acc": {str(i): float(i < right) for i in range(400)}, "c4": {str(i): nats for i in range(16)}}
    loss = TextLoss(nats, 0.02, nats / 10.4, nats / 4, 32000, 4000, 16, "c4.jsonl", "d1")
    health = judge([("Once <upon> a time", f" there & {right}")] * 8, [4] * 8)
    score = Score("mmlu", "acc", right / 400, error, 0.25, 400, 0)
    return Evaluation("m", (score,), loss, health, items, {}, {"torch": "2.13"})


def training(held_out: dict[str, float]) -> dict[str, object]:
    """As a training records itself."""
    corpus = {"source": "a.txt", "train_sequences": 9, "held_out_sequences": 2}
    return {"start": "cut", "asked": {}, "settings": {}, "corpus": corpus, "held_out": held_out}


SETTINGS = {"source": "org/model", "depth": 8, "tasks": ["mmlu", "c4"], "seed": 7}


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    directory = tmp_path / "s"
    store = Store(directory, SETTINGS)
    scored = {
        UNPRUNED: (240, 2.5), Cell(2, "similarity", "none"): (236, 2.6), Cell(4, "similarity", "none"): (110, 5.0),
        Cell(2, "deepest", "none"): (190, 3.0), Cell(4, "similarity", "fold"): (150, 3.5),
    }  # fmt: skip
    for cell, (right, nats) in scored.items():
        dropped = list(range(7 - cell.n, 7))
        loss = {"source": 2.5, "before": 5.0, "after": 3.5}
        healing = {"method": "fold", "loss": loss, "training": training({"0": 4.0, "10": 3.6})}
        store.put(cell.name, {
            "cell": asdict(cell), "dropped": dropped, "distance": 0.1, "error": None, "seconds": 1.0,
            "evaluation": evaluation(right, nats).to_dict(), "healing": healing if cell.heal == "fold" else None,
        })  # fmt: skip
    record_cells(store, [*scored, Cell(6, "deepest", "none")], "slicer sweep org/model --drop 0,2,4")
    mean = {n: [0.1 * n + 0.01 * i for i in range(9 - n)] for n in range(1, 9)}
    distances = Distances(8, 16, 64, mean, {n: [0.01] * len(row) for n, row in mean.items()})
    (directory / "distances.json").write_text(distances.to_json())
    bench = {
        "verdict": "time falls with the layers: linear",
        "lines": {"prefill_ms": {"slope": 2, "intercept": 1, "r2": 1.0}},
        "models": [{"layers": n, "prefill_ms": 1 + 2 * n, "label": str(n)} for n in (4, 6, 8)],
    }  # fmt: skip
    (directory / "bench.json").write_text(json.dumps(bench))
    return directory


class References(HTMLParser):
    """Everything that a browser would fetch, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page(swept: Path) -> None:
    html, markdown = write_report(swept)
    page = html.read_text("utf-8")
    seen = References()
    seen.feed(page)
    assert seen.fetched and all(reference.startswith("data:") for reference in seen.fetched)
    assert not re.search(r"<script|@import|url\(", page)
    words = " ".join(" ".join(seen.words).split())
    for text in (
        "Recommended: drop 2 of 8 layers (25%), layers 5-6 (similarity)", "Knee of mmlu", "60% of the loss",
        "1 cells of the sweep are not finished", "slicer sweep org/model --drop 0,2,4", "--plan",
        "Once <upon> a time", "there & 236", "linear", "Loss during healing", "torch", "seed", "0.275 ± 0.022*",
    ):  # fmt: skip
        assert text in words, text
    plan = Plan.load(swept / "report" / "plan.json")
    assert plan.dropped == (5, 6) and plan.healing is None and f"--plan {swept}/report/plan.json" in words
    plain = markdown.read_text("utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", plain)
    assert len(pictures) == len([f for f in seen.fetched if "image" in f])
    assert all((swept / name).is_file() for name in pictures)
    assert "Recommended: drop 2 of 8 layers" in plain and "there & 236" in plain and "0.275 ± 0.022\\*" in plain


def put(directory: Path, cell: Cell, found: Evaluation, healing: object = None) -> None:
    """One more finished cell."""
    store = Store(directory, SETTINGS)
    store.put(cell.name, {
        "cell": asdict(cell), "dropped": list(range(7 - cell.n, 7)), "distance": 0.1, "error": None, "seconds": 1.0,
        "evaluation": found.to_dict(), "healing": healing,
    })  # fmt: skip
    record_cells(store, [cell], "slicer sweep org/model --more")


def test_what_is_recommended_is_made_again_with_its_healing(swept: Path) -> None:
    """Also of a sweep that slicer 0.1 measured."""
    of_training = training({"0": 3.0, "5": 2.7})
    text = {"source": "a.txt", "samples": 4, "seq_len": 8}
    healing = {"method": "qlora", "calibration": text, "data": of_training.pop("corpus"), **of_training}
    loss = {"before": 3.0, "healed": 2.7, "source": None}
    put(swept, Cell(5, "similarity", "qlora@8", 3), evaluation(239, 2.7), {**healing, "loss": loss})
    html, _ = write_report(swept)
    assert "Recommended: drop 5 of 8 layers" in html.read_text("utf-8")
    plan = Plan.load(swept / "report" / "plan.json")
    assert (
        plan.healing is not None
        and plan.healing.method == "qlora"
        and plan.healing.training is not None
        and len(plan.dropped) == 5
    )
    assert "3.0000" in html.read_text("utf-8")  # of the cut, where no loss of the original was measured


def test_good_scores_do_not_excuse_a_terrible_loss(swept: Path) -> None:
    put(swept, Cell(6, "similarity", "none"), evaluation(240, 9.0))
    put(swept, Cell(5, "similarity", "none"), evaluation(240, float("nan")))
    best = judge_table(read_table(swept)).row
    assert best is not None and best.n == 2


def test_a_task_at_guessing_recommends_nothing(swept: Path) -> None:
    """The unpruned model guesses: its score cannot fall, and the loss has to tell."""
    for cell, nats in ((UNPRUNED, 2.5), (Cell(6, "similarity", "none"), 2.58)):
        put(swept, cell, evaluation(103, nats))
    found = judge_table(read_table(swept))
    assert found.row is not None and found.row.n == 6
    assert any("mmlu is not informative" in sentence for sentence in found.sentences)


def test_what_is_no_longer_recommended_leaves_no_plan(swept: Path) -> None:
    write_report(swept)
    assert (swept / "report" / "plan.json").is_file()
    put(swept, UNPRUNED, evaluation(400, 1.0))  # nothing comes near this one
    write_report(swept)
    assert not (swept / "report" / "plan.json").exists()


def test_the_promise_is_told(swept: Path) -> None:
    best = {"n": 2, "share": 0.985, "margin": 0.01, "standard_error": 0.02}
    told = {"share": 0.98, "metric": "mmlu", "best": best, "tried": [best] * 4}
    (swept / "promise.json").write_text(json.dumps(told))
    html, _ = write_report(swept)
    assert re.search("drops 2 layers .* 98.5%.*within the error", html.read_text("utf-8"))


def test_the_same_bytes_twice(swept: Path) -> None:
    first = [file.read_bytes() for file in write_report(swept)]
    assert [file.read_bytes() for file in write_report(swept)] == first


def test_nothing_to_report(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        result = CliRunner().invoke(main, ["report", str(directory)])
        assert result.exit_code == 1 and result.output.count("\n") == 1
    (tmp_path / "bench.json").write_text("{")
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 1 and "bench.json" in result.output


def test_a_part_alone_is_reported(swept: Path, tmp_path: Path) -> None:
    (tmp_path / "slicer").mkdir()
    shutil.copyfile(swept / "distances.json", tmp_path / "slicer" / "distances.json")
    html, _ = write_report(tmp_path)
    page = html.read_text("utf-8")
    assert "Angular distance" in page and "All cells" not in page


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_complaint(swept: Path, tmp_path: Path, width: int) -> None:
    """The page is as wide as its window (no sideways scrolling), and asks for nothing."""
    html, _ = write_report(swept)
    frame = tmp_path / "frame.html"
    page = html.read_text("utf-8").replace(
        "</body>", "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    )
    (tmp_path / "page.html").write_text(page, "utf-8")
    frame.write_text(
        f"<iframe id=f src=page.html style='width:{width}px;height:900px;border:0'></iframe>"
        "<script>onload = () => document.body.append('W' + f.contentDocument.title + 'W')</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    shown = subprocess.run(["chromium", *flags, "--dump-dom", str(frame)], capture_output=True, text=True, timeout=120)
    widths = re.search(r"W(\d+) of (\d+)W", shown.stdout)
    assert widths is not None, shown.stderr[-2000:]
    assert int(widths[1]) <= int(widths[2]) == width
    assert "CONSOLE" not in shown.stderr


@pytest.mark.parametrize(
    ("plan", "block", "offset"),
    [
        (Plan(8, (0, 1, 2, 3, 4, 7), distance=0.09, joined=((4, 6),)), None, (4, 6, 0.09)),
        (replace(Plan.dropping(8, (5, 6)), distance=0.1), (5, 2), None),
        (Plan.dropping(8, (1, 6)), None, None),
    ],
)
def test_the_figures_mark_the_cut(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan, block: object, offset: object
) -> None:
    """A block of whole layers, or a half-offset one; what is neither has no mark."""
    (tmp_path / "slicer").mkdir()
    shutil.copyfile(swept / "distances.json", tmp_path / "slicer" / "distances.json")
    (tmp_path / "slicer" / "plan.json").write_text(plan.to_json())
    marked: list[object] = []
    honest = figures.distance_figures
    monkeypatch.setattr(figures, "distance_figures", lambda *given: marked.extend(given[1:]) or honest(*given))
    write_report(tmp_path)
    assert marked == [block, offset]


def test_seeds_are_one_line_that_shows_their_spread(swept: Path) -> None:
    for seed, right in ((0, 100), (1, 200)):
        put(swept, Cell(3, "random", "none", seed), evaluation(right, 3.0))
    curves, unpruned = curves_of(read_table(swept), "mmlu")
    (curve,) = (c for c in curves if c.strategy == "random")
    (_, whole, _), (x, mean, error) = curve.points
    assert (whole, x, mean) == (unpruned, 3 / 8, 0.375) == (0.6, 3 / 8, 0.375) and len(curve.each) == 2
    assert error > 0.17  # the two are 0.25 apart; each alone is known to 0.02
