"""What `ds_fira.init_distributed` makes of the variables of each launcher, and what it refuses."""

from __future__ import annotations

import socket
import sys

import pytest

from ds_fira.runtime.launchers import complete_environment

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
PLACE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
SLURM_BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
SLURM_STEP = {**SLURM_BATCH, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize("own", [OPEN_MPI, MPICH, SLURM_STEP, {**SLURM_STEP, "SLURM_PROCID": "0", **OPEN_MPI}])
def test_variables_of_launchers(own: dict[str, str]) -> None:
    """Their own names become the common ones; mpirun's count inside a SLURM job."""
    environment = {**own, **MEETING}
    complete_environment(environment)
    assert {name: environment[name] for name in PLACE} == PLACE
    assert {name: environment[name] for name in MEETING} == MEETING
    assert "GLOO_SOCKET_IFNAME" not in environment  # a loopback address: one machine


@pytest.mark.parametrize("own", [{}, SLURM_BATCH, {"RANK": "", "WORLD_SIZE": ""}])
def test_one_process(own: dict[str, str]) -> None:
    """A plain python, also in the batch script of a SLURM job of several tasks, is one process with a port."""
    environment = dict(own)
    complete_environment(environment)
    assert [environment[name] for name in PLACE] == ["0", "1", "0"]
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(environment["MASTER_PORT"])))


def test_common_names_win() -> None:
    """Under `srun torchrun` the variables of srun count torchruns, not processes."""
    environment = {**SLURM_STEP, **MEETING, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
    expected = dict(environment)
    complete_environment(environment)
    assert environment == expected


def test_gloo_takes_the_interface_to_rank_0() -> None:
    """Between machines gloo is told the interface, unless the user told it one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        own = probe.getsockname()[0]
    environment = {**PLACE, "MASTER_ADDR": own, "MASTER_PORT": "29500"}
    complete_environment(environment)
    assert environment["GLOO_SOCKET_IFNAME"] in {name for _, name in socket.if_nameindex()} - {"lo"}
    environment["GLOO_SOCKET_IFNAME"] = "ib0"
    complete_environment(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "0"}, "^RANK set without WORLD_SIZE, LOCAL_RANK; export all"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "^RANK and WORLD_SIZE set without LOCAL_RANK"),
        ({**PLACE, **MEETING, "RANK": "4"}, "^RANK=4 is not below WORLD_SIZE=4"),
        ({**PLACE, **MEETING, "RANK": "-1"}, "^RANK=-1 is not below WORLD_SIZE=4"),
        ({**PLACE, **MEETING, "LOCAL_RANK": "4"}, "^LOCAL_RANK=4 is not below WORLD_SIZE=4"),
        ({**PLACE, **MEETING, "WORLD_SIZE": "four"}, "^WORLD_SIZE=four is not a number"),
        ({**PLACE, **MEETING, "MASTER_PORT": "http"}, "^MASTER_PORT=http is not a number"),
        ({**PLACE, **MEETING, "MASTER_PORT": "70000"}, "^MASTER_PORT=70000 is not a port"),
        ({**PLACE, "MASTER_ADDR": "127.0.0.1"}, "^MASTER_ADDR or MASTER_PORT is not set for 4 processes; export both"),
        (SLURM_STEP, "scontrol show hostnames"),
    ],
)
def test_contradictions_are_one_sentence(environment: dict[str, str], sentence: str) -> None:
    """Missing and impossible values are named with the remedy."""
    with pytest.raises(ValueError, match=sentence) as caught:
        complete_environment(environment)
    assert "\n" not in str(caught.value)


def test_mpirun_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedies are its installation, and the two variables."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"4 processes of mpirun \(Open MPI\).*pip install 'ds_fira\[mpi\]'"):
        complete_environment(dict(OPEN_MPI))
