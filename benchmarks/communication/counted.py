"""What FiraAdam sends for matrices that partition boundaries split: planned for LLaMAs, or counted in real processes.

    python -m benchmarks.communication.counted [--stage 2] [--ranks 3 6 16 64] [--json FILE]
    python -m benchmarks.communication.counted --measure

The table has, for every model and number of data-parallel ranks, the split matrices and MB (10^6 bytes, float32) sent
over all ranks: per step if all of them are gathered, per step if all exchange low-rank data, per step in the way
chosen for each, and at a refresh on top; the first three with a refresh spread over 200 steps. Then the most
that one rank sends in a step and at a refresh, and for scale what ZeRO itself sends in a step, if gradients are
reduced and parameters gathered (at stage 3 for the forward and for the backward pass) in bfloat16 around a ring. The
last column is the largest rank's state over an even share.

`--measure` starts 1, 2 and 4 processes over gloo, trains a LLaMA of toy size at ZeRO-2 and ZeRO-3 and prints the bytes
that the optimizer's collectives were handed, over all ranks.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import socket
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import save
from benchmarks.communication.layout import BYTES
from benchmarks.communication.partition import meta_llama
from ds_fira.core.settings import GroupSettings
from ds_fira.optim.state_size import adamw_bytes
from ds_fira.sharding.lowrank.answer_form import low_rank_elements
from ds_fira.tools.dry_run import plan_run

# By stage (model, rank), and ranks.
MODELS = {
    2: (("1b", 512), ("7b", 1024), ("7b", 256)),
    3: (("60m", 128), ("1b", 512), ("7b", 1024), ("7b", 256)),
}
RANKS = {2: (3, 6, 16, 64), 3: (2, 4, 8, 64)}
MEGABYTE = 10**6
BF16 = 2
# Of the toy model: a refresh at the first step and at the last.
GAP = 4
# (stage, layers of the toy model, exact_cuts): at stage 2 4 layers divide by 1, 2 and 4 ranks, 3 do not.
CASES = ((2, 4, False), (2, 3, False), (2, 3, True), (3, 3, False), (3, 3, True))


@dataclass(frozen=True)
class Traffic:
    """Bytes that split matrices cost one model on a number of ranks.

    Attributes:
        model: key of `benchmarks.communication.partition.LLAMAS`.
        rank: of the projected matrices.
        ranks: data-parallel ranks.
        cut: matrices that partition boundaries split.
        low_rank: those for which the low-rank way is chosen.
        gathered_step: per step over all ranks, the gathered way for all.
        low_rank_step: the low-rank way for all, refreshes divided by the steps between them.
        chosen_step: the way chosen for each, likewise.
        refresh: of one refresh of the matrices stepped the low-rank way.
        largest_step: most that one rank sends in a step without a refresh, as chosen.
        largest_refresh: most that one rank sends for a refresh, on top.
        zero_step: ZeRO's own gradients and parameters per step over all ranks.
        imbalance: the largest rank's state over an even share.
    """

    model: str
    rank: int
    ranks: int
    cut: int
    low_rank: int
    gathered_step: float
    low_rank_step: float
    chosen_step: float
    refresh: int
    largest_step: int
    largest_refresh: int
    zero_step: int
    imbalance: float


def plan_traffic(model: str, rank: int, ranks: int, stage: int = 2) -> Traffic:
    """Count what the plan of a LLaMA sends."""
    run = plan_run(meta_llama(model), ranks, zero_stage=stage, rank=rank)
    held = [sum(group.state_elements(index) for group in run.groups) for index in range(ranks)]
    gathered_step = low_rank_step = chosen_step = 0.0
    refresh, step = [0] * ranks, [0] * ranks
    split = [
        (matrix, GroupSettings.of(group.settings))
        for group in run.groups
        if group.layout is not None
        for matrix in group.layout.split
    ]
    for matrix, settings in split:
        gathered = [matrix.gathered_elements(index) for index in range(ranks)]
        low_rank = [low_rank_elements(matrix, index, settings) for index in range(ranks)]
        renewed = [matrix.refresh_elements(index, settings) for index in range(ranks)]
        with_refresh = sum(low_rank) + sum(renewed) / settings.update_proj_gap
        gathered_step += sum(gathered)
        low_rank_step += with_refresh
        chosen_step += with_refresh if matrix.way == "low_rank" else sum(gathered)
        chosen = low_rank if matrix.way == "low_rank" else gathered
        step = [a + b for a, b in zip(step, chosen, strict=True)]
        if matrix.way == "low_rank":
            refresh = [a + b for a, b in zip(refresh, renewed, strict=True)]
    parameters = adamw_bytes(run.records, 1) // 2
    return Traffic(
        model=model,
        rank=rank,
        ranks=ranks,
        cut=len(split),
        low_rank=sum(matrix.way == "low_rank" for matrix, _ in split),
        gathered_step=BYTES * gathered_step,
        low_rank_step=BYTES * low_rank_step,
        chosen_step=BYTES * chosen_step,
        refresh=BYTES * sum(refresh),
        largest_step=BYTES * max(step),
        largest_refresh=BYTES * max(refresh),
        zero_step=stage * BF16 * parameters * (ranks - 1),
        imbalance=max(held) * ranks / sum(held),
    )


def print_traffic(rows: list[Traffic], stage: int) -> None:
    """Print the table; MB."""
    print(
        "model  rank  ranks split  low | gathered    low-rank     chosen |   refresh | rank: step   refresh |"
        f"   ZeRO-{stage} | imbalance"
    )
    for row in rows:
        figures = (row.gathered_step, row.low_rank_step, row.chosen_step)
        figures += (row.refresh, row.largest_step, row.largest_refresh)
        gathered, low_rank, chosen, refresh, step, largest = (f"{value / MEGABYTE:.1f}" for value in figures)
        print(
            f"{row.model:5}{row.rank:>6}{row.ranks:>7}{row.cut:>5}{row.low_rank:>6} |"
            f"{gathered:>11}{low_rank:>11}{chosen:>11} |"
            f"{refresh:>10} |{step:>11}{largest:>10} |{row.zero_step / MEGABYTE:>9.0f} |{row.imbalance:>10.3f}"
        )


def _train(rank: int, world_size: int, port: int, answers: Any) -> None:
    """One process of a measurement: puts, for every case, the split matrices and the bytes sent up to every step."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import deepspeed

    import ds_fira
    from ds_fira.optim.registry import fira_of

    ds_fira.init_distributed()
    found = []
    for stage, layers, exact in CASES:
        torch.manual_seed(0)
        shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers))
        params = {"lr": 0.01, "rank": 8, "update_proj_gap": GAP, "exact_cuts": exact}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "FiraAdam", "params": params},
            "zero_optimization": {"stage": stage},
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        optimizer = fira_of(engine)
        sent = [optimizer.communicator.bytes_sent]
        for _ in range(GAP + 1):
            tokens = torch.randint(0, 100, (1, 16))
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
            sent.append(optimizer.communicator.bytes_sent)
        found.append((sum(len(layout.split) for layout in optimizer.layouts), sent))
        del optimizer
        engine.destroy()
    answers.put(found)
    ds_fira.shutdown()


