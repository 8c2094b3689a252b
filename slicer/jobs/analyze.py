"""`slicer analyze`: measure the layers of a source by every metric that is asked for, into analysis.json and figures.

Every process of a launch measures its portion of the sequences. A stopped run resumes: the text, the recording of each
layer and each pass that was finished are kept in a work directory inside the output directory.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slicer.checkpoint.hub import Source, open_source
from slicer.checkpoint.tensors import DTYPES
from slicer.data.calibration import TokenBatches, read_text
from slicer.data.sources import TextSpec
from slicer.errors import HealError, OutputError, UsageError
from slicer.evaluate import lm_tasks
from slicer.figures import layers as figures
from slicer.heal.compensate.fold import fold
from slicer.heal.patch import holds, written_dtype
from slicer.jobs.costs import work_of_analysis
from slicer.jobs.forecast import Clock
from slicer.jobs.recipe import check_memory, text_to_solve_on, with_budgets
from slicer.jobs.request import CANDIDATES, AnalyzeRequest, check_choice
from slicer.measure.analysis import Analysis, Distances
from slicer.measure.distances import distance_tables, record_halves, table_of_sums, tables_of_halves
from slicer.measure.losses import Questions, block_losses, greedy_order, taylor_table
from slicer.measure.metrics import points_affordable
from slicer.measure.recorder import Portion, Recording, record
from slicer.measure.shapley import AGAINST, Coalitions, leave_one_out, shapley
from slicer.model.walk import Walk, open_walk
from slicer.plan.blocks import rank
from slicer.plan.plan import METRIC, Plan
from slicer.plan.records import TextRecord
from slicer.progress import SILENT, Progress
from slicer.runtime import distributed
from slicer.runtime.distributed import Processes
from slicer.runtime.files import write_atomically
from slicer.runtime.memory import smaller, within_memory
from slicer.runtime.versions import versions
from slicer.runtime.workdir import Notebook, claimed

_PARTIAL = ".partial"  # holds one work directory a process; removed at the end


def analyze(request: AnalyzeRequest, progress: Progress = SILENT) -> Analysis | None:
    """Measure a source into the directory `request.out`: analysis.json and figures.

    If stopped, the same request resumes after the last finished layer or pass. In a distributed run every process
    calls this, and all but the first return None. Raises SlicerError children; see `slicer.errors`.
    """
    progress = clock = Clock.over(progress)
    progress.stage("Opening the checkpoint")
    source = open_source(request.source)
    _check(request, source.checkpoint.depth)
    other = None if request.beside is None else Analysis.load(request.beside)
    solves, checkpoint = bool(request.measures.healed), source.checkpoint
    text = text_to_solve_on(request.text, checkpoint) if solves else request.text.over(TextSpec())
    compute, loads = with_budgets(checkpoint, request.compute)
    check_memory(checkpoint, compute, loads)
    processes = Processes.of_environment()
    try:
        _check_place(request.out, overwrite=request.overwrite)
        clock.expect(work_of_analysis(request.measures, checkpoint, text, compute, request.out, loads=loads), compute)
        # Each process has a directory of its own, which need not be on the same disk.
        with claimed(
            request.out / _PARTIAL / str(processes.rank), what="an unfinished analysis", overwrite=request.overwrite,
            checkpoint=source.checkpoint.identity, text=text.identity, source=request.source, dtype=compute.dtype,
            positions=request.measures.positions, processes=processes.world, versions=versions(),
        ) as work:  # fmt: skip
            progress.stage("Loading the model" if loads else "Reading the modules outside the layers")
            if not loads:
                bins = ", from pickled .bin files" if source.checkpoint.is_bin else ""
                progress.note(f"the model does not fit in memory: layers are read from disk one at a time{bins}")
            with open_walk(source.checkpoint, compute, loads=loads, directory=work.path) as walk:
                batches = _shared_text(text, source.path, walk, processes, progress)
                portion = Portion.of(batches.batches, processes)
                run = _Run(request, source, walk, batches.record, portion, work.path, progress)
                with within_memory("measuring", smaller(text.batch_size)):
                    analysis = run.measured()
            if not processes.is_first:
                return None
            progress.stage("Drawing")
            _publish(analysis, other, request.out, progress)
        shutil.rmtree(request.out / _PARTIAL, ignore_errors=True)
        return analysis
    finally:
        processes.leave()


@dataclass(frozen=True)
class _Run:
    """The inputs of all measurements: the request, the source and a walk over it, the text, this process's portion of
    it, and the work directory, which keeps finished passes."""

    request: AnalyzeRequest
    source: Source
    walk: Walk
    text: TextRecord
    portion: Portion
    work: Path
    progress: Progress

    def measured(self) -> Analysis:
        """Everything that is asked for, each table by one function."""
        wanted, walk, portion, progress = self.request.measures, self.walk, self.portion, self.progress
        book = Notebook(self.work / "passes.json")
        questions = self.questions()  # before any measurement, so that errors show early
        recording = self.recording()
        layers, sublayers = distance_tables(recording, portion, progress), dict[str, Distances]()
        base: float | None = None
        if wanted.losses:
            tables, base = block_losses(walk, portion, wanted.losses, book, progress)
            layers |= tables
        greedy: tuple[dict[str, float], ...] = ()
        if wanted.greedy:
            greedy, base = greedy_order(walk, portion, wanted.greedy, book, progress)
        if wanted.taylor:
            layers["taylor"] = taylor_table(walk, portion, book, progress)
        if wanted.healed:
            layers["healed_loss"] = self.healed_table(layers[METRIC], book)
        if wanted.sublayers:
            sublayers |= tables_of_halves(record_halves(walk, portion.batches, progress=progress), portion.seq_len)
            sublayers |= {against: self.single_sublayers(against) for against in AGAINST if wanted.losses}
        about: Mapping[str, Any] | None = None
        if wanted.shapley:
            table, about = self.shapley_table(questions)
            (sublayers if wanted.sublayers else layers)[table.metric] = table
        return Analysis(
            walk.depth,
            portion.samples,
            portion.seq_len,
            metrics=layers,
            sublayers=sublayers,
            source=self.request.source,
            revision=self.source.revision,
            model_type=self.source.checkpoint.config.get("model_type"),
            dtype=str(walk.model.dtype).removeprefix("torch."),
            positions=recording.positions,
            points=recording.point_count,
            calibration=self.text,
            base_loss=base,
            greedy=greedy,
            shapley=about,
            versions=versions(),
            command=self.request.command,
        )

    def recording(self) -> Recording:
        """The residual stream of this process's sequences, with as many points for CKA as are cheap."""
        checkpoint, portion = self.source.checkpoint, self.portion
        width, tokens = self.walk.model.config.get_text_config().hidden_size, portion.samples * portion.seq_len
        parameters = sum(s.numel for key, s in checkpoint.tensors.items() if key.startswith(checkpoint.layer_prefix))
        points = points_affordable(self.walk.depth + 1, width, portion.samples, tokens, parameters)
        at, progress = self.request.measures.positions, self.progress
        return record(self.walk, portion, self.work, positions=at, points=points, resumable=True, progress=progress)

    def questions(self) -> Questions | None:
        """The questions of --against task:NAME."""
        wanted = self.request.measures
        if not wanted.against.startswith("task:"):
            return None
        self.progress.stage("Drawing questions")
        task, trusted = wanted.against.removeprefix("task:"), self.request.compute.trust_remote_code
        how: dict[str, Any] = {"data": wanted.data, "seed": self.text.seed, "trust_remote_code": trusted}
        return lm_tasks.draw(task, wanted.questions, self.walk.model, self.source.path, **how)

    def healed_table(self, distances: Distances, book: Notebook) -> Distances:
        """The rise of the held-out loss over the full model's, nats a token, of the closest blocks by `distances` after
        a fold. NaN for blocks that were not tried or cannot be folded. It has no standard errors."""

        walk, checkpoint = self.walk, self.source.checkpoint
        how: dict[str, Any] = {"holds": holds(checkpoint), "written": written_dtype(checkpoint, None)}

        def increase(dropped: Sequence[int]) -> float | None:
            plan = Plan.dropping(walk.depth, dropped)
            try:
                loss = fold(walk, self.portion.batches, plan, progress=self.progress, **how).losses
            except HealError:
                return None
            assert loss.after is not None and loss.source is not None
            return loss.after - loss.source

        rows: dict[int, list[float]] = {}
        for n in self.request.measures.healed:
            row = [math.nan] * (distances.depth - n + 1)
            for block in rank(distances, n)[:CANDIDATES]:
                value = book.take(f"healed-{block.start}+{n}", partial(increase, block.dropped))
                row[block.start] = math.nan if value is None else value
            if not all(map(math.isnan, row)):
                rows[n] = row
        if not rows:
            raise HealError("none of the closest blocks can be healed; leave --healed out")
        unknown = {n: [math.nan] * len(row) for n, row in rows.items()}
        return replace(distances, metric="healed_loss", mean=rows, standard_error=unknown, difference_error=unknown)

    def single_sublayers(self, against: str) -> Distances:
        """The loss or the KL divergence without each single sublayer."""
        coalitions = Coalitions(self.walk, self.portion.batches, sublayers=True, against=against)
        samples = leave_one_out(coalitions, self.progress).samples
        return table_of_sums(against, samples, seq_len=self.portion.seq_len, samples=self.portion.samples, most=1)

    def shapley_table(self, questions: Questions | None) -> tuple[Distances, Mapping[str, Any]]:
        """The Shapley values of layers, or of sublayers where these are measured, and their settings."""
        wanted, progress = self.request.measures, self.progress
        against, asked = wanted.against if questions is None else AGAINST[0], questions or self.portion.batches
        coalitions = Coalitions(self.walk, asked, sublayers=wanted.sublayers, against=against)
        about: dict[str, Any] = {"against": wanted.against}
        if questions is not None:
            count, score = len(questions.right), 1 - float(coalitions.base.mean())
            about |= {"questions": count, "score": score, "guessing": 1 - questions.guessing}
            noise = "; not better than chance, so the Shapley values are noise"
            progress.note(
                f"{wanted.against}: {score:.1%} of {count} questions right with all layers, chance is "
                f"{about['guessing']:.1%}{noise if coalitions.ceiling > 1 else ''}"
            )
        values = shapley(coalitions, wanted.shapley, seed=self.text.seed, progress=progress)
        pairs, passes = len(values.samples), values.passes
        progress.note(f"Shapley values: {pairs} pair{'s' if pairs > 1 else ''} of orders, {passes:.0f} forward passes")
        name = "shapley" if questions is None else "shapley_score"
        table = table_of_sums(name, values.samples, seq_len=self.portion.seq_len, samples=self.portion.samples)
        return table, {**about, "pairs": pairs, "passes": round(passes, 2)}


