"""A low-rank step over a slow link: round trips one behind the other, and its time, in processes over gloo.

    python -m benchmarks.communication.delayed [--ranks 3] [--delay 20] [--repeats 20] [--before FOLDER] [--json FILE]

Every collective ends `--delay` milliseconds after the last rank has started it, as on a link of that latency and of any
bandwidth. Several that are under way at the same time do not wait for each other; one that is waited for at once costs
the whole delay. The delay is made here, around `torch.distributed`: a thread starts each collective so much later than
it was asked to.

For stages 2 and 3 (matrices cut in rows; every matrix cut over all ranks, with no state held twice), with all matrices
of a group in one turn and with a few a turn, it prints the collectives of a step between two refreshes, those of them
that lie one behind the other, and the time of such a step on its slowest rank, with the delay and without: the quickest
of some steps, since what else the machine does is in all others, and the median.

`--before` is the folder of another version of the repository, which needs not have this script: both are measured in
turn, so that what else the machine does is unfair to neither, and the table says what share of its time is left.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import save

# (name, evenly sharded, settings, elements of a turn). Matrices of all kinds, so small that the time is the link's.
SHAPES = [(24, 24), (24, 24), (64, 24), (24, 64)]
ONE_TURN, ONE_EACH = 2**24, 1
CASES = [
    ("stage 2, one turn", False, {}, ONE_TURN),
    ("stage 3, one turn", True, {}, ONE_TURN),
    ("stage 2, four turns", False, {}, ONE_EACH),
    ("stage 3, four turns", True, {}, ONE_EACH),
    ("stage 2, normalized", False, {"residual": "normalized"}, ONE_TURN),
    ("stage 3, normalized", True, {"residual": "normalized"}, ONE_TURN),
]
GIVEN = {"lr": 0.01, "rank": 8, "update_proj_gap": 10**6}
COUNTS = ("collectives", "round_trips")
TIMES = ("slow", "plain")


class Delayed:
    """A collective that has been asked for: starts a delay later, and tells what time it has taken to get there."""

    def __init__(self, link: Link, start: Callable[[], dist.Work]) -> None:
        self._link, self._start = link, start
        self._due, self._round = time.perf_counter() + link.delay, link.round_trips + 1
        self._begun = threading.Event()
        self._work: dist.Work | None = None

    def begin(self) -> None:
        """Start it as soon as its time has come; in the link's thread, in the order in which it was asked for."""
        time.sleep(max(0.0, self._due - time.perf_counter()))
        self._work = self._start()
        self._begun.set()

    def wait(self) -> None:
        """Until it has ended; the round trip is one behind those that were waited for before it was asked for."""
        self._begun.wait()
        self._work.wait()
        self._link.round_trips = max(self._link.round_trips, self._round)


class Link:
    """Takes the place of the collectives of `torch.distributed`.

    Attributes:
        delay: seconds.
        collectives: asked for.
        round_trips: of them, those one behind the other.
    """

    def __init__(self) -> None:
        self.delay, self.collectives, self.round_trips = 0.0, 0, 0
        self._queue: queue.SimpleQueue[Delayed] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()
        for name in ("all_reduce", "all_to_all_single"):
            setattr(dist, name, self._delayed(getattr(dist, name)))

    def _serve(self) -> None:
        while True:
            self._queue.get().begin()

    def _delayed(self, collective: Callable[..., dist.Work | None]) -> Callable[..., Delayed | None]:
        def ask(*args: Any, async_op: bool = False, **kwargs: Any) -> Delayed | None:
            self.collectives += 1
            asked = Delayed(self, lambda: collective(*args, async_op=True, **kwargs))
            self._queue.put(asked)
            return asked if async_op else asked.wait()

        return ask


