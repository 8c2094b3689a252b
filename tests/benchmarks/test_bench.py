"""`slicer bench`: what it measures, keeps and says; on runs made up here where no engine is needed."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from cuts import export

from slicer import demo
from slicer.benchmarks import contestants, machine, speculative, transformers_engine, workload
from slicer.benchmarks.bench import bench
from slicer.benchmarks.harness import RUNS, Store, run_rounds
from slicer.benchmarks.workload import ROUNDS, Request
from slicer.checkpoint.reader import Checkpoint
from slicer.cli.main import main
from slicer.errors import BenchError, OutputError, SlicerError, UsageError
from slicer.model.load import load_model
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime import memory
from slicer.runtime.workdir import SIGN

pytestmark = pytest.mark.xdist_group("vllm")  # one process loads vLLM for all
needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed: pip install slicer-llm[serve-cpu]"
)
LIMITS = {"bytes_per_second": 1e10, "flops_per_second": 1e11, "dtype": "bfloat16"}


def made_up(label: str, layers: int, work: workload.Workload, kv: int) -> dict[str, Any]:
    """A run on an ideal machine: 2 ms a layer and 5 stay."""
    token, first = 5 + 2.0 * layers, 10 + 8.0 * layers
    online = {
        str(level): {
            "requests": 4,
            "seconds": 1.0,
            "requests_per_second": 4.0,
            "output_tokens_per_second": 64.0,
            "ttft_ms": [first] * 4,
            "tpot_ms": [token] * 4,
            "itl_ms": [token] * 8,
            "e2e_ms": [first + 15 * token] * 4,
        }
        for level in work.concurrency
    }
    offline = {"prompts": 8, "seconds": 1.0, "prompt_tokens_per_second": 99.0, "output_tokens_per_second": 9.0}
    return {
        "load_seconds": 3.0 + layers,
        "offline": offline,
        "online": online,
        "kv_capacity_tokens": work.kv_cache_bytes // kv // 128 * 128,
        "peak_memory_bytes": 10**9 + layers * 10**7,
    }


@pytest.fixture
def ideal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both engines replaced by an ideal machine; the labels it was asked for, in order."""
    asked: list[str] = []

    def measure(
        c: contestants.Contestant, work: workload.Workload, salt: int, scratch: Path, tell: Callable[[str], None]
    ) -> dict[str, Any]:
        asked.append(c.label)
        return made_up(c.label, c.layers, work, c.kv_bytes_per_token)

    monkeypatch.setattr(transformers_engine, "measure", measure)
    monkeypatch.setattr(machine, "measure", lambda dtype, cpu: LIMITS)
    return asked


def sweep(**given: Any) -> Request:
    return Request(**{"base": "demo", "drops": "0,3,6", "engine": "transformers", "rounds": 2} | given)


