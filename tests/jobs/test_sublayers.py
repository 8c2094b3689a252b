"""convert below the layer, end to end: what is chosen, written and said, and that bad input is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import files
import pytest
import sources
import tiny
from commands import slicer, succeeds

from slicer.checkpoint.hub import DEMO
from slicer.errors import PlanError
from slicer.figures import layers
from slicer.measure.analysis import Analysis
from slicer.plan.plan import Plan


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def calibrated(text: Path) -> list[object]:
    return ["--calibration", text, "--samples", 8, "--seq-len", 32]


def test_attention_goes_and_the_plan_replays(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--drop-attention", 2, "--drop-ffn", "0-0", *calibrated(text)]
    result = json.loads(succeeds("convert", source, *given, "-o", out, "--json").stdout)
    assert result["form"] == "blockwise" and result["logits_error"] < 1e-5
    assert all(other.block.startswith("attention") for other in Plan.load(out).runners_up), "only what was asked"
    assert len(result["no_attention"]) == 2 and 0 not in result["no_attention"] and result["no_ffn"] == [0]
    assert result["after"]["kv_bytes_per_token"] * 6 == result["before"]["kv_bytes_per_token"] * 4
    card = (out / "README.md").read_text()
    assert "import slicer" in card and "6 of 6 layers, 4 with attention" in card
    plan = out / "slicer" / "plan.json"
    assert json.loads(plan.read_text())["format"] == 3
    succeeds("convert", source, "--plan", plan, "-o", tmp_path / "again")
    assert files.read_tensors(tmp_path / "again") == files.read_tensors(out)
    shown = succeeds("inspect", out).stdout
    assert "attention of layers" in shown and "DeciLMForCausalLM" in shown
    table = json.loads((out / "slicer" / "half-layers.json").read_text())
    assert table["depth"] == 12 and len(table["distances"]["1"]) == 12


def test_a_half_offset_cut_is_native_and_taken_where_it_wins(source: Path, text: Path, tmp_path: Path) -> None:
    results = {
        offset: json.loads(
            succeeds(
                "convert", source, "--drop", 2, "--offset", offset, *calibrated(text), "-o", tmp_path / offset,
                "--json",
            ).stdout
        )
        for offset in ("whole", "half", "auto")
    }  # fmt: skip
    assert "joined" not in results["whole"] and results["half"]["form"] == "native"
    ((i, j),) = results["half"]["joined"]
    assert j == i + 2 and results["half"]["dropped"] == [i + 1, j] and results["half"]["logits_error"] < 1e-5
    best = min(results["whole"]["distance"], results["half"]["distance"])
    assert results["auto"]["distance"] == best
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 4
    old, new = files.read_tensors(source), files.read_tensors(tmp_path / "half")
    assert new[f"model.layers.{i}.self_attn.q_proj.weight"] == old[f"model.layers.{i}.self_attn.q_proj.weight"]
    assert new[f"model.layers.{i}.mlp.up_proj.weight"] == old[f"model.layers.{j}.mlp.up_proj.weight"]


@pytest.mark.parametrize("memory", [None, "1MB"])
@pytest.mark.parametrize(
    "ways",
    [
        ["--drop-attention", "2", "--heal", "bias"],
        ["--drop-ffn", "2", "--heal", "linear", "--rank", "4"],
        ["--drop", "2", "--heal", "bias"],
        ["--drop-attention", "2", "--heal", "linear", "--rank", "4", "--heal-steps", "6"],
        ["--drop-sublayers", "3", "--heal", "fold"],
        ["--drop", "2", "--offset", "half", "--heal", "fold"],
    ],
)
def test_what_stands_for_removed_parts_is_verified(
    source: Path, text: Path, tmp_path: Path, ways: list[str], memory: str | None
) -> None:
    more = [] if memory is None else ["--memory", memory, "--verify", "logits"]
    if "--heal-steps" in ways and memory is not None:
        refused = slicer("convert", source, *ways, *more, *calibrated(text), "-o", tmp_path / "out")
        assert refused.exit_code == 1 and "in memory" in refused.output and not (tmp_path / "out").exists()
        return
    result = json.loads(
        succeeds("convert", source, *ways, *more, *calibrated(text), "-o", tmp_path / "out", "--json").stdout
    )
    assert result["logits_error"] < 1e-5
    record = result["healing"]
    assert record["loss"]["source"] > 0 and record["method"] in ("bias", "linear", "fold")
    card = (tmp_path / "out" / "README.md").read_text()
    assert record["kinds"] and all(f"| {kind['after']:.3f} |" in card for kind in record["kinds"])
    assert ("trained alone for 6 steps" in card) == ("--heal-steps" in ways)
    if memory is None:
        succeeds("convert", source, "--plan", tmp_path / "out" / "slicer" / "plan.json", "-o", tmp_path / "2")
        assert files.read_tensors(tmp_path / "2") == files.read_tensors(tmp_path / "out")


def test_both_parts_of_a_layer_are_the_layer(source: Path, tmp_path: Path) -> None:
    given = ["--drop-attention", "2-3", "--drop-ffn", "2-3"]
    result = json.loads(succeeds("convert", source, *given, "-o", tmp_path / "out", "--json").stdout)
    assert result["dropped"] == [2, 3] and "form" not in result
    succeeds("convert", source, "--drop", "2-3", "-o", tmp_path / "layers")
    assert files.read_tensors(tmp_path / "out") == files.read_tensors(tmp_path / "layers")


def test_zeroed_says_that_it_saves_nothing(source: Path, tmp_path: Path) -> None:
    given = ["--drop-attention", "0-1", "--format", "zeroed"]
    result = json.loads(succeeds("convert", source, *given, "-o", tmp_path / "out", "--json").stdout)
    assert result["form"] == "zeroed" and result["after"] == result["before"]
    assert "saves neither memory nor time" in (tmp_path / "out" / "README.md").read_text()


def test_an_analysis_chooses_parts_by_any_metric(text: Path, tmp_path: Path) -> None:
    where = tmp_path / "analysis"
    options = ["--samples", 4, "--seq-len", 16, "--sublayers", "--losses", 1, "--shapley", 8]
    succeeds("analyze", DEMO, "--calibration", text, *options, "-o", where)
    record = json.loads((where / "analysis.json").read_text())
    assert {"angular_last_token", "block_influence", "loss", "kl", "shapley"} <= set(record["sublayers"])
    for metric in ("loss", "shapley", "block_influence"):
        succeeds("plan", where, "--drop-attention", 0.25, "--metric", metric, "-o", where / "plan.json")
        plan = Plan.load(where / "plan.json")
        row = record["sublayers"][metric]["distances"]["1"][::2]
        assert plan.no_attention == tuple(sorted(sorted(range(1, 12), key=row.__getitem__)[:3]))
    assert (where / "parts.png").read_bytes().startswith(b"\x89PNG")
    analysis = Analysis.load(where)
    assert layers.trade_off(analysis, analysis, tmp_path / "same.png") == pytest.approx(1)
    with pytest.raises(PlanError, match="same model"):
        layers.trade_off(analysis, replace(analysis, depth=11), tmp_path / "never.png")
    result = slicer("plan", where, "--drop-attention", 3, "--metric", "taylor")
    assert result.exit_code == 1 and "taylor" in result.output


BAD = {
    "attention of the first layer": (["--drop-attention", "0-0"], 1, "first layer needs its attention"),
    "the same layer twice": (["--drop-attention", "3,3"], 2, "names a layer twice"),
    "a layer and its attention": (["--drop", "2-3", "--drop-attention", "3-4"], 1, "dropped twice"),
    "a layer and its feed-forward": (["--drop", "2-3", "--drop-ffn", "2-2"], 1, "dropped twice"),
    "a layer that is not there": (["--drop-ffn", "9-9"], 1, "layer 9 is not in the model"),
    "more than there are": (["--drop-attention", "7"], 1, "not so many"),
    "a list of sublayers": (["--drop-sublayers", "3,4"], 2, "--drop-attention and --drop-ffn"),
    "rank 0": (["--drop", "2-3", "--heal", "linear", "--rank", "0"], 2, "'--rank': 0 is not"),
    "a rank beyond the width": (["--drop", "2-3", "--heal", "linear", "--rank", "65"], 2, "width, 64"),
    "no rank": (["--drop", "2-3", "--heal", "linear"], 2, "needs --rank"),
    "a rank for nothing": (["--drop", "2-3", "--rank", "4"], 2, "--heal linear"),
    "steps of nothing": (["--drop", "2-3", "--heal-steps", "4"], 2, "--heal"),
    "native without attention": (["--drop-attention", "3-3", "--format", "native"], 1, "--format native"),
    "half-offset by a heuristic": (["--drop", "2", "--offset", "half", "--strategy", "tail"], 2, "similarity"),
    "half-offset of named layers": (["--drop", "2-3", "--offset", "half"], 1, "--offset half"),
    "a budget beside": (["--max-params", "100k", "--drop-attention", "2"], 2, "budget"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name: str, source: Path, text: Path, tmp_path: Path) -> None:
    given, code, word = BAD[name]
    result = slicer("convert", source, *given, *calibrated(text), "-o", tmp_path / "deep" / "out")
    assert result.exit_code == code, result.output
    assert word in result.output and "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "deep").exists()


def test_a_broken_plan_is_named(source: Path, tmp_path: Path) -> None:
    for record, word in (
        ({"kept": [0, 1, 2, 3, 4, 5], "no_attention": [2, 2]}, "twice"),
        ({"kept": [0, 1, 2], "no_ffn": [4]}, "dropped twice"),
        ({"kept": [0, 1, 2], "joined": [[1, 4]]}, "half-offset"),
        ({"kept": [0, 1, 2], "joined": 3}, "joined must be a list"),
        ({"kept": [0, 1, 2], "form": "folded"}, "folded"),
        ({"kept": [0, 1, 2, 3, 4, 5], "no_attention": [2], "form": "native"}, "blockwise or zeroed"),
    ):
        file = tmp_path / "plan.json"
        file.write_text(json.dumps({"format": 2, "depth": 6, **record}))
        result = slicer("convert", source, "--plan", file, "-o", tmp_path / "out")
        assert result.exit_code == 1 and word in result.output, result.output
        assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "word"), [("qwen3", "QK-norm"), ("gemma2", "--format zeroed")])
def test_a_family_without_a_form_is_refused_with_the_reason(family: str, word: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(family, tmp_path / "source")
    result = slicer("convert", source, "--drop-attention", "3-3", "-o", tmp_path / "out")
    assert result.exit_code == 1 and word in result.output and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    succeeds("convert", source, "--drop-attention", "3-3", "--format", "zeroed", "-o", tmp_path / "out")


def test_a_half_offset_block_is_closed_like_whole_layers(tmp_path: Path) -> None:
    """On the embedded model it is the closest of three; healed at once, or later from the bare cut: the same bytes."""
    held = DEMO.parent / "heldout.txt"
    text = ["--calibration", held, "--samples", 16, "--seq-len", 64]
    given = ["convert", "demo", "--drop", 3, *text]
    done = json.loads(succeeds(*given, "--heal", "fold", "-o", tmp_path / "healed", "--json").stdout)
    own = done["healing"]["kinds"][0]
    assert done["joined"] and own["seen"] and own["after"] < own["before"]
    assert {entry["way"] for entry in done["healing"]["solved"]} >= {"newton"} and done["logits_error"] < 0.02
    bare = json.loads(succeeds(*given, "--heal", "none", "-o", tmp_path / "bare", "--json").stdout)
    assert bare["joined"] == done["joined"] and not bare["healing"] and bare["logits_error"] == 0
    later = json.loads(succeeds("heal", tmp_path / "bare", *text, "-o", tmp_path / "later", "--json").stdout)
    assert later["healing"]["loss"] == done["healing"]["loss"]
    wanted = files.read_tensors(tmp_path / "healed")
    assert files.read_tensors(tmp_path / "later") == wanted
    succeeds("heal", tmp_path / "healed", *text, "-o", tmp_path / "again")  # from the source's weights, not from these
    assert files.read_tensors(tmp_path / "again") == wanted
    whole = json.loads(succeeds(*given, "--solver", "transform", "--dry-run", "--json").stdout)
    assert not whole.get("joined")


def test_what_healing_afterwards_cannot_do(source: Path, text: Path, tmp_path: Path) -> None:
    succeeds("convert", source, "--drop-attention", "3-3", "-o", tmp_path / "cut")
    result = slicer("heal", tmp_path / "cut", *calibrated(text), "-o", tmp_path / "healed")
    assert result.exit_code == 1 and "--heal fold" in result.output
    assert not (tmp_path / "healed").exists()
