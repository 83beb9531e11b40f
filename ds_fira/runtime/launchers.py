"""What the launchers tell their processes, put into the variables that torch.distributed reads.

DeepSpeed's launcher and torchrun set these themselves: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
`mpirun` and `srun` have names of their own for the first three and none for the last two, the address and port where
rank 0 waits for the others.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import MutableMapping

import psutil

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
BY_HAND = "on one machine MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
# The names of RANK, WORLD_SIZE and LOCAL_RANK under each launcher; those named mpirun speak MPI. In this order: inside
# a SLURM job, processes of mpirun inherit the SLURM_PROCID of the daemon that started them.
_LAUNCHERS = {
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    # Only a step of srun has the number of its tasks; the batch script itself and salloc's shell are one process.
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def complete_environment(environment: MutableMapping[str, str]) -> None:
    """Set those of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT that the launcher left out.

    Values that are there stay. For gloo between machines it also sets GLOO_SOCKET_IFNAME where that is missing, to
    the interface that leads to MASTER_ADDR: gloo would take the address of the machine's name, often a loopback one.

    Args:
        environment: `os.environ`, or another mapping of its kind.

    Raises:
        ValueError: variables are missing or contradict each other; the message names them and the remedy.
    """
    launcher = _set_place(environment)
    rank, world_size, local_rank = (_integer(environment, name) for name in PLACE)
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank} is not below WORLD_SIZE={world_size}; ranks count from 0.")
    if not 0 <= local_rank < world_size:
        raise ValueError(f"LOCAL_RANK={local_rank} is not below WORLD_SIZE={world_size}; local ranks count from 0.")

    if not all(environment.get(name) for name in MEETING):
        if world_size == 1:
            meeting = ("127.0.0.1", _free_port())
        elif launcher is not None and launcher.startswith("mpirun"):
            meeting = _meet_over_mpi(launcher, world_size)
        else:
            raise ValueError(
                f"MASTER_ADDR or MASTER_PORT is not set for {world_size} processes; export both, {BY_HAND}, "
                'in a SLURM job MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1).'
            )
        for name, value in zip(MEETING, meeting, strict=True):
            environment[name] = environment.get(name) or str(value)
    if not 0 < _integer(environment, "MASTER_PORT") < 2**16:
        raise ValueError(f"MASTER_PORT={environment['MASTER_PORT']} is not a port; take one between 1024 and 65535.")
    if world_size > 1 and not environment.get("GLOO_SOCKET_IFNAME"):
        interface = _interface_to(environment["MASTER_ADDR"])
        if interface is not None:
            environment["GLOO_SOCKET_IFNAME"] = interface


def _set_place(environment: MutableMapping[str, str]) -> str | None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK, and name the launcher with variables of its own, if there is one.

    The common names win: `srun torchrun` starts one torchrun a machine, and the variables of srun count those.
    """
    given = [name for name in PLACE if environment.get(name)]
    launcher = next((name for name, own in _LAUNCHERS.items() if all(map(environment.get, own))), None)
    if not given:
        values = ("0", "1", "0") if launcher is None else (environment[name] for name in _LAUNCHERS[launcher])
        environment.update(zip(PLACE, values, strict=True))
    elif len(given) < len(PLACE):
        missing = ", ".join(name for name in PLACE if name not in given)
        raise ValueError(f"{' and '.join(given)} set without {missing}; export all of {', '.join(PLACE)}, or none.")
    return launcher


def _meet_over_mpi(launcher: str, world_size: int) -> tuple[str, int]:
    """Rank 0's address and a free port of it, by mpi4py; every rank calls it and returns the same.

    `deepspeed.comm.mpi_discovery` does the same with the first word of `hostname -I`, which may be the address of a
    bridge that no other machine reaches, or no word at all, and always port 29500, which a second run then lacks.
    """
    running = "mpi4py.MPI" in sys.modules
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the second: mpi4py without an MPI library that it can load
        raise ValueError(
            f"MASTER_ADDR or MASTER_PORT is not set for the {world_size} processes of {launcher}, and mpi4py, "
            f"which would find them, does not load ({error}); pip install 'ds_fira[mpi]', or export both, {BY_HAND}."
        ) from error
    world = MPI.COMM_WORLD
    seen = world.Get_size()
    if seen != world_size:
        raise ValueError(
            f"mpi4py sees {seen} processes where {launcher} started {world_size}: it loaded another MPI, "
            f"{MPI.Get_library_version().split(',')[0].strip()}; start with the mpirun of that one, or export "
            f"MASTER_ADDR and MASTER_PORT, {BY_HAND}."
        )
    machine = world.Split_type(MPI.COMM_TYPE_SHARED)
    alone = machine.Get_size() == seen
    machine.Free()
    addresses = world.gather(_own_addresses())
    meeting = None
    if addresses is not None:
        meeting = ("127.0.0.1" if alone else _address_towards(addresses), _free_port())
    address, port = world.bcast(meeting)
    if not running:
        # Nothing else uses it. At exit MPI waits for all ranks, so a rank that fails would hang instead of ending.
        MPI.Finalize()
    if address is None:
        raise ValueError(
            "rank 0 found no address that leads to the other machines of this MPI job; export MASTER_ADDR, the "
            "address of the machine of rank 0."
        )
    return address, port


def _own_addresses() -> list[str]:
    """IPv4 addresses of this machine, without loopback."""
    found = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
    return [e.address for e in found if e.family == socket.AF_INET and not e.address.startswith("127.")]


def _address_towards(addresses: list[list[str]]) -> str | None:
    """This machine's address on the way to one of the others, None where there is none.

    Args:
        addresses: those of every rank, of this one first. Bridges of containers often have the same address on all
            machines, so those that rank 0 has too lead nowhere.
    """
    targets = (address for other in addresses[1:] for address in other if address not in addresses[0])
    return next(filter(None, map(_source_address, targets)), None)


def _source_address(target: str) -> str | None:
    """The address that packets from here to `target` carry; the kernel's routes decide, nothing is sent."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)
            return probe.getsockname()[0]
    except OSError:
        return None


def _interface_to(target: str) -> str | None:
    """Name of the interface that leads to `target`; None for loopback, or where there is none."""
    source = _source_address(target)
    if source is None or source.startswith("127.") or source == "::1":
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == source for entry in entries):
            return name
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _integer(environment: MutableMapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name}={environment[name]} is not a number.") from None
