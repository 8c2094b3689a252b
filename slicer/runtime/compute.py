"""Where and in which precision models run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slicer.errors import UsageError
from slicer.runtime import distributed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compute:
    """Where models run.

    Attributes:
        device: "auto" (a GPU if there is one, else the CPU), "cpu", "cuda", "cuda:1".
        dtype: a torch name such as "bfloat16"; None: as stored.
        memory: bytes of the host's memory that weights and hidden states may take; None: a share of the total (see
            `slicer.runtime.memory.settled`).
        device_memory: the same of each GPU.
        trust_remote_code: whether a checkpoint's own Python code may run.
    """

    device: str = "auto"
    dtype: str | None = None
    memory: int | None = None
    device_memory: int | None = None
    trust_remote_code: bool = False

    def torch_device(self) -> torch.device:
        """The device of this process; of several on one machine, each takes its own GPU for "auto".

        Raises UsageError if the device is not available.
        """
        import torch

        if self.device == "auto":
            if not torch.cuda.is_available():
                return torch.device("cpu")
            number, count = distributed.on_this_machine()
            own = number % torch.cuda.device_count()
            return torch.device("cuda", own) if count > 1 else torch.device("cuda")
        try:
            target = torch.device(self.device)
            torch.empty(0, device=target)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"--device {self.device}: not available here ({str(error).splitlines()[0][:120]}); use auto or cpu"
            ) from None
        return target

    def pinned(self) -> Compute:
        """The same, with "auto" replaced by the device of this process if there are several processes.

        Then a model is never spread over the GPUs of other processes, not even inside `distributed.alone`.
        """
        several = self.device == "auto" and distributed.world() > 1
        return replace(self, device=str(self.torch_device())) if several else self
