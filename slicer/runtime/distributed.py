"""The processes of one launch: which is the first, the share of each, and the all-reduce that joins their results.

Under `torchrun` or `accelerate launch` the environment gives the number of processes; otherwise there is one. Every
process writes what it measured at its own samples' rows of a zeroed table, and the tables are added as bytes: each row
has one owner, so the sum is exact, and the result does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from slicer.errors import SlicerError, UsageError

if TYPE_CHECKING:
    import torch


T = TypeVar("T")
_PATIENCE = timedelta(days=2)  # while the first process works alone, the others wait
# Set by torchrun and accelerate for a process that is one of several.
_OF_SEVERAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
               "ACCELERATE_USE_FSDP")  # fmt: skip
_working_alone = False  # the others of the launch wait for this process


def world() -> int:
    """The number of processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Whether this process, of several or alone, is the one that prints and writes; does not join the process group."""
    return os.environ.get("RANK", "0") == "0"


def on_this_machine() -> tuple[int, int]:
    """(the number of this process, how many are at work) of the launch's processes on this machine.

    (0, 1) for a process that is alone, and for the first one while the others wait for it: it may use all GPUs.
    """
    if world() <= 1 or _working_alone:
        return 0, 1
    number = os.environ.get("LOCAL_RANK") or os.environ.get("RANK", "0")
    return int(number), int(os.environ.get("LOCAL_WORLD_SIZE") or world())


def sharded() -> bool:
    """Whether accelerate shards the model over the processes (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1", "yes")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block, this process counts as the only one, also for accelerate, which caches its environment."""
    from accelerate.state import AcceleratorState

    hidden = {name: os.environ.pop(name) for name in _OF_SEVERAL if name in os.environ}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.update(hidden)
        AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class Processes:
    """The processes of a launch, seen from process `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Processes:
        """Those of this launch; joins their group when there are several."""
        if world() <= 1:
            return cls()
        import torch

        if torch.cuda.is_available():  # first: tensors created before this are on the first GPU, for every process
            torch.cuda.set_device(on_this_machine()[0] % torch.cuda.device_count())
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE
            )
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process writes the result."""
        return self.rank == 0

    def of(self, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        """This process's batches, and the index of its first sample. Raises UsageError if some processes get none."""
        if len(batches) < self.world:
            raise UsageError(
                f"{len(batches)} batches for {self.world} processes; give more --samples or a smaller --batch-size"
            )
        cuts = [len(batches) * r // self.world for r in range(self.world + 1)]
        first = sum(len(batch) for batch in batches[: cuts[self.rank]])
        return list(batches[cuts[self.rank] : cuts[self.rank + 1]]), first

    def join(self, parts: Sequence[torch.Tensor], first: int, samples: int) -> list[torch.Tensor]:
        """`parts`: tensors [own samples, ...]; returns them for all `samples`, [samples, ...], in every process."""
        if self.world == 1:
            return list(parts)
        import torch

        joined = [torch.zeros(samples, *part.shape[1:], dtype=part.dtype) for part in parts]
        for whole, part in zip(joined, parts, strict=True):
            whole[first : first + len(part)] = part
        flat = torch.cat([whole.view(-1).view(torch.uint8) for whole in joined])
        torch.distributed.all_reduce(flat)
        pieces = torch.split(flat, [whole.nbytes for whole in joined])
        return [piece.view(whole.dtype).view(whole.shape) for piece, whole in zip(pieces, joined, strict=True)]

    def agree(self, value: Any) -> Any:
        """The first process's `value` (picklable), in every process."""
        if self.world == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process (picklable), in every process; the others wait for it.

        A SlicerError that it raises there is raised in all of them.
        """
        global _working_alone
        result: Any = None
        failure: SlicerError | None = None
        if self.is_first:
            before, _working_alone = _working_alone, True
            try:
                result = work()
            except SlicerError as error:
                if self.world == 1:
                    raise
                failure = error
            finally:
                _working_alone = before
        failure, result = self.agree((failure, result))
        if failure is not None:
            raise failure
        answer: T = result
        return answer

    def first_then_all(self, work: Callable[[], T]) -> T:
        """`work` in the first process, then in the others, which find on disk what the first one wrote."""
        done: list[T] = []
        self.first(lambda: done.append(work()))
        return done[0] if self.is_first else work()

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            import torch

            torch.distributed.all_reduce(torch.zeros(1))

    def leave(self) -> None:
        """Leave the group; every process calls this at its end."""
        if self.world > 1:
            import torch

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
