"""The command `slicer heal`."""

from __future__ import annotations

from typing import Any

import click

from slicer.cli import groups
from slicer.cli.groups import group, option
from slicer.cli.training import CONFIG, rank_options, rank_search_of, training_of, training_options
from slicer.heal.finetune.settings import METHODS
from slicer.jobs.request import Compensation, HealRequest


@groups.command()
@click.argument("sliced")
@group(
    "How to heal the cut",
    option("--base-model", "source", metavar="SOURCE", show_default="as in SLICED's plan",
           help="Model that SLICED was sliced from."),
    option("--method", type=click.Choice(["fold", *METHODS]), default="fold",
           help="fold: solve existing matrices again in closed form. qlora, lora: train adapters on the feed-forward, "
           "on 4-bit weights or those as stored, and merge them. full: train all weights."),
    groups.SOLVER,
    CONFIG,
    *training_options(visible=("max_steps", "learning_rate", "lora_r", "batch_size", "seq_len")),
    *rank_options(visible=True),
)  # fmt: skip
@groups.text_options("allenai/c4, streamed")
@group("Output", groups.output_dir(help="Directory of the healed checkpoint.", required=True), *groups.RESULT)
@group("Machine", groups.DEVICE, *groups.MEMORY, groups.TRUST)
def heal(sliced: str, **given: Any) -> None:
    """Close the cut in SLICED, a checkpoint that slicer made.

    Shapes and architecture stay, and all tensors that are not solved or trained keep their bytes. A training that was
    stopped continues when the same command is given again.

    \b
    slicer heal qwen-20L --base-model Qwen/Qwen2.5-0.5B --calibration text.jsonl -o healed
    slicer heal llama-24L --method qlora --max-steps 500 -o llama-24L-healed
    """
    from slicer.cli.render import progress, written
    from slicer.jobs.heal import heal as run
    from slicer.runtime.distributed import Processes
    from slicer.sweep.ranks import heal_with_best_rank

    training = training_of(given, given["method"], "--method")
    fold, text, adapter = Compensation("fold", given["solver"]), groups.text_of(given), given["save_adapter"]
    written_as = groups.written_of(given)
    request = HealRequest(sliced, given["source"], training, fold, text, save_adapter=adapter, **written_as)
    search = rank_search_of(given)
    with progress.bars() as bars:
        done = run(request, bars) if search is None else heal_with_best_rank(request, search, bars)
        if request.training is not None:
            Processes.of_environment().leave()
    written.report(done, given["as_json"])