def plan(ranks: int, _: str, evenly_sharded: bool, changed: dict[str, Any], numel: int) -> tuple[Any, Any]:
    """The layout of one of `CASES` and its settings; sets the elements of a turn for what is made of them next."""
    from ds_fira.core.settings import GroupSettings
    from ds_fira.sharding.geometry import matrices_of, split
    from ds_fira.sharding.lowrank import step
    from ds_fira.sharding.plan import plan_groups

    step.MAX_STEP_NUMEL = numel
    fragments, size = [], 0
    for index, shape in enumerate(SHAPES):
        own = -(-math.prod(shape) // ranks)
        parts = split(matrices_of(f"w{index}", shape, 0)[0], own, ranks)
        fragments.append({holder: replace(part, offset=part.offset + size) for holder, part in parts.items()})
        size += own
    settings = GroupSettings(**{**GIVEN, **changed})
    (layout,) = plan_groups([(fragments, size)], ranks, [settings], evenly_sharded)
    return layout, settings


def _measure(rank: int, ranks: int, port: int, delay: float, repeats: int, answers: Any) -> None:
    """One process: puts, for every case, what `measure` returns, of this rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)  # the link's thread is not to wait for the one that computes
    from ds_fira.core.algorithms import FIRA_ADAM
    from ds_fira.observe.metrics import StepMetrics
    from ds_fira.sharding.comm import Communicator
    from ds_fira.sharding.lowrank.step import LowRankMatrices
    from ds_fira.sharding.refresher import Refresher

    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    link, rows = Link(), []
    for case in CASES:
        name, (layout, settings) = case[0], plan(ranks, *case)
        matrices = LowRankMatrices(
            layout.low_rank, Communicator(), {matrix.name: index for index, matrix in enumerate(layout.split)}
        )
        size = layout.partition_size
        param = torch.nn.Parameter(torch.randn(size))
        param.grad = torch.randn(size)
        state, refresher = matrices.allocate(param, settings, FIRA_ADAM), Refresher(StepMetrics(), "FiraAdam")

        def make(of: Any = matrices, with_: Any = (param, state, settings, 1e-4, refresher, FIRA_ADAM)) -> float:
            dist.barrier()
            start = time.perf_counter()
            with torch.no_grad():
                of.step(*with_)
            return time.perf_counter() - start

        link.delay = 0.0
        for _ in range(2):  # the refresh, and whatever the first step is slow for
            make()
        before = (link.collectives, link.round_trips)
        plain = [make()]
        counted = (link.collectives - before[0], link.round_trips - before[1])
        plain += [make() for _ in range(repeats - 1)]
        link.delay = delay
        slow = [make() for _ in range(repeats)]
        rows.append({"case": name, "counted": counted, "plain": plain, "slow": slow, "low_rank": len(layout.low_rank)})
    answers.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, delay: float, repeats: int) -> list[dict[str, Any]]:
    """Make steps in real processes over a link of some latency.

    Args:
        ranks: processes.
        delay: seconds from the start of a collective to its end.
        repeats: steps measured with the delay, and as many without.

    Returns:
        For every case `case`, `matrices`, `collectives` and `round_trips` of a step, `ms` of the quickest and
        `median_ms`, and `ms_without_delay` of the quickest.

    Raises:
        RuntimeError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=_measure, args=(rank, ranks, port, delay, repeats, answers)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    by_rank = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"the processes ended with {[p.exitcode for p in processes]}; see their output above.")
    rows = []
    for found in zip(*by_rank, strict=True):
        counts = {row["counted"] for row in found}
        if len(counts) != 1:
            raise RuntimeError(f"{found[0]['case']}: ranks made different collectives: {counts}")
        collectives, round_trips = counts.pop()
        # A step ends when its last rank has ended.
        slow, plain = ([1e3 * max(step) for step in zip(*(r[key] for r in found), strict=True)] for key in TIMES)
        rows.append(
            {
                "case": found[0]["case"],
                "matrices": found[0]["low_rank"],
                "collectives": collectives,
                "round_trips": round_trips,
                "ms": min(slow),
                "median_ms": statistics.median(slow),
                "ms_without_delay": min(plain),
            }
        )
    return rows


def measure_folder(folder: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What `measure` returns of the version in another folder."""
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "found.json"
        options = [f"--{name}={getattr(args, name)}" for name in ("ranks", "delay", "repeats")]
        command = [sys.executable, __file__, *options, f"--json={found}"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": folder}, stdout=subprocess.DEVNULL)
        return json.loads(found.read_text())["rows"]


def quickest(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of the runs' quickest steps, with the median of their medians."""
    rows = []
    for same in zip(*runs, strict=True):
        times = {key: min(row[key] for row in same) for key in ("ms", "ms_without_delay")}
        rows.append({**same[0], **times, "median_ms": statistics.median(row["median_ms"] for row in same)})
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="how often each of two versions is started")
    parser.add_argument("--before", help="folder of another version, to compare with")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    own, others = [], []
    for _ in range(args.rounds if args.before else 1):
        own.append(measure(args.ranks, 1e-3 * args.delay, args.repeats))
        if args.before:
            others.append(measure_folder(args.before, args))
    rows = quickest(own)
    earlier = {row["case"]: row for row in quickest(others)} if others else {}
    print("case                  collectives  round trips    ms  median  undelayed | before: round trips    ms   share")
    for row in rows:
        text = f"{row['case']:22}{row['collectives']:>11}{row['round_trips']:>13}{row['ms']:>6.0f}"
        text += f"{row['median_ms']:>8.0f}{row['ms_without_delay']:>11.0f} |"
        before = earlier.get(row["case"])
        if before is not None:
            row["before"] = {key: before[key] for key in (*COUNTS, "ms", "median_ms", "ms_without_delay")}
            row["share"] = row["ms"] / before["ms"]
            text += f"{before['round_trips']:>20}{before['ms']:>6.0f}{row['share']:>8.2f}"
        print(text)
    save(args.json, torch.device("cpu"), ranks=args.ranks, delay_ms=args.delay, rows=rows)


if __name__ == "__main__":
    main()
