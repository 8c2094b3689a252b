"""Figures are lm-eval's own to the last digit, the loss is the model's own, and results compare."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from processes import EVALUATION, VLLM, ForkServer

from slicer.checkpoint.hub import DEMO
from slicer.cli.main import main
from slicer.evaluate import backends, generation
from slicer.evaluate.results import Evaluation
from slicer.evaluate.suite import Suite, SuiteSpec, evaluate
from slicer.model.load import load_model

pytestmark = pytest.mark.xdist_group("vllm")  # one process loads vLLM for all
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def result(data: Path) -> Evaluation:
    options = SuiteSpec(tasks=("mmlu_astronomy@5", "mmlu_astronomy", "boolq", "c4"), data=data, limit=8, **OPTIONS)
    with Suite(options) as suite:
        return evaluate("demo", suite)


def test_the_scores_are_lm_evals_to_the_last_digit(data: Path, result: Evaluation) -> None:
    """The same rows as a task written by hand, run by lm-eval's own entry with its own loading of the model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    by_hand = {
        "task": "by_hand", "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"validation": str(data / "boolq" / "dev.jsonl")}},
        "validation_split": "validation", "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_target": "{{answer|int}}", "doc_to_choice": ["no", "yes"], "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": str(DEMO), "dtype": "float32"}, tasks=[by_hand], limit=8, device="cpu",
        batch_size=1, task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    score = result.primary("boolq")
    assert score is not None and score.items == 8
    assert score.value == found["results"]["by_hand"]["acc,none"]
    assert score.standard_error == found["results"]["by_hand"]["acc_stderr,none"]


def test_only_the_logits_asked_for_say_the_same(data: Path) -> None:
    """What a sweep computes: each item's answer and each excerpt's loss, from fewer logits."""
    from slicer.evaluate import backends
    from slicer.model.load import load_model

    options = SuiteSpec(tasks=("mmlu_astronomy", "boolq"), data=data, limit=8, **OPTIONS)
    model = load_model(DEMO, dtype="float32", device="cpu")
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda *given: sizes.append(given[2].shape[1]))
    texts = ("The king went to the sea.", "He said unto them, and the temple of the city was old.")
    seen, computed = [], []
    with Suite(options) as suite:
        for last in (False, True):
            sizes.clear()
            lm = backends.wrap(model, DEMO, options.batch_size, last_logits_only=last)
            items = suite.run(lm, "demo", 4096).items
            few = sum(sizes)
            nats, _ = backends.text_losses(lm, texts)
            seen.append((items, nats))
            computed.append(few)
    hook.remove()
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-5)
    assert computed[1] < computed[0] / 2


