"""The start and the end of a training process, where launchers and DeepSpeed leave traps."""

from __future__ import annotations

import gc
import os
import socket
from typing import Any

import torch
import torch.distributed
from deepspeed import comm as dist

from ds_fira.zero import skip_shared_memory_op

# What each launcher calls the three numbers that torch.distributed wants.
_LAUNCHER_VARIABLES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
}


def init_distributed() -> None:
    """Start torch.distributed through DeepSpeed under any launcher, or none.

    Fills in what the launcher did not set: under `mpirun` and `srun` from their own variables, in a plain `python` for
    one process. On a CPU it keeps DeepSpeed from compiling its shared-memory collectives.

    Raises:
        ValueError: several processes were started and MASTER_ADDR or MASTER_PORT is missing.
    """
    for name, sources in _LAUNCHER_VARIABLES.items():
        found = next((os.environ[source] for source in sources if source in os.environ), None)
        os.environ.setdefault(name, found if found is not None else ("1" if name == "WORLD_SIZE" else "0"))
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    elif "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ValueError(
            f"MASTER_ADDR or MASTER_PORT is not set for {os.environ['WORLD_SIZE']} processes; export both, such as "
            "MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 on one machine."
        )
    if not torch.cuda.is_available():
        skip_shared_memory_op()
    if not dist.is_initialized():
        dist.init_distributed(auto_mpi_discovery=False, verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
