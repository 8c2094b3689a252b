"""One real vLLM server for all of this file: official clients, many requests, and its death."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from cuts import export
from processes import VLLM, ForkServer

from slicer.checkpoint.hub import DEMO
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ServeError
from slicer.plan.plan import Plan
from slicer.serve import Server, launch

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install slicer-llm[serve-cpu]"),
    pytest.mark.xdist_group("vllm"),  # one process loads vLLM for all
]
KEY = "a key of the test"
PROMPT = "And the LORD said unto"


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "demo-9L"
    return export(Checkpoint.open(DEMO), Plan.dropping(12, (4, 5, 6)), out)


@pytest.fixture(scope="module")
def server(sliced: Path) -> Iterator[Server]:
    template = sliced.parent / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    arguments = ["--enforce-eager", "--dtype", "float32", "--chat-template", str(template)]
    arguments += ["--kv-cache-memory-bytes", str(1 << 28), "--max-num-seqs", "16"]
    with Server(sliced, api_key=KEY, arguments=arguments, timeout=540) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=server.base_url, api_key=KEY)


def test_it_completes_as_transformers_does(client: Any, server: Server, sliced: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from slicer.model.load import load_model

    tokenizer, model = (AutoTokenizer.from_pretrained(sliced), load_model(sliced, dtype="float32", device="cpu"))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    answer = client.completions.create(model=server.model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected


def test_it_streams_what_it_completes(client: Any, server: Server) -> None:
    arguments = {"model": server.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**arguments).choices[0].text
    pieces = [part.choices[0].text for part in client.completions.create(**arguments, stream=True) if part.choices]
    assert len(pieces) > 1 and "".join(pieces) == whole


def test_it_chats(client: Any, server: Server) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model=server.model, messages=messages, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content


def test_it_asks_for_the_key(server: Server) -> None:
    import openai

    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.base_url, api_key="another").models.list()
    command = " ".join(psutil.Process(server.pid).cmdline())
    assert KEY not in command  # other users of the machine can read it there


def test_two_hundred_requests_at_once_are_all_answered(server: Server) -> None:
    from openai import AsyncOpenAI

    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=server.base_url, api_key=KEY, timeout=300) as many:
            return await asyncio.gather(
                *(many.completions.create(model=server.model, prompt=f"{PROMPT} {i}", max_tokens=4) for i in range(200))
            )

    answers = asyncio.run(ask())
    assert len(answers) == 200 and all(answer.usage.completion_tokens > 0 for answer in answers)


def test_a_foreign_client_measures_it(forks: ForkServer, server: Server, sliced: Path, tmp_path: Path) -> None:
    """vLLM's own `vllm bench serve`."""
    given: list[object] = ["bench", "serve", "--base-url", server.root_url, "--model", server.model]
    given += ["--tokenizer", sliced, "--dataset-name", "random", "--random-input-len", 16, "--ignore-eos"]
    given += ["--random-output-len", 4, "--num-prompts", 4, "--save-result", "--result-dir", tmp_path]
    given += ["--result-filename", "result.json"]
    run = forks.start(*given, modules=VLLM, environment={"OPENAI_API_KEY": KEY}, script=Path(str(launch.__file__)))
    run.succeeds()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 4 and result["total_output_tokens"] == 16


def test_a_taken_port_is_refused_at_once(server: Server, sliced: Path) -> None:
    with pytest.raises(ServeError, match="another --port"):
        Server(sliced, port=server.port)


def test_when_its_engine_dies_it_says_so_and_leaves_no_process(server: Server) -> None:
    """The last test of the file: the server does not outlive it."""
    family = psutil.Process(server.pid).children(recursive=True)
    engine = next(child for child in family if "EngineCore" in " ".join(child.cmdline()))
    engine.send_signal(signal.SIGKILL)
    with pytest.raises(ServeError, match="vLLM stopped"):
        server.wait()
    server.stop()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_lives(child) for child in family):
        time.sleep(0.2)
    assert not [child for child in family if _lives(child)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
