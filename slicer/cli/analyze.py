"""The command `slicer analyze`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click

from slicer.cli import groups
from slicer.cli.groups import expert, group, option
from slicer.jobs.request import AnalyzeRequest, Measures
from slicer.plan.amounts import parse_counts


@groups.command()
@click.argument("source")
@groups.text_options()
@group(
    "What to measure besides the distances",
    option("--losses", metavar="N,...",
           help="Loss and KL divergence without each block of these sizes, e.g. 1,4. One pass per size."),
    option("--greedy", type=groups.POSITIVE, metavar="N",
           help="Removal of N layers one by one, by loss (SLEB). One pass per layer."),
    option("--taylor", default=False,
           help="|gradient x weight| of each layer. One forward and one backward pass."),
    option("--healed", metavar="N,...",
           help="Loss after closed-form healing of the four closest blocks of these sizes."),
    option("--sublayers", default=False,
           help="Attention and feed-forward separately, and half-offset cuts; with --losses also without each of them. "
           "One more pass."),
    option("--shapley", type=groups.POSITIVE, metavar="PASSES",
           help="Shapley values of layers (with --sublayers: of sublayers), in this many forward passes."),
    option("--against", metavar="loss|kl|task:NAME", default=Measures.against,
           help="What Shapley values add up to: the loss, the KL divergence from the full model, or the score of a "
           "multiple-choice lm-eval task, e.g. task:boolq or task:mmlu@5."),
    expert("--questions", type=groups.POSITIVE, metavar="N", show_default=str(Measures.questions),
           help="Number of questions of that task."),
    expert("--data", **groups.DIRECTORY, show_default="the Hub's",
           help="Directory of local files of that task, as in eval."),
    expert("--positions", type=groups.POSITIVE, metavar="N", show_default=str(Measures.positions),
           help="Tokens of each sequence that averages over tokens use."),
)  # fmt: skip
@group(
    "Output",
    groups.output_dir(help="Directory of analysis.json and figures.", required=True),
    groups.OVERWRITE,
    option("--beside", metavar="ANALYSIS", type=groups.DIRECTORY["type"],
           help="Also plot the importance of each layer or sublayer against that in another analysis."),
    groups.JSON,
)  # fmt: skip
@group(
    "Machine",
    groups.dtype_option(help="Precision to measure in.", show_default="as stored"),
    groups.DEVICE,
    *groups.MEMORY,
    groups.TRUST,
)  # fmt: skip
def analyze(source: str, **given: Any) -> None:
    """Measure the importance of the layers of SOURCE by every metric.

    The model need not fit in memory. A stopped run resumes after the last finished layer when the command is run
    again. Several processes divide the samples: torchrun --nproc-per-node 2 -m slicer analyze ...

    \b
    slicer analyze demo -o analysis
    slicer analyze Llama-2-70b-hf --memory 8GB -o analysis
    slicer plan analysis --drop 0.4
    """
    from slicer.cli.render import layers, progress
    from slicer.jobs.analyze import analyze as run

    asked = {f.name: given[f.name] for f in fields(Measures) if given[f.name] is not None}
    for name in asked.keys() & {"losses", "healed"}:
        asked[name] = parse_counts(asked[name], f"--{name}")
    out, text, compute = given["output_dir"], groups.text_of(given, source), groups.compute_of(given)
    request = AnalyzeRequest(
        source, out, Measures(**asked), given["beside"], given["overwrite"], text, compute, groups.recorded_command()
    )
    with progress.bars() as bars:
        analysis = run(request, bars)
    if analysis is not None and given["as_json"]:
        click.echo(analysis.to_json(), nl=False)
    elif analysis is not None:  # else another process prints it
        layers.print_analysis(analysis, out)
