"""convert, end to end on a small Llama: what is written, that it is what it says, and that failure leaves nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import files
import pytest
import sources
import torch
from commands import slicer, succeeds
from processes import ForkServer

from slicer.jobs import work
from slicer.plan.plan import Plan
from slicer.runtime import memory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def calibrated(text: Path) -> list[object]:
    return ["--calibration", text, "--samples", 8, "--seq-len", 32]


def tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_named_layers_need_no_tokenizer_and_keep_every_byte(source: Path, tmp_path: Path) -> None:
    bare = sources.save_llama(tmp_path / "bare", tokenizer=False)
    out = tmp_path / "out"
    result = json.loads(succeeds("convert", bare, "--drop", "1,3-4", "-o", out, "--json").stdout)
    assert result["dropped"] == [1, 3, 4] and result["verified"] == "logits" and result["logits_error"] < 1e-5
    old, new = files.read_tensors(bare), files.read_tensors(out)
    names = {0: 0, 2: 1, 5: 2}
    expected = {}
    for key, value in old.items():
        parts = key.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in names:
                continue
            parts[2] = str(names[int(parts[2])])
        expected[".".join(parts)] = value
    assert new == expected
    config = json.loads((out / "config.json").read_text())
    before = json.loads((bare / "config.json").read_text())
    assert config == {**before, "num_hidden_layers": 3}


def test_similarity_writes_distances_figures_card_and_plan(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = json.loads(
        succeeds("convert", source, "--drop", 2, "--offset", "whole", *calibrated(text), "-o", out, "--json").stdout
    )
    distances = json.loads((out / "slicer" / "distances.json").read_text())
    row = distances["distances"]["2"]
    assert len(row) == 5 and min(row) == row[result["dropped"][0]] == result["distance"]
    for name in ("distances.png", "curves.png"):
        assert (out / "slicer" / name).read_bytes().startswith(b"\x89PNG")
    plan = json.loads((out / "slicer" / "plan.json").read_text())
    assert plan["dropped"] == result["dropped"] and plan["strategy"] == "similarity"
    assert plan["calibration"]["samples"] == 8 and plan["versions"]["transformers"]
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "distances.png" in card
    copied = {"LICENSE", "modeling_extra.py", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = AutoTokenizer.from_pretrained(out)("It was", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4).shape[1] == ids.shape[1] + 4


def test_two_runs_give_the_same_bytes(source: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        succeeds("convert", source, "--drop", "0.4", *calibrated(text), "-o", tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_saved_plan_replays_to_the_same_weights(source: Path, text: Path, tmp_path: Path) -> None:
    succeeds("convert", source, "--drop", 2, *calibrated(text), "-o", tmp_path / "a")
    succeeds("convert", source, "--plan", tmp_path / "a" / "slicer" / "plan.json", "-o", tmp_path / "b")
    assert files.read_tensors(tmp_path / "a") == files.read_tensors(tmp_path / "b")


def test_self_calibration_needs_no_data(source: Path, tmp_path: Path) -> None:
    result = succeeds(
        "convert",
        source,
        "--drop",
        1,
        "--calibration",
        "self",
        "--samples",
        4,
        "--seq-len",
        16,
        "-o",
        tmp_path / "o",
        "--json",
    )
    assert json.loads(result.stdout)["distance"] > 0


@pytest.mark.parametrize(("strategy", "dropped"), [("deepest", [3, 4]), ("tail", [4, 5])])
def test_strategies_that_read_nothing(source: Path, tmp_path: Path, strategy: str, dropped: list[int]) -> None:
    result = succeeds("convert", source, "--drop", 2, "--strategy", strategy, "--dry-run", "--json")
    assert json.loads(result.stdout)["dropped"] == dropped


@pytest.mark.parametrize(
    ("budget", "layers"),
    [(["--keep-layers", 4], 4), (["--max-params", "110K"], None), (["--max-bytes", "300KB"], None)],
)
def test_budgets_take_the_smallest_cut(source: Path, budget: list[object], layers: int | None) -> None:
    def look(n: int) -> dict[str, int]:
        return dict(
            json.loads(succeeds("convert", source, "--drop", n, "--strategy", "tail", "--dry-run", "--json").stdout)[
                "after"
            ]
        )

    result = json.loads(succeeds("convert", source, *budget, "--strategy", "tail", "--dry-run", "--json").stdout)
    n = len(result["dropped"])
    if layers is not None:
        assert result["after"]["depth"] == layers
        return
    name, limit = ("parameters", 110_000) if budget[0] == "--max-params" else ("total_bytes", 300_000)
    assert look(n)[name] <= limit and (n == 1 or look(n - 1)[name] > limit)


def test_dry_run_writes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nothing" in succeeds("convert", source, "--drop", "1-2", "--dry-run").output
    assert not os.listdir(tmp_path)


def test_the_default_output_is_named_after_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeeds("convert", source, "--drop", "1-2")
    assert os.listdir(tmp_path) == ["tiny-llama-4L"]


def test_a_cast_changes_the_dtype_and_loads(source: Path, tmp_path: Path) -> None:
    succeeds("convert", source, "--drop", "1-2", "--dtype", "bfloat16", "-o", tmp_path / "out")
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    original = {}
    for shard in source.glob("*.safetensors"):
        original.update(load_file(shard))
    assert torch.equal(model.lm_head.weight, original["lm_head.weight"].to(torch.bfloat16))


def test_pickled_weights_come_out_as_safetensors(source: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    tensors = {}
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors.update(load_file(file))
        elif "index" not in file.name:
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save(tensors, pickled / "pytorch_model.bin")
    for name, origin in (("a", source), ("b", pickled)):
        succeeds("convert", origin, "--drop", "1-2", "-o", tmp_path / name)
    assert files.read_tensors(tmp_path / "a") == files.read_tensors(tmp_path / "b")


def test_a_sliced_checkpoint_can_be_inspected_and_sliced_again(source: Path, tmp_path: Path) -> None:
    succeeds("convert", source, "--drop", "1-2", "-o", tmp_path / "once")
    succeeds("convert", tmp_path / "once", "--drop", "0-0", "-o", tmp_path / "twice")
    found = json.loads(succeeds("inspect", tmp_path / "twice", "--json").stdout)
    assert found["depth"] == 3 and found["plan"]["parent"]["dropped"] == [1, 2]
    assert found["kv_bytes_per_token"] == 3 * 2 * 32 * 4
    shown = succeeds("inspect", tmp_path / "once").output
    assert "1-2" in shown and "LlamaForCausalLM" in shown


def test_force_replaces_a_checkpoint_only(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeeds("convert", source, "--drop", "1-2", "-o", out)
    assert slicer("convert", source, "--drop", "1-3", "-o", out).exit_code == 1
    succeeds("convert", source, "--drop", "1-3", "-o", out, "--overwrite")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    assert slicer("convert", source, "--drop", "1-3", "-o", precious, "--overwrite").exit_code == 1
    assert os.listdir(precious) == ["thesis.txt"]


def test_a_wrong_result_never_appears(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check compares logits with the source's: swap two layers behind its back and it must see."""
    from slicer.checkpoint import sublayers
    from slicer.checkpoint.reader import Checkpoint

    honest = sublayers.tensors_of

    def swapped(checkpoint: Checkpoint, plan: Plan) -> dict[str, object]:
        spans = honest(checkpoint, plan)
        swap = {"model.layers.0.": "model.layers.1.", "model.layers.1.": "model.layers.0."}
        return {
            next((b + k.removeprefix(a) for a, b in swap.items() if k.startswith(a)), k): s for k, s in spans.items()
        }

    monkeypatch.setattr(sublayers, "tensors_of", swapped)
    result = slicer("convert", source, "--drop", "3-4", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "logits" in result.output
    assert not os.listdir(tmp_path)


BAD: list[tuple[str, Callable[[Path], list[object]], int, str]] = [
    ("drop too much", lambda _: ["--drop", "1.5"], 2, "between 0 and 1"),
    ("drop less than none", lambda _: ["--drop", "-1"], 2, "at least one"),
    ("drop nothing", lambda _: ["--drop", "0"], 2, "at least one"),
    ("drop everything", lambda _: ["--drop", "6"], 1, "at most 5"),
    ("block outside", lambda _: ["--drop", "4-9"], 1, "layer 6"),
    ("no amount", lambda _: [], 2, "--drop"),
    ("two amounts", lambda _: ["--drop", "1", "--keep-layers", "3"], 2, "exactly one"),
    ("keep everything", lambda _: ["--keep-layers", "6"], 1, "--keep-layers"),
    ("impossible budget", lambda _: ["--max-bytes", "1KB", "--strategy", "tail"], 1, "out of reach"),
    # before anything is measured: no calibration data can be had here
    ("impossible budget, unmeasured", lambda _: ["--max-params", "1K"], 1, "out of reach"),
    ("budget met", lambda _: ["--max-bytes", "1TB", "--strategy", "tail"], 1, "already"),
    ("no plan", lambda p: ["--plan", p / "none.json"], 1, "none.json"),
    ("empty calibration", lambda p: ["--drop", "1", "--calibration", _touch(p / "empty.jsonl")], 1, "empty"),
    ("text too short", lambda p: ["--drop", "1", "--calibration", _touch(p / "s.txt", "a b")], 1, "s.txt"),
    ("offline", lambda _: ["--drop", "1"], 1, "self"),
    ("unknown option", lambda _: ["--drop", "1", "--colour"], 2, "--colour"),
    ("a number that is none", lambda _: ["--drop", "1", "--samples", "few"], 2, "--samples"),
]


def _touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(("arguments", "code", "word"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, arguments: Callable[[Path], list[object]], code: int, word: str
) -> None:
    given = arguments(tmp_path / "in")
    result = slicer("convert", source, *given, "-o", tmp_path / "deep" / "out")
    assert result.exit_code == code, result.output
    assert word in result.output and "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_an_output_that_would_touch_the_source_is_refused(source: Path, tmp_path: Path, place: str) -> None:
    before = tree(source)
    result = slicer("convert", source, "--drop", "1-2", "-o", source / place, "--overwrite")
    assert result.exit_code == 1 and "source" in result.output
    assert tree(source) == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 4}, "layer_types"),
    ],
)
def test_configs_that_cannot_be_sliced(source: Path, tmp_path: Path, change: dict[str, object], word: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, content in tree(source).items():
        (broken / name).write_bytes(content)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **change}))
    result = slicer("convert", broken, "--drop", "1-2", "-o", tmp_path / "out")
    assert result.exit_code == 1 and word in result.output and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("at", ["shard", "rename"])
