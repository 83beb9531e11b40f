"""The memory of cards, and of the device that this process runs on."""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
# GiB by name, rounded down from what nvidia-smi shows as total.
CARDS = {
    "t4": 15,
    "v100-16": 16,
    "v100": 32,
    "l4": 22,
    "a10": 22,
    "rtx3090": 24,
    "rtx4090": 23,
    "rtx5090": 31,
    "l40s": 44,
    "a6000": 47,
    "a100-40": 40,
    "a100": 80,
    "h100": 79,
    "h200": 140,
}
# What launchers call the number of processes on a machine.
_LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Available:
    """Memory that one process may use, in bytes.

    Attributes:
        device: of the GPU; on a CPU the process's share of the host's.
        host: the process's share of the host's memory; infinite where it is not known.
        shared: whether device and host are the same memory, as on a CPU.
    """

    device: float
    host: float = math.inf
    shared: bool = False


def card_memory(card: str) -> int:
    """Bytes of a card, by its name in `CARDS` or by its GiB.

    Raises:
        ValueError: the card is not known; one sentence.
    """
    name = card.lower().replace(" ", "").removeprefix("nvidia")
    name = f"rtx{name}" if f"rtx{name}" in CARDS else name
    if name in CARDS:
        return CARDS[name] * GIB
    try:
        size = float(card)
    except ValueError:
        near = difflib.get_close_matches(name, CARDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"--gpu-memory = {card!r} is no card that is known; {hint}give one of {', '.join(CARDS)}, or a size in GiB."
        ) from None
    if not 0 < size < math.inf:
        raise ValueError(f"--gpu-memory = {card!r} is not legal; give a size in GiB above 0, or a card's name.")
    return int(size * GIB)


def available_memory(local_processes: int | None = None) -> Available:
    """What this process may use of the device it runs on.

    Args:
        local_processes: on this machine, which share its memory; None to ask the launcher's variables, then the
            number of GPUs, then 1.

    Returns:
        With a GPU, its total memory and a share of the host's; without one, a share of the host's. The host's is what
        is free now, or what the container may use, whichever is less.
    """
    import psutil  # a dependency of DeepSpeed

    cuda = torch.cuda.is_available()
    if local_processes is None:
        given = next((os.environ[name] for name in _LOCAL_PROCESSES if os.environ.get(name, "").isdigit()), None)
        local_processes = int(given) if given else (torch.cuda.device_count() if cuda else 1)
    host = min(psutil.virtual_memory().available, *_container_limits()) // max(local_processes, 1)
    device = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if cuda else host
    return Available(device, host, shared=not cuda)


def _container_limits() -> list[float]:
    texts = [path.read_text().strip() for path in map(Path, _CGROUP_LIMITS) if path.exists()]
    return [math.inf, *(int(text) for text in texts if text.isdigit())]
