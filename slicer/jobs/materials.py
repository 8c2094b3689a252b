"""What a conversion works with, each made once when first needed: the model, the text, the rewritten configs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from slicer.checkpoint.config import sliced_config
from slicer.checkpoint.reader import Checkpoint
from slicer.errors import ArchitectureError
from slicer.jobs.options import Options
from slicer.plan.plan import Plan
from slicer.progress import Progress
from slicer.runtime.compute import Compute

if TYPE_CHECKING:
    from slicer.data.calibration import TokenBatches
    from slicer.model.walk import Walk


class SourceModel:
    """The source as a model to run: loaded when first needed, or walked from disk where it does not fit; let go before
    the result is checked."""

    def __init__(self, checkpoint: Checkpoint, options: Options, progress: Progress) -> None:
        self._checkpoint, self._options, self._progress = checkpoint, options, progress
        self._walk: Walk | None = None
        self._open = contextlib.ExitStack()

    @property
    def fits(self) -> bool:
        """Whether it can be loaded."""
        from slicer.runtime.memory import fits

        options = self._options
        return fits(self._checkpoint.bytes_as(options.dtype), options.device, options.memory)

    def walk(self) -> Walk:
        """A walk over it."""
        if self._walk is None:
            from slicer.model.walk import open_walk

            if self.fits:
                self._progress.stage("Loading the model")
            else:
                self._progress.note(
                    "the model does not fit in memory: its layers are read from disk one at a time"
                    + (", out of pickled .bin files" if self._checkpoint.is_bin else "")
                )
            options = self._options
            compute = Compute(options.device, options.dtype, options.memory, options.trust_remote_code)
            self._walk = self._open.enter_context(open_walk(self._checkpoint, compute, loads=self.fits))
        return self._walk

    def release(self) -> None:
        self._walk = None
        self._open.close()


class CalibrationData:
    """The calibration batches, read once when first needed."""

    def __init__(
        self, checkpoint: Checkpoint, options: Options, model: SourceModel, progress: Progress
    ) -> None:
        self._checkpoint, self._options, self._model, self._progress = checkpoint, options, model, progress
        self._data: TokenBatches | None = None
        self.spec = options.calibration

    @property
    def at_hand(self) -> bool:
        """Whether healing may use it unasked: it was read already, or named."""
        return self._data is not None or self.spec.source is not None

    def get(self) -> TokenBatches:
        if self._data is None:
            from slicer.data.calibration import token_batches

            walk = self._model.walk()
            self._progress.stage("Calibration data")
            self._data = token_batches(
                self.spec,
                self._checkpoint.path,
                walk.model,
                streamed=walk.streamed,
                trust_remote_code=self._options.trust_remote_code,
            )
        return self._data


class Configs:
    """The rewritten config of each cut, made once; also the test whether a cut can be expressed."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._made: dict[tuple[Any, ...], dict[str, Any]] = {}

    def __call__(self, cut: Plan | tuple[int, ...]) -> dict[str, Any]:
        """Of a plan, or of one that keeps these layers. Raises ArchitectureError as `sliced_config` does."""
        plan = cut if isinstance(cut, Plan) else Plan(self._checkpoint.depth, cut)
        key = (plan.kept, plan.no_attention, plan.no_ffn, plan.joined, plan.form)
        if key not in self._made:
            self._made[key] = sliced_config(
                self._checkpoint,
                plan,
                dtype=self._options.dtype,
                trust_remote_code=self._options.trust_remote_code,
            )
        return self._made[key]

    def why_not(self, plan: Plan) -> str | None:
        """The reason why `plan` cannot be expressed; None where it can."""
        try:
            self(plan)
        except ArchitectureError as error:
            return str(error)
        return None
