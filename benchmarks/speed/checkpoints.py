"""A save and a load beside those of `torch.distributed.checkpoint`, of one state, on ranks over gloo.

    python -m benchmarks.speed.checkpoints [--ranks 1 2 4] [--stage 2] [--millions 16] [--json FILE]

Both save and load in turn, so that a busy machine slows both alike; seconds are medians of the slowest rank. Bytes and
memory are what the kernel counts of each process, read from another one: bytes read of files (`rchar`; what comes from
other ranks is not in it), bytes written to the disk's cache (`write_bytes`; none on a tmpfs), the highest resident
memory above what it was before. torch's checkpoint gets each rank's share and no more: an even part of the module's
weights, its master weights and states. It computes no sums, and after a load each rank lacks the other ranks' weights;
ours verifies every byte, and the module is whole.

Where the installed version has `async_save`, a save from behind is beside that of torch: how long the call takes, and
how long until the checkpoint is there.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import ds_fira
from benchmarks.common import save
from ds_fira.engine.deepspeed.save_load.written import stepped_params
from ds_fira.optim.registry import fira_of
from ds_fira.optim.settings import legal_settings

SIDES = (1024, 2048)
RANK = 128
ASYNC = "async_save"


class Matrices(nn.Module):
    """Matrices enough for so many million parameters; the loss touches each."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        count = max(1, round(millions * 1e6 / (SIDES[0] * SIDES[1])))
        self.layers = nn.ModuleList(nn.Linear(SIDES[0], SIDES[1], bias=False) for _ in range(count))

    def forward(self, tokens: Tensor) -> Tensor:
        return sum(layer(tokens).square().mean() for layer in self.layers)


class Rank:
    """What one process measures."""

    def __init__(self, stage: int, millions: int, folder: Path) -> None:
        params: dict[str, Any] = {"rank": RANK, "lr": 0.001, "subspace": "randomized"}
        if ASYNC in legal_settings():
            params[ASYNC] = True
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "FiraAdam", "params": params},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
        }
        model = Matrices(millions).bfloat16()
        self.engine = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]
        self.engine.backward(self.engine(torch.ones(1, SIDES[0], dtype=torch.bfloat16)))
        self.engine.step()
        self.folder, self.rank, self.number = folder, torch.distributed.get_rank(), 0
        self.state = {f"rank{self.rank}": self._own(stage)}

    def _own(self, stage: int) -> dict[str, Tensor]:
        """Copies of this rank's share: its part of the module, its master weights and states."""
        size = torch.distributed.get_world_size()
        weights = [getattr(param, "ds_tensor", param).detach() for param in self.engine.module.parameters()]
        flat = torch.cat([weight.reshape(-1) for weight in weights])
        found = {"module": (flat if stage == 3 else flat.tensor_split(size)[self.rank]).clone()}
        with stepped_params(self.engine):
            optimizer = fira_of(self.engine)
            for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
                found[f"master{number}"] = param.detach().clone()
                found |= {f"{number}.{key}": value.clone() for key, value in optimizer.state[param].items()}
        return found

    def save(self) -> float:
        """Ours, until the checkpoint is there; returns how long the call took."""
        self.number += 1
        tag = f"ours{self.number}"
        start = time.perf_counter()
        self.engine.save_checkpoint(str(self.folder), tag)
        stall = time.perf_counter() - start
        while not (self.folder / "latest").exists() or (self.folder / "latest").read_text() != tag:
            time.sleep(0.005)
        return stall

    def load(self) -> float:
        """Ours, of the last save."""
        start = time.perf_counter()
        self.engine.load_checkpoint(str(self.folder))
        return time.perf_counter() - start

    def torch_save(self) -> float:
        """That of torch, of the same state."""
        start = time.perf_counter()
        dcp.save(self.state, checkpoint_id=self.folder / "torch")
        return time.perf_counter() - start

    def torch_async_save(self) -> float:
        """That of torch from behind, until the checkpoint is there; returns how long the call took."""
        start = time.perf_counter()
        future = dcp.async_save(self.state, checkpoint_id=self.folder / "torch")
        stall = time.perf_counter() - start
        future.result()
        return stall

    def torch_load(self) -> float:
        """That of torch, of the last save."""
        start = time.perf_counter()
        dcp.load(self.state, checkpoint_id=self.folder / "torch")
        return time.perf_counter() - start

    def share(self) -> float:
        """The bytes of what this rank's state is."""
        return float(sum(value.nbytes for value in self.state[f"rank{self.rank}"].values()))


