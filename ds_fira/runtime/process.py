"""The start and the end of a training process, where launchers and DeepSpeed leave traps."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import deepspeed.ops
import torch
import torch.distributed
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.distributed import distributed_c10d

from ds_fira.runtime import background, launchers, lost_peer


def init_distributed(timeout: float | None = None) -> None:
    """Start torch.distributed through DeepSpeed under any launcher, or none.

    Fills in what the launcher did not set (`ds_fira.runtime.launchers.complete_environment`): under `mpirun` and `srun`
    from their own variables, under `mpirun` the meeting point with mpi4py, in a plain `python` for one process. On a
    CPU it keeps DeepSpeed from compiling its shared-memory collectives. A process that an error of communication ends
    says so in one sentence after the traceback.

    Args:
        timeout: seconds after which a collective operation that some process does not join ends with an error, in the
            groups that DeepSpeed makes as well. Default: DeepSpeed's, 10 minutes or the environment's
            DEEPSPEED_TIMEOUT in minutes, and torch's for groups made later, 10 minutes with NCCL, 30 with gloo.

    Raises:
        ValueError: `timeout` is not positive, or torch.distributed has started already; the variables of the launcher
            contradict each other, or several processes were started and MASTER_ADDR or MASTER_PORT is missing and
            cannot be found.
    """
    lost_peer.tell_lost_contact()
    if timeout is not None:
        _set_timeout(timeout)
    if not torch.distributed.is_initialized():
        launchers.complete_environment(os.environ)
    skip_shared_memory_op()
    if not dist.is_initialized():
        limit = default_pg_timeout if timeout is None else timedelta(seconds=timeout)
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and os.environ.get("GROUP_WORLD_SIZE") == "1":
            _meet_again(limit)
        dist.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=limit)


def skip_shared_memory_op() -> None:
    """Without a GPU keep DeepSpeed from compiling its shared-memory collectives: tens of seconds and a C++ compiler."""
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _meet_again(limit: timedelta) -> None:
    """Start torch.distributed in a process that torchrun has restarted.

    torchrun keeps its store over restarts, with the addresses of the processes that are gone, and gloo would wait for
    those. On several machines the counts of restarts may differ, so there it is left as it is.
    """
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=limit))
    prefix = f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    torch.distributed.init_process_group(
        get_accelerator().communication_backend_name(),
        store=torch.distributed.PrefixStore(prefix, store),
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )


def _set_timeout(seconds: float) -> None:
    """Give the groups that are made from here on a timeout: DeepSpeed makes them without one."""
    if seconds <= 0:
        raise ValueError(f"init_distributed: timeout = {seconds} seconds must be positive.")
    if torch.distributed.is_initialized():
        raise ValueError(
            f"init_distributed: timeout = {seconds} comes too late, because torch.distributed has started: call it "
            "before anything else that starts it."
        )
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=seconds)


def shutdown(engine: DeepSpeedEngine | None = None) -> None:
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
    background.end_all()  # while the ranks can still agree
    if torch.distributed.is_initialized():
        dist.barrier()
        lost_peer.stop()  # before the process that holds the store may end
        torch.distributed.destroy_process_group()


def backends() -> tuple[str, ...]:
    """The backends for collectives that torch was built with."""
    known = {
        "nccl": torch.distributed.is_nccl_available,
        "gloo": torch.distributed.is_gloo_available,
        "mpi": torch.distributed.is_mpi_available,
    }
    return tuple(name for name, is_there in known.items() if is_there())


def engine_backend() -> str:
    """The backend that DeepSpeed's engines take on this machine."""
    return str(get_accelerator().communication_backend_name())
