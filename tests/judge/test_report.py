"""The page holds everything itself, says what was found, and looks the same twice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from slicer.cli import main
from slicer.judge.grid import UNPRUNED, Cell
from slicer.judge.health import judge
from slicer.judge.journal import Journal
from slicer.judge.loss import Loss
from slicer.judge.report import _chosen, write_report
from slicer.judge.results import Evaluation, Score
from slicer.judge.sweep import record_cells
from slicer.measure.analysis import Distances
from slicer.plan import Plan


def evaluation(right: int, nats: float) -> Evaluation:
    """400 questions, the first `right` of them answered rightly."""
    error = (right / 400 * (1 - right / 400) / 399) ** 0.5
    items = {
        "mmlu/acc": {str(i): float(i < right) for i in range(400)},
        "c4": {str(i): nats for i in range(16)},
    }
    loss = Loss(nats, 0.02, nats / 10.4, nats / 4, 32000, 4000, 16, "c4.jsonl", "d1")
    health = judge([("Once <upon> a time", f" there & {right}")] * 8, [4] * 8)
    score = Score("mmlu", "acc", right / 400, error, 0.25, 400, 0)
    return Evaluation("m", (score,), loss, health, items, {}, {"torch": "2.13"})


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    directory = tmp_path / "s"
    journal = Journal(directory, {"source": "org/model", "depth": 8, "tasks": ["mmlu", "c4"], "seed": 7})
    scored = {
        UNPRUNED: (240, 2.5), Cell(2, "similarity", "none"): (236, 2.6), Cell(4, "similarity", "none"): (110, 5.0),
        Cell(2, "deepest", "none"): (190, 3.0), Cell(4, "similarity", "fold"): (150, 3.5),
    }  # fmt: skip
    for cell, (right, nats) in scored.items():
        dropped = list(range(7 - cell.n, 7))
        healing = (
            {"method": "fold", "loss": {"source": 2.5, "sliced": 5.0, "healed": 3.5}}
            if cell.heal == "fold"
            else None
        )
        if healing:
            healing["history"] = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.6}]
        journal.put(cell.name, {
            "cell": cell.to_dict(), "dropped": dropped, "distance": 0.1, "error": None, "seconds": 1.0,
            "evaluation": evaluation(right, nats).to_dict(), "healing": healing if cell.heal == "fold" else None,
        })  # fmt: skip
    record_cells(journal, [*scored, Cell(6, "deepest", "none")], "slicer sweep org/model --drop 0,2,4")
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
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")
        ]

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
        "Recommended: drop 2 of 8 layers (25%), layers 5-6 (similarity)", "Knee of mmlu", "wins back 60%",
        "1 cells of the sweep are not finished", "slicer sweep org/model --drop 0,2,4", "--drop 5-6 --heal none",
        "Once <upon> a time", "there & 236", "linear", "Loss while healing.", "torch", "seed", "0.275 ± 0.022*",
    ):  # fmt: skip
        assert text in words, text
    plain = markdown.read_text("utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", plain)
    assert len(pictures) == len([f for f in seen.fetched if "image" in f])
    assert all((swept / name).is_file() for name in pictures)
    assert (
        "Recommended: drop 2 of 8 layers" in plain and "there & 236" in plain and "0.275 ± 0.022\\*" in plain
    )


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
    assert "Which layers do least" in page and "All cells" not in page


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_complaint(swept: Path, tmp_path: Path, width: int) -> None:
    """The page is as wide as its window (no sideways scrolling), and asks for nothing."""
    html, _ = write_report(swept)
    frame = tmp_path / "frame.html"
    page = html.read_text("utf-8").replace(
        "</body>",
        "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>",
    )
    (tmp_path / "page.html").write_text(page, "utf-8")
    frame.write_text(
        f"<iframe id=f src=page.html style='width:{width}px;height:900px;border:0'></iframe>"
        "<script>onload = () => document.body.append('W' + f.contentDocument.title + 'W')</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    shown = subprocess.run(
        ["chromium", *flags, "--dump-dom", str(frame)], capture_output=True, text=True, timeout=120
    )
    widths = re.search(r"W(\d+) of (\d+)W", shown.stdout)
    assert widths is not None, shown.stderr[-2000:]
    assert int(widths[1]) <= int(widths[2]) == width
    assert "CONSOLE" not in shown.stderr


def test_a_half_offset_cut_is_no_block_of_whole_layers() -> None:
    half = Plan(12, tuple(i for i in range(12) if i not in (5, 6)), joined=((4, 6),), distance=0.09)
    assert _chosen(None, half) is None and half.half_offset == (4, 6, 0.09)
    whole = Plan.dropping(12, (5, 6), distance=0.1)
    assert _chosen(None, whole) == (5, 2) and whole.half_offset is None