def test_examples_in_another_order_are_the_same_examples(data: Path) -> None:
    """Figure 7 of the paper: only the order of what stands before each question differs."""
    from lm_eval.api.model import LM

    class Reader(LM):
        """Keeps what it is asked, and writes nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def tokenizer(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": []}

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            self.seen += [request.args[0] for request in requests]
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [""] * len(requests)

    seen = []
    for task in ("mmlu_astronomy@5", "mmlu_astronomy@5:1", "mmlu_astronomy@5:1"):
        reader = Reader()
        with Suite(SuiteSpec(tasks=(task,), data=data, limit=3)) as suite:
            suite.run(reader, "reader", 1)
        seen.append(reader.seen)
    plain, other, again = seen
    assert plain != other and other == again and len(plain) == 12
    for a, b in zip(plain, other, strict=True):
        assert sorted(a.split("\n")) == sorted(b.split("\n")) and a.split("\n")[-3:] == b.split("\n")[-3:]


def test_shots_chance_and_items(result: Evaluation) -> None:
    five, none = result.primary("mmlu_astronomy@5"), result.primary("mmlu_astronomy")
    assert five is not None and none is not None
    assert (five.shots, none.shots) == (5, 0) and five.chance == none.chance == 0.25
    items = result.items["mmlu_astronomy@5/acc"]
    assert len(items) == 8 and sum(items.values()) / 8 == five.value
    boolq = result.primary("boolq")
    assert boolq is not None and boolq.chance == 0.5


def test_the_loss_is_the_models_own(data: Path, result: Evaluation) -> None:
    from transformers import AutoTokenizer

    options = SuiteSpec(tasks=("c4",), data=data, limit=8, **OPTIONS)
    with Suite(options) as suite:
        assert suite.excerpts is not None
        texts = suite.excerpts.texts
    model, tokenizer = load_model(DEMO, **OPTIONS), AutoTokenizer.from_pretrained(str(DEMO))
    nats, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert result.loss is not None and result.loss.tokens == count and result.loss.sequences == 8
    assert result.loss.nats_per_token == pytest.approx(nats / count, rel=1e-5)
    assert result.loss.normalised == pytest.approx(nats / count / float(torch.log(torch.tensor(4096.0))), rel=1e-5)
    assert sum(result.items["c4"].values()) / 8 == pytest.approx(result.loss.nats_per_token)


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_scores_as_transformers_do(forks: ForkServer, data: Path, result: Evaluation) -> None:
    given = ["eval", "demo", "--data", data, "--tasks", "boolq,c4", "--limit", 8, "--dtype", "float32"]
    run = forks.start(
        *given, "--backend", "vllm", "--json", modules=(*EVALUATION, *VLLM),
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )  # fmt: skip
    run.succeeds()
    said = run.output.read_text()
    found = Evaluation.from_dict(json.loads(said[said.index("{") :])["results"][0])
    assert found.loss is not None and result.loss is not None
    assert found.loss.excerpts == result.loss.excerpts
    assert found.loss.nats_per_token == pytest.approx(result.loss.nats_per_token, abs=1e-3)
    assert found.items["boolq/acc"] == result.items["boolq/acc"]


def test_a_text_beyond_the_context_is_read_in_pieces() -> None:
    options = SuiteSpec(**OPTIONS)
    lm = backends.wrap(load_model(DEMO, **OPTIONS), DEMO, options.batch_size)
    text = (DEMO.parent / "heldout.txt").read_text("utf-8")[:4000]
    nats, tokens = backends.text_losses(lm, [text])
    assert tokens[0] > lm.max_length and 0 < nats[0] / tokens[0] < 6


def test_health() -> None:
    looped, varied = "the sea " * 20, "a king went out to see the men who kept the gate of brass"
    assert generation.repetition(looped.split(), 4) > 0.8 and generation.repetition(varied.split(), 4) == 0.0
    assert generation.distinct(varied.split(), 1) > 0.9 and generation.distinct(looped.split(), 1) == 2 / 40
    assert generation.repetition([], 4) == 1.0
    judged = generation.judge([("p", looped), ("p", varied)], [40, 14])
    assert judged.length == (27.0, pytest.approx(13.0))


def test_results_survive_the_disk_and_compare(tmp_path: Path, result: Evaluation) -> None:
    file, other = tmp_path / "a.json", tmp_path / "b.json"
    file.write_text(json.dumps(result.to_dict()))
    assert json.dumps(Evaluation.load(file).to_dict()) == json.dumps(result.to_dict())
    record = result.to_dict()
    record["items"] = {**record["items"], "c4": {k: v + 0.5 for k, v in record["items"]["c4"].items()}}
    other.write_text(json.dumps({"results": [record]}))
    shown = CliRunner().invoke(main, ["eval", str(file), str(other)])
    assert shown.exit_code == 0, shown.output
    assert "c4" in shown.output and "significant" in shown.output and "within noise" in shown.output
    file.write_text("{}")
    bad = CliRunner().invoke(main, ["eval", str(file), str(other)])
    assert bad.exit_code == 1 and bad.output.count("\n") == 1


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = ["eval", "demo", "--limit", "2", "--device", "cpu", "--json", "-o", str(out)]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    record = json.loads(out.read_text())
    assert record["results"][0]["loss"]["source"] == "heldout.txt"
    assert len(record["results"][0]["health"]["samples"]) == len(generation.PROMPTS)
    for arguments in (["eval", "demo", "--batch-size", "many"], ["eval", "demo", "--write-tasks", "x"]):
        assert CliRunner().invoke(main, arguments).exit_code == 2


def test_a_tokenizer_without_special_tokens(tmp_path: Path) -> None:
    """Each text then begins with its own first token, which is not scored; samples are written all the same."""
    text = DEMO.parent / "heldout.txt"
    shutil.copytree(DEMO, tmp_path / "bare")
    file = tmp_path / "bare" / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if not k.endswith("_token")}
    file.write_text(json.dumps(config))
    (tmp_path / "bare" / "special_tokens_map.json").unlink(missing_ok=True)
    options = SuiteSpec(tasks=("c4",), text=text, limit=4, device="cpu", dtype="float32")
    with Suite(options) as suite:
        whole, bare = evaluate("demo", suite), evaluate(str(tmp_path / "bare"), suite)
    assert whole.loss and bare.loss and bare.health and len(bare.health.samples) == len(whole.health.samples)
    assert bare.loss.tokens == whole.loss.tokens - 4
    assert abs(bare.loss.nats_per_token - whole.loss.nats_per_token) < 0.1
