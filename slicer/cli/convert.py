"""The command `slicer convert`. Convert with training is two jobs, composed here: the bare cut, then its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicer.cli import groups
from slicer.cli.groups import expert, group, option
from slicer.cli.training import CONFIG, rank_options, rank_search_of, training_of, training_options
from slicer.data.sources import TextSpec
from slicer.errors import HealError
from slicer.heal.finetune.settings import METHODS, of_record
from slicer.jobs.request import (
    COMPENSATIONS,
    OFFSETS,
    STRATEGIES,
    Compensation,
    ConvertRequest,
    HealRequest,
    Selection,
    Text,
)
from slicer.plan.amounts import parse_goal
from slicer.plan.plan import FORMS, Plan

if TYPE_CHECKING:
    from slicer.jobs.output import Written
    from slicer.progress import Progress
    from slicer.sweep.ranks import RankSearch

_AMOUNTS = ("drop", "keep_layers", "max_params", "max_bytes", "drop_attention", "drop_ffn", "drop_sublayers")


@groups.command()
@click.argument("source")
@group(
    "How much to drop",
    option("--drop", metavar="AMOUNT", help="Layers: fraction 0.4, count 8, block 24-31 (inclusive) or list 3,7,9-12."),
    option("--keep-layers", type=int, metavar="N", help="Keep this many layers."),
    option("--max-params", metavar="SIZE", help="Drop the fewest layers that leave at most SIZE parameters, e.g. 5B."),
    option("--max-bytes", metavar="SIZE", help="Drop the fewest layers that leave at most SIZE of weights, e.g. 16GB."),
    option("--drop-attention", metavar="AMOUNT", help="Drop the attention of this many layers; alone, or with --drop."),
    option("--drop-ffn", metavar="AMOUNT", help="Drop the feed-forward of this many layers; alone, or with --drop."),
    option("--drop-sublayers", metavar="AMOUNT",
           help="Drop this many sublayers of either kind, least important first."),
    option("--plan", "plan_file", **groups.FILE, help="Replay a saved plan.json, with its healing."),
)  # fmt: skip
@group(
    "How to choose",
    option("--strategy", type=click.Choice(STRATEGIES), default=Selection.strategy,
           help="similarity: the block whose ends lie closest (angular distance). deepest: the last layers before the "
           "final one. tail: the last layers."),
    expert("--offset", type=click.Choice(OFFSETS), default=Selection.offset,
           help="whole: blocks of whole layers. half: from after one attention to after another. auto: the closer of "
           "both (whole for --solver transform and training)."),
    expert("--format", type=click.Choice(FORMS), show_default="native; blockwise if a sublayer is missing",
           help="How layers without attention or feed-forward are written. blockwise: as vLLM's DeciLM (Llama, "
           "Mistral, Qwen2); transformers needs 'import slicer'. zeroed: output matrix zero; loads everywhere, saves "
           "nothing."),
)  # fmt: skip
@groups.text_options()
@group(
    "How to heal the cut",
    option("--heal", type=click.Choice([*COMPENSATIONS, *METHODS]), show_default="auto, or as in --plan",
           help="none: keep every byte. fold: solve existing matrices again in closed form. auto: fold if there is "
           "text and it helps. bias, linear: add a constant or a low-rank map. qlora, lora, full: fold, then train."),
    option("--rank", type=groups.POSITIVE, help="Rank of the maps of --heal linear."),
    groups.SOLVER,
    groups.ADAPT,
    expert("--heal-steps", type=click.IntRange(min=0), metavar="N", show_default="0",
           help="Then train the additions of bias or linear, and nothing else, for N steps."),
    CONFIG,
    *training_options(),
    *rank_options(visible=False),
)  # fmt: skip
@group(
    "Output",
    groups.output_dir(help="Output directory.", show_default="SOURCE's name and the layers left, e.g. model-24L"),
    groups.OVERWRITE,
    option("--dry-run", default=False, help="Show the plan, the sizes and the forecast; write nothing."),
    groups.dtype_option(help="Cast the weights, and measure with them.", show_default="as stored, bit for bit"),
    groups.SHARDS,
    groups.VERIFY,
    groups.JSON,
)  # fmt: skip
@group("Machine", groups.DEVICE, *groups.MEMORY, groups.TRUST)
def convert(source: str, **given: Any) -> None:
    """Drop layers of SOURCE and write a standard checkpoint.

    SOURCE is a directory, a Hub id (org/name or org/name@revision), or "demo", the embedded model.

    \b
    slicer convert demo --drop 3 -o demo-9L
    slicer convert meta-llama/Llama-2-7b-hf --drop 0.25
    slicer convert meta-llama/Llama-2-7b-hf --drop 10 --heal qlora -o llama-22L
    slicer convert qwen2.5-0.5b --plan analysis/plan.json
    """
    from slicer.cli.render import progress, written
    from slicer.jobs.convert import convert as run

    if given["heal"] in METHODS and given["rank"] is not None:
        click.echo("note: --rank of adapters is now --lora-r; the old name will be removed in slicer 0.3", err=True)
        given["training_lora_r"], given["rank"] = given["rank"], None
    request = request_of(source, given)
    healing = healing_of(request, given)
    search = rank_search_of(given)
    with progress.bars() as bars:
        done: Written | None
        if healing is None or request.output.dry_run:
            if healing is not None:
                foresee_training(request, healing, bars)
            done = run(request if healing is None else bare(request), bars)
        else:
            done = convert_then_heal(request, healing, bars, search)
    written.report(done, given["as_json"])


def request_of(source: str, given: Mapping[str, Any]) -> ConvertRequest:
    """The request of the options of this command, without training."""
    amounts = {name: given[name] for name in _AMOUNTS}
    goal = parse_goal(keep=amounts.pop("keep_layers"), **amounts)
    plan = Plan.load(given["plan_file"]) if given["plan_file"] is not None else None
    selection = Selection(given["strategy"], given["offset"], given["format"])
    method = given["heal"] if given["heal"] in COMPENSATIONS else None
    compensation = Compensation(method, given["solver"], given["rank"], given["heal_steps"], given["adapt"])
    text = groups.text_of(given, source if plan is None else None)
    return ConvertRequest(source, goal, plan, selection, compensation, text, **groups.written_of(given))


def healing_of(request: ConvertRequest, given: Mapping[str, Any]) -> HealRequest | None:
    """The training of the options, or without --heal that of the replayed plan; None: no training.

    Its `cut` is not known yet. Options that are given replace what the plan records.
    """
    record = request.plan.healing if request.plan is not None else None
    method, recorded, text, solver = given["heal"], None, request.text, request.compensation.solver
    if method is None and record is not None and record.training is not None:
        method, recorded = record.method, of_record(record.training.asked)
        if record.text is not None:
            text = Text.of(text.over(TextSpec.of_record(record.text)))
        solver = solver or record.solver
    training = training_of(given, method, "--heal", recorded)
    if training is None:
        return None
    fold, adapter = Compensation("fold", solver, adapt=given["adapt"]), given["save_adapter"]
    return HealRequest(
        "", request.source, training, fold, text, request.output, request.compute, adapter, request.command
    )


def bare(request: ConvertRequest) -> ConvertRequest:
    """The same cut without repair, of whole layers, which training needs; "auto" could give a half-offset cut.

    Raises HealError if the request is for a cut below the layer.
    """
    goal, plan = request.goal, request.plan
    below = (goal is not None and bool(goal.sublayers)) or (plan is not None and not plan.complete)
    if below or request.selection.offset == "half":
        raise HealError(
            f"{request.source}: training needs whole layers; heal a cut of sublayers with --heal fold, bias or linear"
        )
    selection = replace(request.selection, offset="whole")
    return replace(request, compensation=Compensation("none"), selection=selection, command=None)


def foresee_training(request: ConvertRequest, healing: HealRequest, progress: Progress) -> None:
    """Show the forecast of a training, of a source whose weights need not be here."""
    from slicer.checkpoint.export import output_name
    from slicer.checkpoint.hub import open_source
    from slicer.jobs.convert import without_weights
    from slicer.jobs.forecast import Clock
    from slicer.jobs.heal import expected_training

    source = without_weights(request) or open_source(request.source)
    work = expected_training(request, healing, source, request.output.out or Path(output_name(source.name, "cut")))
    Clock.over(progress).expect(work, request.compute, always=True, disk=False)


def convert_then_heal(
    request: ConvertRequest, healing: HealRequest, progress: Progress, search: RankSearch | None = None
) -> Written | None:
    """The bare cut of `request`, then the training that `healing` asks for; None in all processes but the first.

    The cut lies in OUT.cut until the training is done, so that the same request resumes. Without a directory for the
    result it is SOURCE-cut, and the result is named after the cut. `search`: how to pick the rank of the adapters.
    """
    from slicer.checkpoint.export import check_output, output_name
    from slicer.checkpoint.hub import open_source
    from slicer.heal.finetune.model import require
    from slicer.heal.finetune.result import check_adapter_output
    from slicer.jobs.convert import convert
    from slicer.jobs.forecast import Clock
    from slicer.jobs.heal import expected_training, heal
    from slicer.jobs.recipe import default_place
    from slicer.runtime.distributed import Processes
    from slicer.runtime.workdir import SIGN, beside, check_owner, claimed
    from slicer.sweep.ranks import heal_with_best_rank

    assert healing.training is not None
    out, overwrite, method = request.output.out, request.output.overwrite, healing.training.method
    cut = bare(request)
    require(method)
    source = open_source(request.source)
    if (known := out or default_place(request, source)) is not None:  # before the cut is made, which may take long
        check_output(known, source.path, overwrite=overwrite)
    if out is not None:
        check_adapter_output(healing.save_adapter, method, out, [source.path], overwrite=overwrite)
    progress = clock = Clock.over(progress)
    clock.expect(
        expected_training(request, healing, source, out or Path(output_name(source.name, "cut"))), request.compute
    )
    place = beside(out, "cut") if out is not None else Path(output_name(request.source, "cut"))
    path = place / "cut"

    def result() -> Path:
        return out or Path(output_name(request.source, Plan.load(path).size_name))

    def later() -> list[Path]:
        return [beside(result(), kind) for kind in ("training", "ranks")] if out or path.is_dir() else []

    for directory in later():
        check_owner(directory)
    processes = Processes.of_environment()
    with claimed(
        place, processes, what="the cut of an unfinished training", overwrite=overwrite,
        resumable=lambda: any((directory / SIGN).is_file() for directory in later()), convert=request.identity,
    ):  # fmt: skip
        output = replace(request.output, out=path, overwrite=True, verify="load")
        processes.first(lambda: None if path.is_dir() else convert(replace(cut, output=output), progress))
        asked = replace(healing, cut=str(path), output=replace(request.output, out=result()))
        done = heal(asked, progress) if search is None else heal_with_best_rank(asked, search, progress)
    processes.leave()
    return done
