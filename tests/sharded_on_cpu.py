"""slicer's command with accelerate's sharding (FSDP) let through on a CPU, where accelerate itself leaves it off.

All else is as on GPUs: torch's FSDP, over gloo, accelerate's plugin from its environment variables, the same Trainer.
Run by several processes, as `sharded_on_cpu.py heal SLICED ...`; each training step is noted on stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any
from unittest import mock

import torch
from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import _init_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle
from transformers import Trainer

from slicer.cli.main import main

_init = state.AcceleratorState.__init__
_post_init = FullyShardedDataParallelPlugin.__post_init__


def _sharded(self: Any, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
    _init(self, *given, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        self.device = torch.device("cpu")  # without the number of the process
        state.PartialState._shared_state.update(distributed_type=DistributedType.FSDP, device=self.device)


def _on_cpu(self: Any) -> None:
    """What accelerate does where it loads on one process and sends to the others, which it refuses without a GPU."""
    apart = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_SYNC_MODULE_STATES": "false"}
    with mock.patch.dict(os.environ, apart):
        _post_init(self)
    self.cpu_ram_efficient_loading = self.sync_module_states = True
    self.param_init_fn = lambda module: module.to_empty(device="cpu", recurse=False)


setattr(state.AcceleratorState, "__init__", _sharded)  # noqa: B010
setattr(FullyShardedDataParallelPlugin, "__post_init__", _on_cpu)  # noqa: B010
# gloo can broadcast what is in memory; and what is there need not be moved there (torch would free it afterwards).
setattr(_init_utils, "_check_module_states_for_sync_module_states", lambda _: None)  # noqa: B010
setattr(FlatParamHandle, "to_cpu", lambda _: contextlib.nullcontext())  # noqa: B010

_training_step = Trainer.training_step


def _noted(trainer: Any, model: Any, *given: Any, **named: Any) -> Any:
    print("training step of", type(model).__name__, file=sys.stderr)
    return _training_step(trainer, model, *given, **named)


setattr(Trainer, "training_step", _noted)  # noqa: B010

if __name__ == "__main__":
    main()
