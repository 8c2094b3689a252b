"""lm-eval models of a checkpoint (transformers or vLLM), and the loss and sample generation that run on them."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint.architectures.table import text_config
from slicer.checkpoint.reader import read_config
from slicer.errors import EvaluationError, reason_of
from slicer.evaluate import generation
from slicer.runtime.compat import answer_for_vllm, lm_eval_module, without_bars
from slicer.runtime.compute import Compute


def vocabulary_of(model: Any) -> int:
    """V of the normalised loss: the number of rows of the embedding."""
    return int(model.config.get_text_config().vocab_size)


def wrap(
    model: Any, path: Path, batch_size: str = "auto", *, trust_remote_code: bool = False, last_logits_only: bool = False
) -> Any:
    """Wrap a loaded transformers model as an lm-eval model, with the tokenizer of the checkpoint at `path`.

    With `last_logits_only`, only the requested logits are computed: faster, and equal up to rounding, because a product
    of fewer rows may be summed in another order. Raises EvaluationError: no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizer classes raise many kinds
        raise EvaluationError(f"{path}: no usable tokenizer ({reason_of(error)}); add the tokenizer files") from None
    automatic: int | str = "auto" if model.device.type == "cuda" else 1
    batch = automatic if batch_size == "auto" else int(batch_size)
    starts_texts = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
    if tokenizer.eos_token_id is None:  # lm-eval needs it to end texts, and as the default padding token
        tokenizer.eos_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    wrapper = lm_eval_module("models.huggingface").HFLM
    lm = without_bars(wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch))
    lm.starts_texts = starts_texts
    if last_logits_only and batch == 1 and "logits_to_keep" in inspect.signature(model.forward).parameters:
        _keep_last_logits(lm, model)
    return lm


def _keep_last_logits(lm: Any, model: Any) -> None:
    """Make `lm` (batch size 1) compute only the logits of the longest continuation; it indexes them from the end."""
    score = lm._loglikelihood_tokens

    def loglikelihood_tokens(requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        longest = max((len(continuation) for _, _, continuation in requests), default=1)

        def call(tokens: Any, **_: Any) -> Any:
            with torch.no_grad():
                return model(tokens, logits_to_keep=longest).logits

        with _with(lm, "_model_call", call):
            return score(requests, *args, **kwargs)

    lm._loglikelihood_tokens = loglikelihood_tokens


def load_vllm(path: Path, compute: Compute, batch_size: str, seed: int) -> tuple[Any, int]:
    """(lm-eval model that runs the checkpoint at `path` in vLLM, V). Raises EvaluationError."""
    if find_spec("vllm") is None:
        raise EvaluationError("--backend vllm: vLLM is not installed; pip install 'slicer-llm[serve]'")
    config = text_config(read_config(path))
    arguments: dict[str, Any] = {"dtype": compute.dtype or "auto", "trust_remote_code": compute.trust_remote_code}
    context = config.get("max_position_embeddings") or config.get("n_positions")
    arguments["max_model_len"] = min(int(context or 4096), 4096)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no child process to be left behind
    answer_for_vllm()
    if not torch.cuda.is_available():
        # By default vLLM's CPU build uses nearly all free memory for its cache and warms up for minutes.
        arguments.update(kv_cache_memory_bytes=1 << 30, enforce_eager=True)
    try:
        wrapper = lm_eval_module("models.vllm_causallms").VLLM
        lm = wrapper(pretrained=str(path), batch_size=batch_size, seed=seed, **arguments)
    except Exception as error:  # vLLM raises many kinds
        raise EvaluationError(f"{path}: vLLM cannot load it ({reason_of(error)})") from None
    return without_bars(lm), int(config["vocab_size"])


def release(lm: Any) -> None:
    """End the vLLM engine of an lm-eval model, if it has one, so that the next model finds its memory free."""
    engine = getattr(getattr(lm, "model", None), "llm_engine", None)
    if engine is not None:
        engine.engine_core.shutdown()


def encoded(lm: Any, requests: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """(context tokens, continuation tokens) of each of lm-eval's log-likelihood requests."""
    found: list[tuple[list[int], list[int]]] = []

    def keep(pairs: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        found.extend((list(context), list(continuation)) for _, context, continuation in pairs)
        return [(0.0, False)] * len(pairs)

    with _with(lm, "_loglikelihood_tokens", keep):
        lm.loglikelihood(list(requests))
    return found


def text_losses(lm: Any, texts: Sequence[str]) -> tuple[list[float], list[int]]:
    """(total loss in nats, number of scored tokens) of each text; each token is scored given all earlier ones.

    A start token precedes the text; if there is none, the text's first token is the context. Texts longer than the
    model's context are split. Log-probabilities are computed in float32.
    """
    requests: list[tuple[tuple[str, str], list[int], list[int]]] = []
    owner: list[int] = []  # the text of each request
    counts = []
    most = lm.max_length - 1
    for at, text in enumerate(texts):
        tokens = list(lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if getattr(lm, "starts_texts", True):
            start = [lm.prefix_token_id]
        else:
            start, tokens = tokens[:1], tokens[1:]
        counts.append(len(tokens))
        pieces = [tokens[i : i + most] for i in range(0, len(tokens), most)]
        requests += [(("", text), start, piece) for piece in pieces]
        owner += [at] * len(pieces)
    nats = [0.0] * len(texts)
    # By default lm-eval takes log-softmax in the model's dtype: bfloat16 steps are as large as the differences sought.
    with _with(lm, "softmax_dtype", torch.float32):
        scored = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for at, (logprob, _) in zip(owner, scored, strict=True):
        nats[at] -= float(logprob)
    return nats, counts


@contextlib.contextmanager
def _with(lm: Any, name: str, value: object) -> Iterator[None]:
    """Set `lm.name` to `value` inside the block; do nothing if `lm` has no such attribute."""
    if not hasattr(lm, name):
        yield
        return
    before = getattr(lm, name)
    setattr(lm, name, value)
    try:
        yield
    finally:
        setattr(lm, name, before)


def generation_health(lm: Any) -> generation.GenerationHealth:
    """Generate greedily from `generation.PROMPTS` and measure the health of the samples."""
    prompts, most = generation.PROMPTS, generation.NEW_TOKENS
    instance = lm_eval_module("api.instance").Instance
    wanted = {"until": [], "max_gen_toks": most, "do_sample": False}
    requests = [instance("generate_until", {}, (prompt, dict(wanted)), i) for i, prompt in enumerate(prompts)]
    # decoding is limited by memory bandwidth: eight prompts cost little more than one
    with _with(lm, "batch_size_per_gpu", len(requests)):
        texts = [str(text) for text in lm.generate_until(requests)]
    lengths = [min(most, len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]
    return generation.judge(list(zip(prompts, texts, strict=True)), lengths)