def _serve(rank: int, ranks: int, port: int, connection: Any, stage: int, millions: int, folder: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        ds_fira.init_distributed()
        measured = Rank(stage, millions, folder)
        while (name := connection.recv()) is not None:
            torch.distributed.barrier()
            start = time.perf_counter()
            value = getattr(measured, name)()
            connection.send((value, time.perf_counter() - start))
        measured.engine.destroy()
        ds_fira.shutdown()


def counters(process: int) -> dict[str, int]:
    """What the kernel counts of a process, in bytes."""
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    found = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    memory = {key: 1024 * int(status[name].split()[0]) for key, name in (("now", "VmRSS"), ("peak", "VmHWM"))}
    return {"read": found["rchar"], "written": found["write_bytes"], **memory}


def measure(ranks: int, stage: int, millions: int, repeats: int, folder: Path) -> dict[str, Any]:
    """The figures of one number of ranks, by what was done."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, connections, processes = multiprocessing.get_context("fork"), [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        arguments = (rank, ranks, port, theirs, stage, millions, folder)
        processes.append(context.Process(target=_serve, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        connections.append(ours)

    def call(name: str) -> dict[str, Any]:
        for process in processes:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the highest memory from now on
        before = [counters(process.pid) for process in processes]
        for connection in connections:
            connection.send(name)
        answers = [connection.recv() for connection in connections]
        after = [counters(process.pid) for process in processes]
        pairs = list(zip(before, after, strict=True))
        return {
            "stall": max(value for value, _ in answers),
            "seconds": max(taken for _, taken in answers),
            "values": [value for value, _ in answers],
            "read": [now["read"] - then["read"] for then, now in pairs],
            "written": [now["written"] - then["written"] for then, now in pairs],
            "peak": [max(0, now["peak"] - then["now"]) for then, now in pairs],
        }

    taken: dict[str, list[dict[str, Any]]] = {}
    share = call("share")["values"]
    names = ("save", "torch_save", "torch_async_save", "load", "torch_load")
    for _ in range(repeats + 1):
        for name in names:
            taken.setdefault(name, []).append(call(name))
    for connection in connections:
        connection.send(None)
    for process in processes:
        process.join(30)
    # The first turn makes folders and buffers that later ones find.
    return {"share": share, **{name: _middle(found[1:]) for name, found in taken.items()}}


def _middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the turns; of bytes and memory those of the rank that has most."""
    middle: Callable[[str], float] = lambda key: statistics.median(turn[key] for turn in found)  # noqa: E731
    largest = {key: statistics.median(max(turn[key]) for turn in found) for key in ("read", "written", "peak")}
    return {"stall": middle("stall"), "seconds": middle("seconds"), **largest}


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Ours over torch's; bytes and memory over the largest share too."""
    behind = ASYNC in legal_settings()
    saves = (figures["save"], figures["torch_async_save" if behind else "torch_save"])
    share, loads = max(figures["share"]), (figures["load"], figures["torch_load"])
    result = {f"save {key}": saves[0][key] / saves[1][key] for key in ("stall", "seconds", "written") if saves[1][key]}
    result |= {f"load {key}": loads[0][key] / loads[1][key] for key in ("seconds", "read") if loads[1][key]}
    result |= {f"save {key} of share": saves[0][key] / share for key in ("written", "peak")}
    return result | {f"load {key} of share": loads[0][key] / share for key in ("read", "peak")}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks, one after the other")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3), help="of ZeRO")
    parser.add_argument("--millions", type=int, default=16, help="of parameters")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count; one more goes before them")
    parser.add_argument("--folder", help="for the checkpoints; default a temporary one")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    results = {}
    for ranks in args.ranks:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            figures = measure(ranks, args.stage, args.millions, args.repeats, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        results[str(ranks)] = {**figures, "ratios": ratios(figures)}
        size = max(figures["share"]) / 1e6
        print(f"{ranks} ranks, stage {args.stage}, {args.millions} M parameters, {size:.1f} MB a rank")
        for name in ("save", "torch_save", "torch_async_save", "load", "torch_load"):
            row = figures[name]
            megabytes = ", ".join(f"{key} {row[key] / 1e6:8.1f} MB" for key in ("read", "written", "peak"))
            print(f"  {name:<16} call {row['stall']:7.3f} s, all {row['seconds']:7.3f} s, {megabytes}")
        told = ", ".join(f"{key} {value:.2f}" for key, value in results[str(ranks)]["ratios"].items())
        print(f"  ours over torch's: {told}", flush=True)
    asynchronous = ASYNC in legal_settings()
    save(
        args.json,
        torch.device("cpu"),
        stage=args.stage,
        millions=args.millions,
        asynchronous=asynchronous,
        ranks=results,
    )


if __name__ == "__main__":
    main()
