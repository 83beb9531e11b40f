"""What a load and a save of large models should take: the bytes of each rank, over rates that are assumed.

    python -m benchmarks.speed.checkpoint_model [--ranks 64 512] [--rank 1024] [--stage 2] [--storage 100] [--node 10]

Bytes come from the shapes of LLaMA 7B and LLaMA-2 70B: module weights in bfloat16, master weights in float32, low-rank
states of matrices and Adam's moments of the rest in float32, divided evenly. `python -m benchmarks.speed.checkpoints`
counts on small models what a rank really reads and writes beside these, which `--overhead` multiplies. The rates are
guesses: of the whole file system, of the network of a node, and of one process that computes CRC-32. Nothing here was
measured on such machines.

`before` is a version that has every rank read the whole module twice, and its part of the files once more for the sums.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

WEIGHT, MASTER = 2, 4  # bytes of an element


class Model(NamedTuple):
    """The sizes of a LLaMA: of the hidden state, keys and values, the feed-forward part; layers and vocabulary."""

    hidden: int
    keys: int
    inner: int
    layers: int
    vocabulary: int

    def matrices(self) -> list[tuple[int, int, int]]:
        """Projected matrices: how many, rows, columns."""
        hidden, inner = self.hidden, self.inner
        in_layer = [(2, hidden, hidden), (2, self.keys, hidden), (2, inner, hidden), (1, hidden, inner)]
        return [(count * self.layers, rows, columns) for count, rows, columns in in_layer]

    def parameters(self) -> int:
        """All elements."""
        others = self.hidden * (2 * self.vocabulary + 2 * self.layers + 1)
        return others + sum(count * rows * columns for count, rows, columns in self.matrices())

    def states(self, rank: int) -> int:
        """Bytes of the optimizer's states: P and two moments of R by matrix, two moments of the rest."""
        low_rank = sum(
            count * min(rank, rows, columns) * (min(rows, columns) + 2 * max(rows, columns))
            for count, rows, columns in self.matrices()
        )
        rest = self.parameters() - sum(count * rows * columns for count, rows, columns in self.matrices())
        return 4 * (low_rank + 2 * rest)


MODELS = {"7b": Model(4096, 4096, 11008, 32, 32000), "70b": Model(8192, 1024, 28672, 80, 32000)}


class Bytes(NamedTuple):
    """What a rank reads in a load, now and before; what it writes, what it gets from other ranks, what all hold."""

    read: float
    read_before: float
    written: float
    received: float
    whole: float


def bytes_of(model: Model, ranks: int, rank: int, stage: int, overhead: float = 1.0) -> Bytes:
    """The bytes of a rank, of an even share."""
    module, own = WEIGHT * model.parameters(), MASTER * model.parameters() + model.states(rank)
    share = (module + own) / ranks
    before = share + (2 * module if stage < 3 else module / ranks) + own / ranks
    received = module * (1 - 1 / ranks) if stage < 3 else 0.0
    return Bytes(overhead * share, before, overhead * share, received, module + own)


def seconds(counted: float, ranks: int, node: int, storage: float, network: float, crc: float) -> float:
    """How long ranks need for as many bytes each: the slowest of the file system, a node's network, the sum.

    Args:
        counted: bytes of a rank.
        ranks: in all.
        node: ranks of a node.
        storage: GB/s of the file system, all nodes together.
        network: GB/s of a node.
        crc: GB/s of a process.
    """
    return max(counted * ranks / storage, counted * min(node, ranks) / network, counted / crc) / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rank", type=int, default=1024, help="of the projection")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3), help="of ZeRO")
    parser.add_argument("--node", type=int, default=8, help="ranks of a node")
    parser.add_argument("--storage", type=float, default=100.0, help="GB/s of the file system, assumed")
    parser.add_argument("--network", type=float, default=10.0, help="GB/s between a node and the storage, assumed")
    parser.add_argument("--links", type=float, default=50.0, help="GB/s between nodes, for each, assumed")
    parser.add_argument("--crc", type=float, default=1.6, help="GB/s of CRC-32 in a process, assumed")
    parser.add_argument("--overhead", type=float, default=1.01, help="bytes read over the share, as counted")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    rates = (args.node, args.storage, args.network, args.crc)
    rows = []
    for name, model in MODELS.items():
        for ranks in args.ranks:
            found = bytes_of(model, ranks, args.rank, args.stage, args.overhead)
            times = {
                "load": seconds(found.read, ranks, *rates) + found.received / args.links / 1e9,
                "load before": seconds(found.read_before, ranks, *rates),
                "save": seconds(found.written, ranks, *rates),
            }
            rows.append({"model": name, "ranks": ranks, **found._asdict(), **times})
            print(
                f"{name} on {ranks} ranks, stage {args.stage}: a rank reads {found.read / 1e9:.2f} GB (before "
                f"{found.read_before / 1e9:.2f}), all {found.read * ranks / 1e9:,.0f} (before "
                f"{found.read_before * ranks / 1e9:,.0f}); load {times['load']:.1f} s (before "
                f"{times['load before']:.1f}), save {times['save']:.1f} s"
            )
    if args.json:
        assumed = {key: getattr(args, key) for key in ("rank", "stage", "node", "storage", "network", "links", "crc")}
        Path(args.json).write_text(json.dumps({"assumed": assumed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
