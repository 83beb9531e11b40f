"""How FiraAdam's states spread over ZeRO's ranks for the paper's LLaMA models: planned, no processes needed.

    python -m benchmarks.communication.layout [--ranks 2 4 8] [--json FILE]

Prints, for every model and number of ranks: matrices cut by partition boundaries, bytes of state on the largest rank
and all ranks together, the ratio of the largest rank to an even share, and the share of AdamW's states. Builds the
transformers model on the meta device and plans with the code that the engine runs.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

import torch

from benchmarks.common import save
from benchmarks.communication.partition import LLAMAS, plan_llama_run
from ds_fira.optim.state_size import adamw_bytes, formula_bytes

BYTES = 4  # states are float32


@dataclass(frozen=True)
class Plan:
    """The states of one model over a number of ranks, in bytes.

    Attributes:
        model: key of `LLAMAS`.
        ranks: data-parallel ranks.
        cut_matrices: matrices that partition boundaries cut.
        by_rank: state on every rank.
        formula: the paper's formula for the whole model.
        adamw: AdamW's states for the whole model.
    """

    model: str
    ranks: int
    cut_matrices: int
    by_rank: list[int]
    formula: int
    adamw: int

    @property
    def imbalance(self) -> float:
        """The largest rank's state over an even share of the total."""
        return max(self.by_rank) * self.ranks / self.formula


def plan_llama(model: str, ranks: int) -> Plan:
    """Plan a LLaMA under ZeRO-2 as the engine would."""
    rank = LLAMAS[model][4]
    run = plan_llama_run(model, ranks, rank=rank)
    return Plan(
        model=model,
        ranks=ranks,
        cut_matrices=sum(len(group.layout.split) for group in run.groups if group.layout is not None),
        by_rank=[BYTES * sum(group.state_elements(index) for group in run.groups) for index in range(ranks)],
        formula=formula_bytes(run.records),
        adamw=adamw_bytes(run.records),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--json", help="also write the plans to this file")
    args = parser.parse_args()
    plans = [plan_llama(model, ranks) for model in LLAMAS for ranks in args.ranks]
    print("model   rank  ranks  cut  largest rank  even share   ratio  of AdamW")
    for plan in plans:
        print(
            f"{plan.model:6}{LLAMAS[plan.model][4]:>6}{plan.ranks:>7}{plan.cut_matrices:>5}"
            f"{max(plan.by_rank) / 2**20:>10.1f} MiB{plan.formula / plan.ranks / 2**20:>8.1f} MiB"
            f"{plan.imbalance:>8.3f}{plan.formula / plan.adamw:>10.1%}"
        )
    save(args.json, torch.device("cpu"), plans=[asdict(plan) for plan in plans])


if __name__ == "__main__":
    main()
