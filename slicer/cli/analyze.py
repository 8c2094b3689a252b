"""The commands `slicer analyze` and `slicer plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slicer.cli.groups import calibration_options, recorded_command

UNRECORDED = {"out", "force", "as_json", "debug", "device", "memory", "source", "directory"}


@click.command()
@click.argument("source")
@calibration_options
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path),
              help="Directory for analysis.json and figures.")  # fmt: skip
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory for weights and states, e.g. 4GB; a larger model is read from disk layer by layer, and states beyond "
    "it go to a file  [default: 70% of the free memory]",
)
@click.option("--positions", type=click.IntRange(min=1),
              help="Tokens of each sequence that token averages use  [default: 16]")  # fmt: skip
@click.option(
    "--losses",
    metavar="N,...",
    help="Also measure loss and KL divergence without each block of these sizes, e.g. 1,4. One pass per size.",
)
@click.option("--greedy", type=click.IntRange(min=1), metavar="LAYERS",
              help="Also remove this many layers one by one, by loss (SLEB). One pass per layer.")  # fmt: skip
@click.option("--taylor", is_flag=True,
              help="Also measure |gradient x weight| of each layer. One forward and one backward pass.")  # fmt: skip
@click.option(
    "--sublayers",
    is_flag=True,
    help="Also measure attention and feed-forward sublayers separately, and half-offset cuts; with --losses also loss "
    "and KL without each sublayer. One more pass.",
)
@click.option(
    "--shapley",
    type=click.IntRange(min=1),
    metavar="PASSES",
    help="Also sample Shapley values of layers (with --sublayers: of sublayers), within this many forward passes.",
)
@click.option(
    "--against",
    metavar="loss|kl|task:NAME",
    default="loss",
    show_default=True,
    help="What the Shapley values add up to: the loss, the KL divergence from the full model, or the score of a "
    "multiple-choice lm-eval task, e.g. task:boolq or task:mmlu@5 (five examples).",
)
@click.option("--questions", type=click.IntRange(min=1), metavar="N",
              help="Number of questions of that task, drawn with the seed  [default: 64]")  # fmt: skip
@click.option("--data", metavar="DIR", type=click.Path(path_type=Path),
              help="Directory of local files of that task, as in slicer eval  [default: the Hub's]")  # fmt: skip
@click.option(
    "--beside",
    metavar="ANALYSIS",
    type=click.Path(path_type=Path),
    help="Also plot the importance of each layer or sublayer here against that in another analysis.",
)
@click.option(
    "--healed",
    metavar="N,...",
    help="Also heal the four closest blocks of these sizes in closed form and compare their losses.",
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
              help="Precision to measure in  [default: as stored]")  # fmt: skip
@click.option("--device", default="auto", show_default=True,
              help="Device to run on: auto, cpu, cuda, cuda:1.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing analysis in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the analysis as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def analyze(source: str, out: Path, **given: Any) -> None:
    """Measure the importance of the layers of SOURCE, by every metric.

    The model need not fit in memory. A stopped run resumes after the last finished layer when the command is run
    again. Several processes divide the samples: torchrun --nproc-per-node 2 -m slicer analyze ...

    \b
    slicer analyze Llama-2-70b-hf --memory 8GB -o analysis
    slicer plan analysis --drop 0.4
    """
    from slicer.cli.render import layers
    from slicer.cli.render import progress as bars
    from slicer.data.sources import TextSpec
    from slicer.jobs.analyze import AnalyzeOptions
    from slicer.jobs.analyze import analyze as run
    from slicer.plan.amounts import parse_counts, parse_size

    calibration = given["calibration"] or ("self" if source == "demo" else None)
    spec = {
        k: given[k] for k in ("samples", "seq_len", "batch_size", "seed", "column") if given[k] is not None
    }
    chosen = {k: given[k] for k in ("positions", "greedy", "shapley", "questions") if given[k] is not None}
    options = AnalyzeOptions(
        calibration=TextSpec(source=calibration, **spec),
        dtype=given["dtype"],
        device=given["device"],
        memory=parse_size(given["memory"], "--memory") if given["memory"] is not None else None,
        losses=parse_counts(given["losses"], "--losses") if given["losses"] is not None else (),
        healed=parse_counts(given["healed"], "--healed") if given["healed"] is not None else (),
        taylor=given["taylor"],
        sublayers=given["sublayers"],
        against=given["against"],
        data=given["data"],
        beside=given["beside"],
        force=given["force"],
        trust_remote_code=given["trust_remote_code"],
        command=recorded_command(UNRECORDED),
        **chosen,
    )
    with bars.progress() as progress:
        analysis = run(source, out, options, progress=progress)
    if analysis is None:
        return  # not rank 0: it prints nothing
    if given["as_json"]:
        click.echo(analysis.to_json(), nl=False)
    else:
        layers.print_analysis(analysis, out)
