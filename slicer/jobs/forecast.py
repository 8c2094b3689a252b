"""The forecast of a command, shown before work of more than a minute; what it then took; and a clock between the two.

The amounts of work follow from headers (`slicer.jobs.costs`), the rates of this machine from a first second of the same
arithmetic (`slicer.runtime.rates`). What each long stage really took corrects the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slicer.checkpoint.export import FORECAST
from slicer.jobs.costs import TRAINING, Work, seconds_of, total_flops
from slicer.plan.amounts import DAY, spell_seconds, spell_size
from slicer.progress import Progress
from slicer.runtime import memory, rates
from slicer.runtime.compute import Compute
from slicer.runtime.files import check_disk, write_atomically
from slicer.runtime.rates import Rates

LONG = 60.0  # seconds: shorter work is not announced
OFF = 1.5  # a forecast that is wrong by this factor is corrected
_FEW = 4  # steps of a training that are timed: the first one is not counted
_CORRECTING = 5.0  # seconds: shorter stages say too little about the machine


@dataclass(frozen=True)
class Forecast:
    """What a command is expected to take; or, as `Clock.took`, what it took.

    Attributes:
        seconds: stage, as progress names it -> seconds.
        host_bytes: peak of the memory that the process has, with the pages of weights that are mapped from their file.
        device_bytes: peak of what torch allocates on one GPU; 0: the CPU alone.
        disk: directory -> bytes that are written there, and are there at the same time.
    """

    seconds: Mapping[str, float]
    host_bytes: int = 0
    device_bytes: int = 0
    disk: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def is_long(self) -> bool:
        """Whether it is more than a minute."""
        return self.total > LONG

    def __str__(self) -> str:
        """ "about 6 min (measuring layers 1 min, healing the cut 5 min), 5.2GB of memory, 1.3GB of disk"."""
        long = {name: s for name, s in self.seconds.items() if s >= 0.05 * self.total}
        stages = ", ".join(f"{name[:1].lower()}{name[1:]} {spell_seconds(s)}" for name, s in long.items())
        parts = [f"about {spell_seconds(self.total)}" + (f" ({stages})" if len(long) > 1 else "")]
        parts += [f"{spell_size(self.host_bytes, up=True)} of memory"] if self.host_bytes else []
        parts += [f"{spell_size(self.device_bytes, up=True)} on the GPU"] if self.device_bytes else []
        parts += [f"{spell_size(sum(self.disk.values()), up=True)} of disk"] if self.disk else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, object]:
        """For `--json` and forecast.json."""
        return {**asdict(self), "seconds": {name: round(s, 1) for name, s in self.seconds.items()}}


class Clock(Progress):
    """Passes progress on, takes the time of each stage, and corrects the forecast by what each long stage took.

    Attributes:
        forecast: what was expected first, of all stages announced so far.
        took: stage -> seconds so far.
    """

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self.forecast, self.took = Forecast({}), dict[str, float]()
        self._rates: Rates | None = None
        self._left: dict[str, float] = {}  # expected seconds of stages, as corrected
        self._stage, self._began = "", time.monotonic()
        self._computes = set[str]()  # stages that do more than read
        self._factor = 1.0  # what the last long stage took, over its first forecast
        self._cheaper: Callable[[float], Iterable[tuple[str, float]]] | None = None
        self._steps: list[float] = []
        self._total: int | None = None

    @classmethod
    def over(cls, shown: Progress) -> Clock:
        """The clock that `shown` is already, or a new one."""
        return shown if isinstance(shown, Clock) else cls(shown)

    def expect(self, work: Work, compute: Compute, *, always: bool = False, disk: bool = True) -> Forecast:
        """The forecast of work that comes now; announced if it takes more than a minute, or `always`.

        Announced again only where it has changed by more than `OFF`. Raises DiskFull if the `disk` has too little
        space.
        """
        if disk:
            check_disk(work.disk)
        flops = total_flops(work.stages)
        if self._rates is None or any(dtype not in self._rates.flops for dtype in flops):
            self._rates = rates.measured(flops, work.shape.matrices, work.tokens, compute, work.file)
        seconds = {stage.name: seconds_of(stage, self._rates) for stage in work.stages}
        found = Forecast(
            {name: self._factor * s for name, s in seconds.items() if s}, work.host_bytes, work.device_bytes,
            {str(place): nbytes for place, nbytes in work.disk.items() if nbytes},
        )  # fmt: skip
        before = sum(self._left.get(name, 0.0) for name in seconds)
        self._left |= found.seconds
        self._computes |= {stage.name for stage in work.stages if stage.flops}
        if not before:
            self.forecast = _joined(self.forecast, found)
        known = before and found.total / OFF < before < found.total * OFF
        if always or (found.is_long and not known):
            self.note(f"this will take {found}{work.about}")
            self._name_cuts(found.total, work.cheaper)
        self._cheaper = work.cheaper
        return found

    def _name_cuts(self, total: float, cheaper: Callable[[float], Iterable[tuple[str, float]]] | None) -> None:
        """A note with the options that take less than a day, or less at least."""
        if cheaper is not None and total > DAY:
            ways = "; ".join(f"{option}: {spell_seconds(share * total)}" for option, share in cheaper(DAY / total))
            self.note(f"that is more than a day; to cut it: {ways}")

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        self._finish()
        self._stage, self._total, self._steps = text, total, []
        self._shown.stage(text, total, unit)

    def _finish(self) -> None:
        now = time.monotonic()
        if self._stage:
            took = self.took[self._stage] = self.took.get(self._stage, 0.0) + now - self._began
            expected = self._left.pop(self._stage, 0.0)
            if expected > _CORRECTING and self._stage in self._computes:
                self._correct(took / expected)
        self._began = now

    def _correct(self, factor: float) -> None:
        """Multiply what is left by `factor`, and say so where that changes much."""
        self._factor *= factor
        before = sum(self._left.values())
        self._left = {name: factor * s for name, s in self._left.items()}
        if not 1 / OFF < factor < OFF and max(before, factor * before) > LONG:
            self.note(
                f"the work takes {'more' if factor > 1 else 'less'} time than forecast: about "
                f"{spell_seconds(factor * before)} are left"
            )

    def advance(self, amount: int = 1) -> None:
        self._shown.advance(amount)
        expected = self._left.get(TRAINING)
        if self._stage != TRAINING or not expected or self._total is None or amount > 1 or len(self._steps) > _FEW:
            return
        self._steps.append(time.monotonic())
        if len(self._steps) > _FEW:
            whole = self._total * (self._steps[-1] - self._steps[0]) / _FEW
            self._left[self._stage] = whole
            if not expected / OFF < whole < expected * OFF and max(whole, expected) > LONG:
                self.note(f"by its first steps the training takes about {spell_seconds(whole)}")
                self._name_cuts(whole, self._cheaper)

    def detail(self, text: str) -> None:
        self._shown.detail(text)

    def close(self) -> None:
        self._shown.close()

    def note(self, text: str) -> None:
        self._shown.note(text)

    def finish(self, out: Path | None) -> tuple[Forecast, Forecast]:
        """(the forecast, what the work took); if one is over a minute, both go to the checkpoint `out` too."""
        self._finish()
        self._stage = ""
        disk = {} if out is None else {str(out): sum(f.stat().st_size for f in out.rglob("*") if f.is_file())}
        took = Forecast(self.took, memory.peak(), memory.peak_on_gpu(), disk)
        if out is not None and self.forecast.total and (self.forecast.is_long or took.is_long):
            (out / "slicer").mkdir(exist_ok=True)
            text = json.dumps({"forecast": self.forecast.to_dict(), "took": took.to_dict()}, indent=1)
            write_atomically(out / "slicer" / FORECAST, text + "\n")
        return self.forecast, took


def _joined(first: Forecast, then: Forecast) -> Forecast:
    """Both, one after the other."""
    seconds: dict[str, Any] = {**first.seconds, **then.seconds}
    disk = {place: max(first.disk.get(place, 0), then.disk.get(place, 0)) for place in {**first.disk, **then.disk}}
    most = {name: max(getattr(first, name), getattr(then, name)) for name in ("host_bytes", "device_bytes")}
    return replace(then, seconds=seconds, disk=disk, **most)
