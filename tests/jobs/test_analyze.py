"""`slicer analyze`: the same figures in memory and from disk, in one process and in two, in one go and killed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import sources
import torch
from click.testing import CliRunner
from commands import slicer
from processes import ForkServer

from slicer.cli.main import main
from slicer.data.calibration import token_batches
from slicer.data.sources import TextSpec
from slicer.errors import CalibrationError, OutputError
from slicer.jobs.analyze import analyze
from slicer.jobs.convert import convert
from slicer.jobs.output import Written
from slicer.jobs.request import AnalyzeRequest, Compensation, ConvertRequest, Measures, Output, Text
from slicer.measure.analysis import Analysis
from slicer.model.load import load_model
from slicer.plan.amounts import Goal, parse_amount
from slicer.plan.plan import Plan
from slicer.runtime.compute import Compute
from slicer.runtime.workdir import owned

LAYERS = 6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its final norm turns what it is given, as a trained one does."""
    from safetensors.torch import load_file, save_file

    model = sources.save_llama(tmp_path_factory.mktemp("model"), layers=LAYERS)
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        if (key := "model.norm.weight") in tensors:
            tensors[key] = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 3
            save_file(tensors, file, metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_text(tmp_path_factory.mktemp("text") / "t.jsonl")


def request(path: Path | str, out: Path, text: TextSpec, *, positions: int = 16, **given: Any) -> AnalyzeRequest:
    return AnalyzeRequest(str(path), out, Measures(positions), text=Text.of(text), **given)


def spec(text: Path, **changes: Any) -> TextSpec:
    return TextSpec(**{"source": str(text), "samples": 8, "seq_len": 24, "batch_size": 2, **changes})


@pytest.fixture(scope="module")
def done(path: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("analysis") / "out"
    analyze(request(path, out, spec(text), positions=6, compute=Compute("cpu")))
    return out


@pytest.fixture(autouse=True)
def no_figures(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of an analysis this small; `done`, made before this, and real commands draw."""
    from slicer.figures import layers

    monkeypatch.setattr(layers, "analysis_figures", lambda analysis, directory: [])


def apart(one: Analysis, other: Analysis) -> float:
    """The largest difference between any two figures."""
    assert list(one.metrics) == list(other.metrics)
    found = 0.0
    for name, table in one.metrics.items():
        for n in table.sizes:
            for row in ("mean", "standard_error"):
                pairs = zip(getattr(table, row)[n], getattr(other.metrics[name], row)[n], strict=True)
                found = max(found, *(abs(a - b) for a, b in pairs))
    return found


def test_it_is_the_paper_by_hand(path: Path, text: Path, done: Path) -> None:
    """By `output_hidden_states` and a hook on the final norm: transformers' last hidden state is after that norm."""
    analysis = Analysis.load(done)
    model = load_model(path, dtype="float32", device="cpu")
    tokens = torch.cat(token_batches(spec(text), path, model).batches)
    caught: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    handle.remove()
    x = torch.stack([*hidden[:LAYERS], caught[0]])[:, :, -1].double()
    for n in range(1, LAYERS + 1):
        row = analysis.distances().block(n)
        assert len(row) == LAYERS - n + 1, "every start, that at layer 0 and the one that ends the model"
        for start in range(LAYERS - n + 1):
            cosine = torch.nn.functional.cosine_similarity(x[start], x[start + n], dim=-1)
            angle = torch.arccos(cosine) / math.pi
            assert row[start] == pytest.approx(float(angle.mean()), abs=1e-6)
            error = float(angle.std()) / math.sqrt(len(tokens))
            assert analysis.distances().standard_error[n][start] == pytest.approx(error, abs=1e-6)
    after_norm = hidden[LAYERS][:, -1].double()
    wrong = torch.nn.functional.cosine_similarity(x[LAYERS - 1], after_norm, dim=-1)
    wrong_row = float(torch.arccos(wrong).mean()) / math.pi
    assert abs(analysis.distances().block(1)[LAYERS - 1] - wrong_row) > 1e-3, "the trap would show"


def test_everything_is_there(done: Path) -> None:
    analysis = Analysis.load(done)
    assert list(analysis.metrics) == [
        *("angular_last_token", "angular_mean", "block_influence", "relative_l1", "relative_l2"),
        *("cka", "fold_residual"),
    ]
    for table in analysis.metrics.values():
        assert table.sizes == tuple(range(1, LAYERS + 1))
        assert all(math.isfinite(v) for n in table.sizes for v in (*table.block(n), *table.standard_error[n]))
    assert analysis.samples == 8 and analysis.seq_len == 24 and len(analysis.positions) == 6
    names = {f"{n}{s}" for n in ("heat-map", "heat-maps", "curves", "importance", "agreement", "blocks")
             for s in (".png", ".svg")}  # fmt: skip
    assert {p.name for p in done.iterdir()} == {"analysis.json", *names}


def test_from_disk_it_is_the_same(path: Path, text: Path, done: Path, tmp_path: Path) -> None:
    """With states spilled to a file too: the memory holds no more than a layer or two."""
    compute = Compute("cpu", memory=300_000)
    found = analyze(request(path, tmp_path / "out", spec(text), positions=6, compute=compute))
    assert found is not None and apart(found, Analysis.load(done)) <= 1e-6


def converted(path: Path, out: Path, text: Path, heal: str, *, memory: int | None, verify: str) -> Written:
    return convert(
        ConvertRequest(
            str(path),
            Goal(drop=parse_amount("2")),
            compensation=Compensation(heal),
            text=Text.of(spec(text)),
            output=Output(out, verify=verify),
            compute=Compute("cpu", memory=memory),
        )
    )


def test_convert_reads_from_disk_when_it_must(path: Path, text: Path, tmp_path: Path) -> None:
    results = []
    for name, memory, verify in (("a", None, "logits"), ("b", 300_000, "logits"), ("c", 300_000, "auto")):
        results.append(converted(path, tmp_path / name, text, "none", memory=memory, verify=verify))
    distances = [json.loads((tmp_path / n / "slicer" / "distances.json").read_text()) for n in "ab"]
    for n, row in distances[0]["distances"].items():
        assert distances[1]["distances"][n] == pytest.approx(row, abs=1e-6)
    assert results[0].plan.kept == results[1].plan.kept
    assert [r.verified for r in results] == ["logits", "logits", "logits"]
    weights = [sorted((p.name, p.read_bytes()) for p in (tmp_path / n).glob("*.safetensors")) for n in "ab"]
    assert weights[0] == weights[1]


def test_a_healed_cut_from_disk(path: Path, text: Path, tmp_path: Path) -> None:
    done = converted(path, tmp_path / "out", text, "fold", memory=300_000, verify="logits")
    assert done.plan.healing is not None and done.verified == "logits"


def command(path: Path, text: Path, out: Path) -> list[str]:
    return [
        *("analyze", str(path), "-o", str(out), "--calibration", str(text), "--samples", "8", "--seq-len", "24"),
        *("--batch-size", "2", "--positions", "6", "--device", "cpu", "--memory", "300KB"),
    ]


def test_killed_it_goes_on(forks: ForkServer, path: Path, text: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    forks.start(*command(path, text, out), hold=("os.rename", "layer-004.safetensors")).kill_held()
    assert not (out / "analysis.json").exists()
    again = slicer(*command(path, text, out))
    assert again.exit_code == 0 and "resuming after layer" in again.stderr, again.output
    assert apart(Analysis.load(out), Analysis.load(done)) <= 1e-6
    assert not (out / ".partial").exists()


@pytest.mark.parametrize("damaged", ["layer-002.safetensors", "states.safetensors", "passes.json"])
def test_what_is_damaged_is_measured_again(
    damaged: str, forks: ForkServer, path: Path, text: Path, done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    forks.start(*command(path, text, out), hold=("os.rename", "layer-004.safetensors")).kill_held()
    file = out / ".partial" / "0" / damaged
    file.write_bytes(file.read_bytes()[:100] if file.is_file() else b'{"losses')
    again = slicer(*command(path, text, out))
    assert again.exit_code == 0 and apart(Analysis.load(out), Analysis.load(done)) <= 1e-6, again.output


def test_an_unfinished_run_of_something_else_is_kept(path: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with owned(out / ".partial" / "0", what="an unfinished analysis", source="another") as work:
        (work.path / "layer-001.safetensors").write_text("hours of work")
        with pytest.raises(OutputError, match="another run"):
            analyze(request(path, out, spec(text), overwrite=True))
    with pytest.raises(OutputError, match="unfinished analysis .*--overwrite"):
        analyze(request(path, out, spec(text)))
    assert (out / ".partial" / "0" / "layer-001.safetensors").read_text() == "hours of work"
    assert analyze(request(path, out, spec(text), overwrite=True)) is not None


def test_two_processes_are_one(forks: ForkServer, path: Path, text: Path, done: Path, tmp_path: Path) -> None:
    """gloo on the CPU: equal to one process to the last bit but for matrix products."""
    out = tmp_path / "out"
    group = forks.start_group(2, *command(path, text, out))
    for run in group:
        run.succeeds()
    said = [run.output.read_text() for run in group]
    assert "written" in said[0] and not said[1], "only the first process speaks"
    assert apart(Analysis.load(out), Analysis.load(done)) <= 1e-6


def test_the_commands(path: Path, text: Path, done: Path, tmp_path: Path) -> None:
    """From an analysis to a plan to a sliced checkpoint, as a user would."""
    runner = CliRunner()
    plan_file = tmp_path / "plan.json"
    planned = runner.invoke(
        main, ["plan", str(done), "--drop", "2", "--blocks", "2", "--protect", "0,-1", "-o", str(plan_file)]
    )
    assert planned.exit_code == 0, planned.output
    assert "next" in planned.output and "by        angular_last_token" in planned.output
    plan = Plan.load(plan_file)
    assert len(plan.dropped) == 2 and not {0, LAYERS - 1} & set(plan.dropped)
    sliced = runner.invoke(
        main, ["convert", str(path), "--plan", str(plan_file), "-o", str(tmp_path / "out"), "--heal", "none"]
    )
    assert sliced.exit_code == 0, sliced.output
    assert Plan.load(tmp_path / "out").metric == "angular_last_token"
    model = load_model(tmp_path / "out", device="cpu")
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(LAYERS - 2))
    ids = torch.tensor([[0, 5, 6]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True).shape[1] == 7
    printed = runner.invoke(main, ["plan", str(done), "--drop", "0.5", "--json", "-o", str(plan_file)])
    assert json.loads(printed.output)["dropped"] == list(Plan.load(plan_file).dropped)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "nowhere", "--drop", "2"], "cannot read the analysis"),
        (["plan", "DONE", "--drop", "9"], "leaves none"),
        (["plan", "DONE", "--drop", "2", "--metric", "loss"], "no loss in this analysis"),
        (["plan", "DONE", "--drop", "2", "--protect", "11"], "--protect"),
        (["plan", "DONE", "--drop", "2", "--protect", "0-5"], "protect"),
        (["analyze", "SOURCE", "-o", "DONE"], "holds an analysis already"),
        (["analyze", "SOURCE", "-o", "SOURCE"], "which is no analysis"),
        (["analyze", "SOURCE", "-o", "NEW", "--losses", "x"], "--losses x"),
        (["analyze", "SOURCE", "-o", "NEW", "--losses", "7"], "6 layers"),
        (["analyze", "SOURCE", "-o", "NEW", "--calibration", "none.txt"], "no such file"),
        (["analyze", "nowhere", "-o", "NEW"], "nowhere"),
        (["analyze", "SOURCE", "-o", "NEW", "--calibration", "self", "--memory", "300KB"], "self"),
    ],
)
def test_bad_input_is_one_line(path: Path, done: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    names = {"DONE": str(done), "SOURCE": str(path), "NEW": str(tmp_path / "new")}
    before = {p: p.stat().st_mtime_ns for p in (*done.iterdir(), *path.iterdir())}
    result = CliRunner().invoke(main, [names.get(a, a) for a in arguments])
    assert result.exit_code in (1, 2) and words in result.stderr
    assert "Traceback" not in result.output + result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("note: ")]
    assert lines[-1].startswith("slicer: ")
    assert {p: p.stat().st_mtime_ns for p in (*done.iterdir(), *path.iterdir())} == before
    assert not (tmp_path / "new" / "analysis.json").exists()


def test_states_that_are_not_finite_name_the_layer(path: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    model.mkdir()
    for file in path.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        if (key := "model.layers.2.mlp.down_proj.weight") in tensors:
            tensors[key].fill_(float("inf"))
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match="entering layer 3"):
        analyze(request(model, tmp_path / "out", spec(text)))
    assert not (tmp_path / "out" / "analysis.json").exists()


@pytest.mark.large
@pytest.mark.parametrize(("n", "start", "distance"), [(2, 12, 0.124), (4, 9, 0.167)])
def test_the_known_blocks_of_a_real_model(
    models: Path, tmp_path_factory: pytest.TempPathFactory, n: int, start: int, distance: float
) -> None:
    """From an independent run on WikiText-2 validation text; SLICER_TEST_TEXT names that file."""
    file = os.environ.get("SLICER_TEST_TEXT")
    if file is None:
        pytest.skip("set SLICER_TEST_TEXT to WikiText-2 validation text (.txt)")
    out = tmp_path_factory.getbasetemp() / "known"
    if not (out / "analysis.json").exists():
        analyze(request(models / "qwen2.5-coder-0.5b", out, TextSpec(file, samples=24, seq_len=512)))
    row = Analysis.load(out).distances().block(n)
    assert min(range(len(row)), key=lambda i: row[i]) == start
    assert row[start] == pytest.approx(distance, abs=0.003)
