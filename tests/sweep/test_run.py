"""A sweep measures the real cuts, survives kills, and is shared by processes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cuts import export
from processes import EVALUATION, ForkServer

from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.cli.main import main
from slicer.errors import OutputError
from slicer.evaluate.suite import Suite, SuiteSpec, evaluate
from slicer.heal.compensate import fold
from slicer.heal.compensate.newton import STEPS, Newton
from slicer.plan.plan import Plan
from slicer.runtime.workdir import Stages
from slicer.sweep import run as cells_in_order
from slicer.sweep.store import Store
from slicer.sweep.table import read_table

GRID = ["--drop", "0,4", "--strategies", "similarity,random", "--limit", "4", "--samples", "8", "--seq-len", "48"]
FIXED = ["--device", "cpu", "--dtype", "float32"]


def sweep(directory: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["sweep", "demo", *GRID, *FIXED, "-o", str(directory), *more])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweep") / "s"
    result = sweep(directory, "--heal", "none,fold")
    assert result.exit_code == 0, result.output
    return directory


def test_a_cell_is_what_the_exported_cut_scores(swept: Path, tmp_path: Path) -> None:
    table = read_table(swept)
    assert table.missing == 0 and len(table.rows) == 5
    row = next(r for r in table.rows if r.n == 4 and r.strategy == "similarity" and r.heal == "none")
    export(Checkpoint.open(DEMO), Plan.dropping(12, row.dropped), tmp_path / "cut")
    text = DEMO.parent / "heldout.txt"
    options = SuiteSpec(tasks=("c4",), text=text, limit=4, device="cpu", dtype="float32")
    with Suite(options) as suite:
        alone = evaluate(str(tmp_path / "cut"), suite)
    assert row.evaluation is not None and alone.items == row.evaluation.items
    assert alone.health == row.evaluation.health


def test_healing_lowers_the_loss(swept: Path) -> None:
    rows = {(r.strategy, r.heal): r.evaluation for r in read_table(swept).rows if r.n == 4}
    bare, healed = rows["similarity", "none"], rows["similarity", "fold"]
    assert bare and healed and bare.loss and healed.loss
    assert healed.loss.nats_per_token < bare.loss.nats_per_token


def test_a_killed_sweep_ends_with_the_same_table(forks: ForkServer, swept: Path, tmp_path: Path) -> None:
    directory = tmp_path / "s"
    arguments = ["sweep", "demo", *GRID, *FIXED, "--heal", "none,fold", "-o", directory]
    forks.start(*arguments, modules=EVALUATION, hold=("os.rename", "-fold")).kill_held()
    done = set(directory.glob("cells/0*.json"))
    assert 0 < len(done) < 4
    stamps = {file: file.stat().st_mtime_ns for file in done}
    assert sweep(directory, "--heal", "none,fold").exit_code == 0
    assert (directory / "table.csv").read_bytes() == (swept / "table.csv").read_bytes()
    assert {file: file.stat().st_mtime_ns for file in done} == stamps, "finished cells were run again"


def test_stopped_after_a_stage_of_a_fold_it_does_nothing_twice(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(owner: Any, name: str) -> None:
        before = getattr(owner, name)

        def call(*given: Any, **more: Any) -> Any:
            calls.append(name)
            return before(*given, **more)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((cells_in_order, "measure"), (fold, "solve"), (Newton, "_back")):
        counted(owner, name)
    save: Callable[..., None] = Stages.save
    saved: list[str] = []

    def stop(self: Stages, name: str, *given: Any) -> None:
        save(self, name, *given)
        if not name.startswith(("factors", "direction")):  # parts of a stage
            saved.append(name)
            if len(saved) < 4 or len(saved) % 9 == 0:
                raise KeyboardInterrupt

    directory = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "save", stop)
        while (result := sweep(directory, "--heal", "none,fold")).exit_code:
            assert result.exit_code == 130, result.output
            found = list(directory.glob("folds/*/stages-*/*"))
            assert len({file.parent for file in found}) <= 1, "stages of finished cells are removed"
    stopped, calls[:] = list(calls), []
    assert sweep(tmp_path / "whole", "--heal", "none,fold").exit_code == 0
    assert sorted(stopped) == sorted(calls)
    assert saved.count("tokens") == 1 and saved.count("streams") == 2 and saved.count("steps") == 2 * STEPS
    assert (directory / "table.csv").read_bytes() == (swept / "table.csv").read_bytes()
    assert not (directory / "folds").exists()


def test_killed_at_any_moment_it_ends_with_the_same_table(forks: ForkServer, swept: Path, tmp_path: Path) -> None:
    directory, moments = tmp_path / "s", random.Random(0)
    for _ in range(6):
        run = forks.start("sweep", "demo", *GRID, *FIXED, "--heal", "none,fold", "-o", directory, modules=EVALUATION)
        try:
            run.wait(timeout=moments.uniform(0.5, 12))
        except AssertionError:
            run.kill()
    assert sweep(directory, "--heal", "none,fold").exit_code == 0
    assert (directory / "table.csv").read_bytes() == (swept / "table.csv").read_bytes()
    assert not (directory / "folds").exists()


def test_stages_of_another_version_or_of_a_finished_cell_are_removed(swept: Path, tmp_path: Path) -> None:
    """Killed between the two, a cell that is stored has stages still; those of another version are not resumed."""
    directory = tmp_path / "s"
    shutil.copytree(swept, directory)
    finished = directory / "folds" / "004-similarity-fold"
    finished.mkdir(parents=True)
    (finished / "x").write_text("x")
    unfinished = directory / "folds" / "004-random-fold-s0"
    (unfinished / "stages-1").mkdir(parents=True)
    (unfinished / "slicer-work.json").write_text(
        '{"what": "an unfinished fold of a sweep", "identity": {"versions": 1}}'
    )
    (directory / "cells" / "004-random-fold-s0.json").unlink()
    assert sweep(directory, "--heal", "none,fold").exit_code == 0
    assert (directory / "table.csv").read_bytes() == (swept / "table.csv").read_bytes()
    assert not (directory / "folds").exists()


def test_two_processes_share_the_cells(forks: ForkServer, swept: Path, tmp_path: Path) -> None:
    directory = tmp_path / "s"
    arguments = ["sweep", "demo", *GRID, *FIXED, "--heal", "none,fold", "-o", directory]
    group = forks.start_group(2, *arguments, modules=EVALUATION)
    for run in group:
        run.succeeds()
    said = [run.output.read_text() for run in group]
    assert "12 layers" in said[0] and not said[1], "only the first process speaks"
    assert " ".join(group[0].errors.read_text().split()).count("cells done") < 5, "it made none of the other's cells"
    assert (directory / "table.csv").read_bytes() == (swept / "table.csv").read_bytes()


def test_a_cell_has_one_worker(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "j", {"a": 1}), Store(tmp_path / "j", {"a": 1})
    with one.claim("x") as mine, two.claim("x") as yours, two.claim("y") as other:
        assert mine and not yours and other
        with pytest.raises(OutputError, match="a 1, not 2"):
            Store(tmp_path / "j", {"a": 2})
    with two.claim("x") as mine:
        assert mine
    with pytest.raises(OutputError, match="a 1, not 2"):
        Store(tmp_path / "j", {"a": 2})
    one.close()
    two.close()
    Store(tmp_path / "j", {"a": 2}).put("x", {})  # begun in vain before, and nobody has it open
    with pytest.raises(OutputError, match="a 2, not 1"):
        Store(tmp_path / "j", {"a": 1})
    with pytest.raises(OutputError, match="b unknown, not 1"):
        Store(tmp_path / "j", {"a": 2, "b": 1})
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not created by slicer"):
        Store(tmp_path / "k", {})


def test_keep_writes_a_plan_that_convert_takes(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    result = sweep(directory, "--retain", "0.9", "--metric", "c4", "--json")
    assert result.exit_code == 0, result.output
    plan = Plan.load(directory / "plan.json")
    assert plan.strategy == "similarity" and 0 < len(plan.dropped) < 12
    shown = CliRunner().invoke(main, ["convert", "demo", "--plan", str(directory / "plan.json"), "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["dropped"] == list(plan.dropped)


def test_what_keep_found_is_healed_again_as_it_was_measured(tmp_path: Path) -> None:
    text = ["--calibration", str(DEMO.parent / "heldout.txt")]
    result = sweep(tmp_path / "s", *text, "--retain", "0.9", "--metric", "c4", "--heal", "fold")
    assert result.exit_code == 0, result.output
    given = ["convert", "demo", "--plan", str(tmp_path / "s" / "plan.json"), "-o", str(tmp_path / "out")]
    made = CliRunner().invoke(main, given)
    assert made.exit_code == 0, made.output
    plan, told = Plan.load(tmp_path / "out"), json.loads((tmp_path / "s" / "promise.json").read_text())
    assert plan.healing is not None and plan.healing.method == "fold"
    assert len(plan.dropped) == told["best"]["n"] and told["share"] == 0.9


def test_a_passing_failure_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slicer.errors import HealError, OutOfMemory
    from slicer.sweep import cell as cells

    whole = cells.repair

    def short(*_: object, **__: object) -> None:
        raise OutOfMemory("out of memory; give --samples 8")

    def unfit(*_: object, **__: object) -> None:
        raise HealError("no matrix to solve")

    given = ["--heal", "fold", "--drop", "2", "--strategies", "deepest"]
    given += ["--calibration", str(DEMO.parent / "heldout.txt")]
    cell = tmp_path / "s" / "cells" / "002-deepest-fold.json"
    monkeypatch.setattr(cells, "repair", short)
    result = sweep(tmp_path / "s", *given)
    assert result.exit_code == 1 and "out of memory" in result.output and not cell.exists()
    monkeypatch.setattr(cells, "repair", whole)
    assert sweep(tmp_path / "s", *given).exit_code == 0
    assert json.loads(cell.read_text())["evaluation"] is not None
    monkeypatch.setattr(cells, "repair", unfit)
    assert sweep(tmp_path / "t", *given).exit_code == 0
    assert "no matrix" in json.loads((tmp_path / "t" / "cells" / "002-deepest-fold.json").read_text())["error"]


def test_other_data_is_another_sweep(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    given = ["--data", str(tmp_path / "data"), "--tasks", "boolq", "--drop", "0"]
    assert sweep(tmp_path / "s", *given).exit_code == 0
    file = tmp_path / "data" / "boolq" / "dev.jsonl"
    file.write_text(file.read_text().replace("glad", "sad"))
    result = sweep(tmp_path / "s", *given)
    assert result.exit_code == 1 and "task_files" in result.output


def test_one_line_for_what_cannot_be(swept: Path, tmp_path: Path) -> None:
    for arguments, code, words in (
        (["--retain", "0.9", "--metric", "mmlu"], 1, "not measured"),
        (["--metric", "c4"], 2, "--retain"),
        (["--drop", "0,40"], 1, "at most 11"),
        (["--heal", "prayer"], 2, "choose from"),
        (["--strategies", "similarity@3"], 2, "choose from"),
        (["--calibration", "none.txt"], 1, "no such file"),
        (["--max-steps", "5"], 2, "--heal"),
        (["--seeds", "a"], 2, "whole numbers"),
        (["--ablate", "seed"], 2, "--suite paper"),
    ):
        result = sweep(tmp_path / "none", *arguments)
        assert result.exit_code == code and words in result.output, (arguments, result.output)
        assert result.stderr.strip().count("\n") == 0
    assert not list((tmp_path / "none" / "cells").glob("*.json")), "nothing was measured before the refusals"
    clash = sweep(swept, "--limit", "3")
    assert clash.exit_code == 1 and "limit 4, not 3" in clash.output


def test_a_cell_is_trained_with_its_own_seed_and_rank(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    text = ["--calibration", str(DEMO.parent / "heldout.txt"), "--drop", "3", "--strategies", "deepest"]
    few = [
        "--max-steps",
        "4",
        "--train-batch-size",
        "2",
        "--train-seq-len",
        "32",
        "--train-from",
        "cut",
        "--learning-rate",
        "1e-3",
    ]
    given = [*text, *few, "--heal", "qlora@2", "--seeds", "1"]
    result = sweep(tmp_path / "s", *given)
    assert result.exit_code == 0, result.output
    cells = {row.seed: row for row in read_table(tmp_path / "s").rows if row.heal == "qlora@2"}
    assert cells.keys() == {1}
    record = json.loads((tmp_path / "s" / "cells" / "003-deepest-qlora2-s1.json").read_text())
    assert (settings := record["healing"]["training"]["settings"])["lora_r"] == 2 and settings["seed"] == 1
    assert record["evaluation"]["loss"]["nats_per_token"] > 0
    assert not (tmp_path / "s" / "training").exists()
    other = sweep(tmp_path / "s", *given, "--learning-rate", "1e-4")
    assert other.exit_code == 1 and "trained with other options" in other.output


def test_a_damaged_cell_is_measured_again(swept: Path, tmp_path: Path) -> None:
    directory = tmp_path / "s"
    shutil.copytree(swept, directory)
    (directory / "cells" / "004-similarity-none.json").write_text('{"cell": ')
    assert sweep(directory, "--heal", "none,fold").exit_code == 0
    assert (directory / "table.csv").read_bytes() == (swept / "table.csv").read_bytes()