def _shared_text(spec: TextSpec, path: Path, walk: Walk, processes: Processes, progress: Progress) -> TokenBatches:
    """The text that the first process makes, in every process."""

    def made() -> tuple[torch.Tensor, TextRecord]:
        text = read_text(spec, path, walk, progress)
        assert text is not None
        return torch.cat(text.batches), text.record

    tokens, about = processes.first(made)
    return TokenBatches(list(torch.split(tokens, spec.batch_size)), about)


def _check(request: AnalyzeRequest, depth: int) -> None:
    """Raise UsageError for options that contradict each other or do not fit the model."""
    wanted, task = request.measures, request.measures.against.startswith("task:")
    check_choice("--dtype", request.compute.dtype, tuple(DTYPES))
    for name, sizes in (("losses", wanted.losses), ("healed", wanted.healed)):
        for n in sizes:
            if not 0 < n < depth:
                raise UsageError(f"--{name} {n}: the model has {depth} layers; pass sizes between 1 and {depth - 1}")
    if not 0 <= wanted.greedy < depth:
        raise UsageError(f"--greedy {wanted.greedy}: the model has {depth} layers; remove at most {depth - 1}")
    if wanted.against not in AGAINST and (not task or wanted.against == "task:"):
        raise UsageError(f"--against {wanted.against}: choose from {', '.join(AGAINST)}, task:NAME")
    if task and not wanted.shapley:
        raise UsageError(f"--against {wanted.against}: also pass the number of forward passes: --shapley PASSES")
    if wanted.data is not None and not task:
        raise UsageError("--data needs a task: pass --against task:NAME")
    if wanted.questions < 1:
        raise UsageError(f"--questions {wanted.questions}: pass at least 1")
    if wanted.shapley < 0:
        raise UsageError(f"--shapley {wanted.shapley}: pass a number of forward passes of at least 1")
    if distributed.world() > 1 and (wanted.healed or wanted.sublayers or wanted.shapley):
        raise UsageError("--healed, --sublayers and --shapley: measured by one process; run them without torchrun")


def _check_place(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `out` holds a finished analysis that may not be replaced, or something else."""
    if (out / _PARTIAL).is_dir() or not out.is_dir():  # the work directory is checked when it is claimed
        return
    if (out / "analysis.json").exists():
        if not overwrite:
            raise OutputError(
                f"{out}: holds an analysis already; choose another place with -o, or --overwrite to replace it"
            )
    elif strange := sorted(p.name for p in out.iterdir()):
        raise OutputError(f"{out}: holds {strange[0]}, which is no analysis; choose another place with -o")


def _publish(analysis: Analysis, other: Analysis | None, out: Path, progress: Progress) -> None:
    """Write the figures, then analysis.json: if that exists, everything does."""
    figures.analysis_figures(analysis, out)
    if analysis.sublayers:
        figures.parts(analysis, out / "parts.png+svg")
    if other is not None:
        agreement = figures.trade_off(analysis, other, out / "trade-off.png+svg")
        progress.note(f"trade-off.png compares the two texts: rank correlation {agreement:.2f}")
    write_atomically(out / "analysis.json", analysis.to_json())
