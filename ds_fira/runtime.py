"""The start and the end of a training process, where launchers and DeepSpeed leave traps."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
import torch.distributed
from deepspeed import comm as dist

from ds_fira import launchers
from ds_fira.zero import skip_shared_memory_op


def init_distributed() -> None:
    """Start torch.distributed through DeepSpeed under any launcher, or none.

    Fills in what the launcher did not set (`ds_fira.launchers.complete_environment`): under `mpirun` and `srun` from
    their own variables, under `mpirun` the meeting point with mpi4py, in a plain `python` for one process. On a CPU it
    keeps DeepSpeed from compiling its shared-memory collectives.

    Raises:
        ValueError: the variables of the launcher contradict each other, or several processes were started and
            MASTER_ADDR or MASTER_PORT is missing and cannot be found.
    """
    if not torch.distributed.is_initialized():
        launchers.complete_environment(os.environ)
    if not torch.cuda.is_available():
        skip_shared_memory_op()
    if not dist.is_initialized():
        dist.init_distributed(auto_mpi_discovery=False, verbose=False)


def shutdown(engine: Any = None) -> None:
    """End a training process cleanly: the last call of a script, on every rank.

    A process that leaves with DeepSpeed's hooks and its process group alive aborts now and then after training ended
    well. The caller drops its own references to the optimizer first.

    Args:
        engine: the DeepSpeed engine, None where there is none.
    """
    if engine is not None:
        engine.destroy()
    del engine
    gc.collect()
    if torch.distributed.is_initialized():
        dist.barrier()
        torch.distributed.destroy_process_group()