def measure(world_size: int) -> list[dict[str, Any]]:
    """Train toy LLaMAs in real processes.

    Args:
        world_size: how many.

    Returns:
        For every case of `CASES`, `stage`, `ranks`, `layers`, `exact_cuts`, `cut` (split matrices), and the bytes that
        all ranks together sent in a step without a refresh (`step`) and for a refresh (`refresh`).

    Raises:
        RuntimeError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = context.SimpleQueue()
    processes = [context.Process(target=_train, args=(rank, world_size, port, answers)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"the processes ended with {codes}; see their output above.")
    by_rank = [answers.get() for _ in processes]
    rows = []
    for case, (stage, layers, exact) in enumerate(CASES):
        totals = [sum(found[case][1][step] for found in by_rank) for step in range(GAP + 2)]
        steps = [after - before for before, after in itertools.pairwise(totals)]
        row = {"stage": stage, "ranks": world_size, "layers": layers, "exact_cuts": exact, "cut": by_rank[0][case][0]}
        rows.append({**row, "step": steps[1], "refresh": steps[-1] - steps[1]})
    return rows


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, choices=(2, 3), help="of ZeRO")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--measure", action="store_true", help="count in real processes instead of planning")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    if args.measure:
        rows = [row for ranks in (1, 2, 4) for row in measure(ranks)]
        print("stage  layers  ranks  exact_cuts  cut  bytes/step  bytes/refresh")
        for row in rows:
            print(
                f"{row['stage']:>5}{row['layers']:>8}{row['ranks']:>7}{row['exact_cuts']!s:>12}{row['cut']:>5}{row['step']:>12}"
                f"{row['refresh']:>15}"
            )
    else:
        traffic = [
            plan_traffic(model, rank, ranks, args.stage)
            for model, rank in MODELS[args.stage]
            for ranks in args.ranks or RANKS[args.stage]
        ]
        print_traffic(traffic, args.stage)
        rows = [asdict(row) for row in traffic]
    save(args.json, torch.device("cpu"), rows=rows)


if __name__ == "__main__":
    main()
