"""vLLM reads a sliced checkpoint as transformers does: the same greedy tokens from both."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import succeeds
from processes import VLLM, ForkServer

from slicer.model.load import load_model

pytestmark = pytest.mark.xdist_group("vllm")  # one process loads vLLM for all
PROMPTS = ["And the LORD said unto", "The captain of the"]
TOKENS = 12
# A native cut, one for vLLM's own DeciLMForCausalLM, and one for slicer's subclass of it.
CUTS: dict[str, list[object]] = {
    "layers": ["--drop", "4-6"],
    "sublayers": ["--drop", "4-5", "--drop-attention", "2,7-9", "--drop-ffn", "0,10"],
    "maps": ["--drop", "4-5", "--drop-attention", "7-8", "--drop-ffn", "2,9", "--heal", "linear", "--rank", 8],
}
SERVE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    path, out, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(path, dtype="float32", max_model_len=128, enforce_eager=True, max_num_seqs=4)
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=int(sys.argv[4]), ignore_eos=True))
    with open(out, "w") as stream:
        json.dump([list(result.outputs[0].token_ids) for result in results], stream)
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install slicer-llm[serve-cpu]")
@pytest.mark.parametrize("cut", CUTS)
def test_vllm_and_transformers_write_the_same(forks: ForkServer, cut: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    out = tmp_path / "sliced"
    succeeds("convert", "demo", *CUTS[cut], "--calibration", "self", "--samples", 16, "--seq-len", 64, "-o", out)
    tokenizer, model = AutoTokenizer.from_pretrained(out), load_model(out, dtype="float32", device="cpu")
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
            )
        expected.append(made[0, ids.shape[1] :].tolist())

    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    if cut != "maps":  # its engine has a process of its own, as of a server: the plugin is loaded there too
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    arguments = [out, tmp_path / "tokens.json", json.dumps(PROMPTS), TOKENS]
    run = forks.start(*arguments, script=script, modules=VLLM, environment=environment)
    run.succeeds()
    assert json.loads((tmp_path / "tokens.json").read_text()) == expected
