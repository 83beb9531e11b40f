"""What the ranks of a test pool run for others to count, from outside, the bytes that they read of a checkpoint."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_fira.checkpoint.byte_ranges import FileRange
from ds_fira.checkpoint.shared_read import Listed, SharedRead
from ds_fira.sharding.comm import Communicator
from tests.distributed.probes import stepped_and_states
from tests.distributed.resize_jobs import advance, module_weights
from tests.distributed.zero_jobs import build, config
from tests.ranks import Pools

# Large beside pickles and directories, which every rank gets to know.
SHAPES = [(512, 384)] * 6 + [(384, 768), (96, 640)]
SETTINGS = {"rank": 64, "update_proj_gap": 3, "lr": 0.01}
_kept: dict[str, Any] = {}


def save(folder: str, stage: int, dtype: str, **extra: Any) -> None:
    """Train two steps and save."""
    engine = build(config(stage, dtype, SETTINGS, train_micro_batch_size_per_gpu=_rows(), **extra), SHAPES)
    advance(engine, 0, 2)
    engine.save_checkpoint(folder, client_state={"note": torch.arange(9)})
    engine.destroy()


def prepare(stage: int, dtype: str, **extra: Any) -> None:
    """Build the engine that is to load, with other weights."""
    settings = config(stage, dtype, SETTINGS, train_micro_batch_size_per_gpu=_rows(), **extra)
    _kept["engine"] = build(settings, SHAPES, seed=7)
    torch.distributed.barrier()


def load(folder: str, **options: Any) -> None:
    """Load, and nothing else."""
    path, client_state = _kept["engine"].load_checkpoint(folder, **options)
    assert path is not None
    assert client_state["note"].tolist() == list(range(9))


def finish(last: int = 2) -> dict[str, Any]:
    """Go on to a step; the losses, the module's weights, and this rank's masters and states."""
    engine = _kept.pop("engine")
    held: list[Tensor] = [tensor.clone() for tensor in stepped_and_states(engine)]
    result = {"losses": advance(engine, 2, last), "weights": module_weights(engine), "held": held}
    engine.destroy()
    return result


def exchange(folder: str, sizes: list[int], seed: int) -> list[str]:
    """Read files of random bytes together, and let each rank have random ranges of them; what was wrong."""
    communicator, path = Communicator(), Path(folder)
    contents = {f"{number}.bin": random.Random(seed + number).randbytes(size) for number, size in enumerate(sizes)}
    if communicator.dp_rank == 0:
        for name, content in contents.items():
            (path / name).write_bytes(content)
    torch.distributed.barrier()
    files = {name: Listed(len(content), zlib.crc32(content), kept=True) for name, content in contents.items()}
    files["0.bin"] = replace(files["0.bin"], rank=communicator.dp_size - 1)
    reading, wrong = SharedRead(path, files, communicator), []
    if reading.read() is not None or reading.find_damage(communicator.gather_objects(reading.sums)) is not None:
        wrong.append("what was read")

    def drawn(chance: random.Random) -> list[FileRange]:
        pairs = [(name, sorted(chance.choices(range(len(content) + 1), k=2))) for name, content in contents.items()]
        return [FileRange(name, *pair) for name, pair in pairs * 3]

    def compare(ranges: list[FileRange], what: str) -> None:
        for name, start, stop in ranges:
            if bytes(reading.images[name].view(start, stop)) != contents[name][start:stop]:
                wrong.append(f"{what} {name} {start} {stop}")

    same, own = drawn(random.Random(seed)), drawn(random.Random(f"{seed} {communicator.dp_rank}"))
    reading.spread(same)
    compare(same, "spread")
    reading.deliver(own if communicator.dp_rank else [])
    compare(own if communicator.dp_rank else [], "delivered")
    files["1.bin"] = replace(files["1.bin"], crc32=files["1.bin"].crc32 ^ 1)
    again = SharedRead(path, files, communicator)
    again.read()
    damage = again.find_damage(communicator.gather_objects(again.sums))
    if damage != "the content of its file 1.bin has changed":
        wrong.append("a changed file")
    return wrong


def _rows() -> int:
    return 12 // torch.distributed.get_world_size()


def bytes_read(ranks: Pools, size: int) -> list[int]:
    """What every process of a pool has read of files so far, as the kernel counts it; what networks bring is not."""
    counts = []
    for process in ranks.processes(size):
        lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
        counts.append(next(int(line.split()[1]) for line in lines if line.startswith("rchar")))
    return counts
