"""The share of the samples that one process measures in a distributed run, and the all-reduce that joins the shares.

`torchrun` and `accelerate launch` set the number of processes in the environment; otherwise there is one. Every process
writes its results into its own rows of a zero table, and the tables are summed as bytes. Each row has one owner, so the
sum is exact and does not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from slicer.errors import SlicerError, UsageError

T = TypeVar("T")
_PATIENCE = timedelta(days=2)  # rank 0 may work alone for long while the others wait


@dataclass(frozen=True)
class Share:
    """Process `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """This process's share; joins the process group if there is one."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world <= 1:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE
            )
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the result."""
        return self.rank == 0

    def of(self, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        """This process's batches, and the index of its first sample. Raises UsageError if a process would get none."""
        if len(batches) < self.world:
            raise UsageError(
                f"{len(batches)} batches for {self.world} processes; pass more --samples or a smaller --batch-size"
            )
        cuts = [len(batches) * r // self.world for r in range(self.world + 1)]
        first = sum(len(batch) for batch in batches[: cuts[self.rank]])
        return list(batches[cuts[self.rank] : cuts[self.rank + 1]]), first

    def join(self, parts: Sequence[torch.Tensor], first: int, samples: int) -> list[torch.Tensor]:
        """`parts`: tensors [own samples, ...]. Returns them for all `samples`, [samples, ...], in every process."""
        if self.world == 1:
            return list(parts)
        joined = [torch.zeros(samples, *part.shape[1:], dtype=part.dtype) for part in parts]
        for whole, part in zip(joined, parts, strict=True):
            whole[first : first + len(part)] = part
        flat = torch.cat([whole.view(-1).view(torch.uint8) for whole in joined])
        torch.distributed.all_reduce(flat)
        at = 0
        for index, whole in enumerate(joined):
            joined[index] = flat[at : at + whole.nbytes].view(whole.dtype).view(whole.shape)
            at += whole.nbytes
        return joined

    def agree(self, value: Any) -> Any:
        """Broadcast rank 0's `value` (picklable) to every process."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` in rank 0 only and return its result in every process; a SlicerError is raised in all of them."""
        result: Any = None
        failure: SlicerError | None = None
        if self.is_first:
            try:
                result = work()
            except SlicerError as error:
                failure = error
        failure, result = self.agree((failure, result))
        if failure is not None:
            raise failure
        answer: T = result
        return answer

    def leave(self) -> None:
        """Leave the process group; every process must call this at its end."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