def test_a_kill_leaves_no_output(forks: ForkServer, source: Path, tmp_path: Path, at: str, how: signal.Signals) -> None:
    """While the weights are written, and when all is written and verified."""
    out = tmp_path / "out"
    hold = {"shard": ("open", "/.out.slicer-"), "rename": ("os.rename", "/.out.slicer-")}[at]
    run = forks.start("convert", source, "--drop", "1-2", "-o", out, hold=hold)
    assert run.kill_held(how) != 0
    assert not out.exists()
    left = list(tmp_path.glob("*")) + list(tmp_path.glob(".*/*"))
    assert bool(left) == (how == signal.SIGKILL)
    assert any(file.name == "README.md" for file in left) == (how == signal.SIGKILL and at == "rename")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heal", ["none", "fold"])
def test_the_same_bytes_whatever_memory_is_free(
    heal: str, held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["convert", "demo", "--drop", 4, "--heal", heal, "--calibration", held_out_file, "--samples", 16]
    written = []
    for free in (8e9, 20e6, 8e6):
        monkeypatch.setattr(memory, "available", lambda free=free: int(free))
        out = tmp_path / f"{free:.0f}"
        succeeds(*command, "--seq-len", 48, "-o", out)
        written.append(tree(out))
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize(
    ("given", "name"),
    [(["--drop", 2], "tiny-llama-4L"), (["--drop", 0.5], "tiny-llama-3L"), (["--keep-layers", 5], "tiny-llama-5L"),
     (["--drop", 2, "--heal", "lora"], "tiny-llama-4L"), (["--plan", "plan.json"], "tiny-llama-5L")],
    ids=["count", "fraction", "kept", "training", "plan"],
)  # fmt: skip
def test_an_occupied_place_is_known_before_anything_is_measured(
    given: list[object], name: str, text: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where slicer names it, if the number of layers is known."""
    (tmp_path / "plan.json").write_text(Plan.dropping(6, [3]).to_json())
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(work, "measure", None)
    failed = slicer("convert", source, *given, *calibrated(text))
    said = failed.stderr.strip().splitlines()[-1]
    assert failed.exit_code == 1 and said.startswith(f"slicer: {name}: not empty; choose another directory with -o")
    assert sorted(tmp_path.rglob("*")) == before


COPIES = ["--drop", "1-2", "--heal", "none", "--verify", "load"]  # no model is run


@pytest.mark.parametrize("command", ["convert", "analyze", "heal", "heal by training"])
def test_less_than_a_layer_is_one_line_with_the_figure(command: str, text: Path, source: Path, tmp_path: Path) -> None:
    name, *more = {
        "convert": ["convert", source, "--drop", 2],
        "analyze": ["analyze", source],
        "heal": ["heal", tmp_path / "cut"],
        "heal by training": ["heal", tmp_path / "cut", "--method", "lora"],
    }[command]
    succeeds("convert", source, *COPIES, "-o", tmp_path / "cut")
    failed = slicer(name, *more, *calibrated(text), "--memory", "99KB", "-o", tmp_path / "out")
    said = f"slicer: --memory 99KB: too little for one layer of {source}; give at least 124KB"
    assert failed.exit_code == 2 and failed.stderr.strip() == said and os.listdir(tmp_path) == ["cut"]


@pytest.mark.parametrize("option", [["--device", "cuda:7"], ["--device-memory", "4GB"]], ids=["device", "its memory"])
@pytest.mark.parametrize(
    "command", ["convert", "convert, which copies", "analyze", "heal", "heal by training", "merge"]
)
def test_a_device_that_is_not_there_is_refused(
    command: str, option: list[str], text: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the command would not use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cut, place = tmp_path / "cut", tmp_path / "place"
    succeeds("convert", source, *COPIES, "-o", cut)
    given: dict[str, list[object]] = {
        "convert": [source, "--drop", 2, *calibrated(text)],
        "convert, which copies": [source, *COPIES],
        "analyze": [source, *calibrated(text)],
        "heal": [cut, *calibrated(text)],
        "heal by training": [cut, *calibrated(text), "--method", "lora"],
        "merge": [cut, cut],
    }
    failed = slicer(command.split()[0].rstrip(","), *given[command], *option, "-o", place / "out")
    said = (
        f"slicer: {option[0]}{f' {option[1]}: not available' if 'cuda:7' in option else ': the model runs on the CPU'}"
    )
    assert failed.exit_code == 2 and failed.stderr.strip().startswith(said) and "\n" not in failed.stderr.strip()
    assert not place.exists()
