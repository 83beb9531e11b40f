"""A save and a load beside those of `torch.distributed.checkpoint`, of one state, on ranks over gloo.

    python -m benchmarks.speed.checkpoints [--ranks 1 2 4] [--stage 2] [--millions 16] [--json FILE]

Both save and load in turn, so that a busy machine slows both alike; seconds are medians of the slowest rank, processor
seconds those of the thread that calls, which other programs do not lengthen by taking turns. A copy of as many bytes as
a rank's save from behind copies is the least that its call can take. Bytes and
memory are what the kernel counts of each process, read from another one: bytes read of files (`rchar`; what comes from
other ranks is not in it), bytes written to the disk's cache (`write_bytes`; none on a tmpfs), the highest resident
memory above what it was before. torch's checkpoint gets each rank's share and no more: an even part of the module's
weights, its master weights and states. It computes no sums, and after a load each rank lacks the other ranks' weights;
ours verifies every byte, and the module is whole.

The save is one from behind, beside that of torch: how long the call takes, and how long until the checkpoint is there.
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
from ds_fira.engine.deepspeed.save_load.behind import Behind
from ds_fira.engine.deepspeed.save_load.written import stepped_params
from ds_fira.optim.registry import fira_of

SIDES = (1024, 2048)
RANK = 128
NAMES = ("save", "copy", "torch_save", "torch_async_save", "load", "torch_load")  # the copy knows the bytes of a save
_REST = 0.2  # seconds before each, or what follows on a busy machine would pay for what went before


class Matrices(nn.Module):
    """Matrices enough for so many million parameters; the loss touches each."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        count = max(1, round(millions * 1e6 / (SIDES[0] * SIDES[1])))
        self.layers = nn.ModuleList(nn.Linear(SIDES[0], SIDES[1], bias=False) for _ in range(count))

    def forward(self, tokens: Tensor) -> Tensor:
        return sum(layer(tokens).square().mean() for layer in self.layers)


# Seconds, and processor seconds of the thread that calls.
Taken = tuple[float, float]


def _taken(call: Callable[[], object]) -> Taken:
    start, spent = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - start, time.thread_time() - spent


class Rank:
    """What one process measures."""

    def __init__(self, stage: int, millions: int, folder: Path) -> None:
        params = {"rank": RANK, "lr": 0.001, "subspace": "randomized", "async_save": True, "keep_last": 1}
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
        self.piece: Tensor | None = None
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

    def copy(self) -> Taken:
        """What the system copies in one piece, as many bytes as a save from behind copies of this rank."""
        if self.piece is None:
            self.piece = torch.ones(Behind.of(self.engine).copies.nbytes, dtype=torch.uint8)
            self.target = self.piece.clone()
        return _taken(lambda: self.target.copy_(self.piece))

    def save(self) -> Taken:
        """Ours, until the checkpoint is there; returns what the call took."""
        self.number += 1
        tag = f"ours{self.number}"
        stall = _taken(lambda: self.engine.save_checkpoint(str(self.folder), tag))
        Behind.of(self.engine).wait(self.engine, "the benchmark")
        return stall

    def load(self) -> Taken:
        """Ours, of the last save."""
        return _taken(lambda: self.engine.load_checkpoint(str(self.folder)))

    def torch_save(self) -> Taken:
        """That of torch, of the same state."""
        return _taken(lambda: dcp.save(self.state, checkpoint_id=self.folder / "torch"))

    def torch_async_save(self) -> Taken:
        """That of torch from behind, until the checkpoint is there; returns what the call took."""
        futures: list[Any] = []
        stall = _taken(lambda: futures.append(dcp.async_save(self.state, checkpoint_id=self.folder / "torch")))
        futures[0].result()
        return stall

    def torch_load(self) -> Taken:
        """That of torch, of the last save."""
        return _taken(lambda: dcp.load(self.state, checkpoint_id=self.folder / "torch"))

    def share(self) -> Taken:
        """The bytes of what this rank's state is."""
        return float(sum(value.nbytes for value in self.state[f"rank{self.rank}"].values())), 0.0


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
            "stall": max(wall for (wall, _), _ in answers),
            "processor": max(spent for (_, spent), _ in answers),
            "seconds": max(taken for _, taken in answers),
            "values": [value for (value, _), _ in answers],
            "read": [now["read"] - then["read"] for then, now in pairs],
            "written": [now["written"] - then["written"] for then, now in pairs],
            "peak": [max(0, now["peak"] - then["now"]) for then, now in pairs],
        }

    taken: dict[str, list[dict[str, Any]]] = {}
    share = call("share")["values"]
    for _ in range(repeats + 1):
        for name in NAMES:
            time.sleep(_REST)
            taken.setdefault(name, []).append(call(name))
    for connection in connections:
        connection.send(None)
    for process in processes:
        process.join(30)
    # The first turn makes folders and buffers that later ones find.
    turns = {name: found[1:] for name, found in taken.items()}
    return {"share": share, **{name: _middle(found) for name, found in turns.items()}, "ratios": ratios(turns, share)}


def _middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the turns, and the least; of bytes and memory those of the rank that has most."""
    times = ("stall", "processor", "seconds")
    return {
        **{key: statistics.median(turn[key] for turn in found) for key in times},
        **{f"least {key}": min(turn[key] for turn in found) for key in times},
        **{key: statistics.median(max(turn[key]) for turn in found) for key in ("read", "written", "peak")},
    }


def ratios(turns: dict[str, list[dict[str, Any]]], share: list[float]) -> dict[str, float]:
    """Ours over a copy and over torch's, medians of the pairs of a turn and the least; bytes over the largest share."""
    result: dict[str, float] = {}
    for ours, theirs, keys in (
        ("save", "copy", ("stall", "processor")),
        ("save", "torch_async_save", ("stall", "seconds")),
        ("load", "torch_load", ("seconds", "processor")),
    ):
        for key in keys:
            found = [ours_[key] / theirs_[key] for ours_, theirs_ in zip(turns[ours], turns[theirs], strict=True)]
            result[f"{ours} {key} of {theirs}"] = statistics.median(found)
            result[f"{ours} {key} of {theirs}, least"] = min(found)
    for name, key in (("save", "written"), ("save", "peak"), ("load", "read"), ("load", "peak")):
        result[f"{name} {key} of share"] = _middle(turns[name])[key] / max(share)
    return result


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
        results[str(ranks)] = figures
        size = max(figures["share"]) / 1e6
        print(f"{ranks} ranks, stage {args.stage}, {args.millions} M parameters, {size:.1f} MB a rank")
        for name in NAMES:
            row = figures[name]
            megabytes = ", ".join(f"{key} {row[key] / 1e6:8.1f} MB" for key in ("read", "written", "peak"))
            times = f"call {row['stall']:7.3f} s ({row['processor']:.3f} of the processor), all {row['seconds']:7.3f} s"
            print(f"  {name:<16} {times}, {megabytes}")
        told = ", ".join(f"{key} {value:.2f}" for key, value in figures["ratios"].items())
        print(f"  ratios: {told}", flush=True)
    save(args.json, torch.device("cpu"), stage=args.stage, millions=args.millions, ranks=results)


if __name__ == "__main__":
    main()