def test_every_file_is_written_and_says_the_same(ideal: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = bench(sweep(), out)
    assert sorted(ideal) == sorted(["demo-12L", "demo-9L", "demo-6L"] * 2)
    assert {f.name for f in out.iterdir() if not f.name.startswith(".")} == {
        RUNS,
        SIGN,
        *(f"bench.{x}" for x in ("json", "csv", "md", "png", "svg")),
    }
    stored = json.loads((out / "bench.json").read_text())
    line = stored["lines"]["time_per_output_token_ms"]
    assert (line["slope"], line["intercept"], line["r2"]) == pytest.approx((2, 5, 1))
    for name in ("weight_bytes", "kv_bytes_per_token", "prefill_ms"):
        assert stored["lines"][name]["r2"] == 1
    assert stored["speed_up"][-1] == pytest.approx(
        {"layers": 6, "measured": 29 / 17, "allowed_by_intercept": 29 / 17, "ideal": 2, "kv_capacity_gain": 2}, rel=0.02
    )
    assert stored["verdict"] == result["verdict"] and result["verdict"] in (out / "bench.md").read_text()
    assert stored["versions"]["slicer-llm"] and stored["hardware"]["name"] and stored["seed"] == 0
    rows = list(csv.DictReader((out / "bench.csv").open()))
    assert len(rows) == 3 * len(stored["workload"]["concurrency"])
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (out / "bench.svg").read_text()


def test_weights_are_those_of_the_checkpoint_that_export_would_write(ideal: list[str], tmp_path: Path) -> None:
    sliced = export(Checkpoint.open(demo.path()), Plan.dropping(12, (8, 9, 10)), tmp_path / "demo-9L")
    real = bench(Request(base="demo", sliced=(str(sliced),), engine="transformers", rounds=1))
    shape = bench(sweep(drops="0,3", rounds=1))
    for a, b in zip(real["models"], shape["models"], strict=True):
        assert a["weight_bytes"] == b["weight_bytes"] and a["kv_bytes_per_token"] == b["kv_bytes_per_token"]
        assert (a["dummy"], b["dummy"]) == (False, True)
    assert real["models"][1]["dropped"] == (8, 9, 10)


def test_a_stopped_run_goes_on_where_it_was(ideal: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = transformers_engine.measure

    def stops(*arguments: Any) -> Any:
        if len(ideal) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(transformers_engine, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        bench(sweep(), tmp_path / "out")
    with open(tmp_path / "out" / RUNS, "a") as stream:
        stream.write('{"label": "demo-12L", "rou')  # killed while writing
    monkeypatch.setattr(transformers_engine, "measure", whole)
    result = bench(sweep(), tmp_path / "out")
    assert len(ideal) == 6 and len(result["runs"]) == 6
    bench(sweep(), tmp_path / "out")
    assert len(ideal) == 6  # nothing is measured twice
    bench(sweep(rounds=3), tmp_path / "out")
    assert len(ideal) == 9  # a further round
    with pytest.raises(OutputError, match="runs of a benchmark with output_len 32, not 9"):
        bench(sweep(output_len=9), tmp_path / "out")
    bench(sweep(output_len=9), tmp_path / "out", force=True)
    assert len(ideal) == 15


def test_every_depth_is_measured_several_times_unless_told_otherwise(ideal: list[str]) -> None:
    result = bench(Request(base="demo", drops="0,3,6", engine="transformers"))
    (times,) = set(Counter(ideal).values())
    assert times > 1 and len(result["runs"]) == 3 * times and result["rounds"] == times


def test_each_round_has_an_order_of_its_own() -> None:
    order: list[tuple[str, int]] = []

    def measure(label: str, number: int, tell: Callable[[str], None]) -> dict[str, Any]:
        order.append((label, number))
        return {}

    run_rounds(list("abcd"), 6, 0, measure, Store(None, {}), Progress())
    rounds = [[label for label, number in order if number == n] for n in range(1, 7)]
    assert all(sorted(found) == list("abcd") for found in rounds)
    assert [number for _, number in order] == sorted(number for _, number in order)
    assert len({tuple(found) for found in rounds}) > 1


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    config = tmp_path / "shape.json"
    shutil.copy(demo.path() / "config.json", config)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = contestants.shapes(None, config, "0,5", "bfloat16", scratch)
    assert [(c.label, c.layers) for c in found] == [("shape-12L", 12), ("shape-7L", 7)]
    assert found[0].weight_bytes == Checkpoint.open(demo.path()).total_bytes
    assert contestants.has_tokenizer(Path(found[1].path))
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(found[1].path)) == found[1].vocabulary


def test_cuts_are_those_that_the_config_can_express(tmp_path: Path) -> None:
    """Per-layer lists are cut with the layers."""
    (tmp_path / "scratch").mkdir()
    source = tiny.save_tiny("gemma3_text", tmp_path / "m")
    found = contestants.shapes(str(source), None, "0,2,6", "bfloat16", tmp_path / "scratch")
    assert [c.layers for c in found] == [7, 5, 1]


def test_the_workload_fits_the_context() -> None:
    [model] = contestants.checkpoints("demo", (), "bfloat16")
    short = contestants.Contestant(**vars(model) | {"context": 64})
    work = workload.choose([short], Request(), on_cpu=True, dtype="bfloat16")
    assert work.input_len + work.output_len + 16 <= 64
    with pytest.raises(BenchError, match="context of 64"):
        workload.choose([short], Request(input_len=60), on_cpu=True, dtype="bfloat16")


def test_what_does_not_fit_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    models = contestants.checkpoints("demo", (), "bfloat16")
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    with pytest.raises(BenchError, match="needs about .* GB of memory"):
        workload.choose(models, Request(), on_cpu=True, dtype="bfloat16")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--model-config"),
        (["demo", "--model-config", "c.json"], 2, "not both"),
        (["demo", "demo", "--drop", "0,2"], 2, "not both"),
        (["demo", "--drop", "0,x"], 2, "'x'"),
        (["demo", "--drop", "0,12"], 1, "12 layers"),
        (["demo", "--concurrency", "0"], 2, "--concurrency"),
        (["demo", "--speculative"], 2, "SLICED"),
        (["demo", "--kv-cache", "much"], 2, "not a size"),
        (["demo", "--input-len", "600"], 1, "context of 512"),
        (["--model-config", "{tmp}/none.json"], 1, "No such file"),
        (["{tmp}"], 1, "no config.json"),
        (["demo", "-o", "{tmp}/file"], 1, "not a directory"),
        (["demo", "-o", "{tmp}/full"], 1, "not created by slicer"),
        (["demo", "{tmp}/other"], 1, "not a cut of demo"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, words: str, tmp_path: Path, ideal: list[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    tiny.save_tiny("llama", tmp_path / "other")
    given = [word.format(tmp=tmp_path) for word in arguments]
    result = CliRunner().invoke(main, ["bench", *given, "--engine", "transformers"])
    assert result.exit_code == code and words in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine" and ideal == []


def test_vllms_flags_go_to_vllm_alone() -> None:
    with pytest.raises(UsageError, match="--engine vllm"):
        bench(sweep(arguments=("--enforce-eager",)))


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from slicer.serve import settings

    monkeypatch.setattr(settings, "find_spec", lambda _: None)
    with pytest.raises(SlicerError, match="serve-cpu"):
        bench(Request(base="demo"))


def test_the_second_engine_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain transformers, for real: two depths, one round."""
    monkeypatch.setattr(machine, "measure", lambda dtype, cpu: LIMITS)
    request = sweep(drops="0,6", rounds=1, input_len=16, output_len=4, concurrency=(1, 2), seconds=0.1)
    result = bench(request, tmp_path / "out")
    deep, shallow = result["models"]
    assert deep["kv_capacity_tokens"] * 2 == pytest.approx(shallow["kv_capacity_tokens"], rel=0.01)
    assert deep["kv_bytes_per_token"] == 7680 and deep["time_per_output_token_ms"] > 0
    assert set(deep["online"]) == {"1", "2"} and deep["offline"]["output_tokens_per_second"] > 0


@needs_vllm
def test_vllm_measures_and_leaves_no_process(tmp_path: Path) -> None:
    """The whole command on a real server for each depth."""
    import psutil

    before = {p.pid for p in psutil.Process().children(recursive=True)}
    arguments = ["bench", "demo", "--drop", "0,6", "--rounds", "1", "--seconds", "0.1", "--concurrency", "1,2"]
    arguments += ["--input-len", "16", "--output-len", "4", "--kv-cache", "64MiB", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert not {p.pid for p in psutil.Process().children(recursive=True)} - before
    stored = json.loads((tmp_path / "out" / "bench.json").read_text())
    deep, shallow = stored["models"]
    assert shallow["kv_capacity_tokens"] / deep["kv_capacity_tokens"] == pytest.approx(2, rel=0.02)
    assert stored["limits"]["bytes_per_second"] > 1e8 and stored["limits"]["flops_per_second"] > 1e8
    assert deep["weight_bytes"] == 8_752_960 and stored["lines"]["weight_bytes"]["r2"] == 1
    for model in stored["models"]:
        for online in model["online"].values():
            assert set(online["itl_ms"]) == {"mean", "p50", "p90", "p99"} and online["requests_per_second"] > 0
        assert model["load_seconds"] > 0 and model["peak_memory_bytes"] > model["weight_bytes"]
    assert "per layer" in result.stdout


@needs_vllm
def test_a_draft_is_measured_against_its_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a draft vLLM writes what the original alone writes, here asked of transformers."""
    by_vllm = speculative.measure

    def measure(original: contestants.Contestant, draft: Any, work: workload.Workload, *more: Any) -> Any:
        if draft is not None:
            return by_vllm(original, draft, work, *more)
        texts = [written(Path(original.path), prompt, work.output_len) for prompt in more[0]]
        return {"output_tokens_per_second": 1.0, "texts": texts, "spec_decode": {}}

    monkeypatch.setattr(speculative, "measure", measure)
    draft = export(Checkpoint.open(demo.path()), Plan.dropping(12, (5, 6)), tmp_path / "demo-10L")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("And the LORD said unto\nThe captain of the ship\n")
    request = Request(
        base="demo", sliced=(str(draft),), speculative=True, rounds=1, output_len=12, dtype="float32",
        speculative_tokens=2, prompts=prompts,
    )  # fmt: skip
    result = bench(request, tmp_path / "out")
    alone, drafted = result["speculative"]["rows"]
    assert alone["draft"] is None and alone["speed_up"] == 1
    assert drafted["draft"] == "demo-10L" and drafted["outputs_identical"] and drafted["prompts"] == 2
    assert len(drafted["acceptance_by_position"]) == 2
    assert all(0 <= rate <= 1 for rate in drafted["acceptance_by_position"])
    assert drafted["mean_accepted_length"] > 1, "it is a cut of the original: it guesses some tokens"
    assert (tmp_path / "out" / "bench.svg").is_file() and ROUNDS > 1


def written(path: Path, prompt: str, tokens: int) -> str:
    """What transformers writes after the prompt."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), load_model(path, dtype="float32", device="cpu")
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
