"""How FiraAdam's states spread over ZeRO's ranks for the paper's LLaMA models: planned, no processes needed.

    python benchmarks/layout.py [--ranks 2 4 8] [--json FILE]

Prints, for every model and number of ranks: matrices cut by partition boundaries, bytes of state on the largest rank
and all ranks together, the ratio of the largest rank to an even share, and the share of AdamW's states. Builds the
transformers model on the meta device and plans with the code that the engine runs.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_fira.groups import build_groups, group_defaults
from ds_fira.layout import plan_groups, state_numel
from ds_fira.memory import ParamRecord, adamw_bytes
from ds_fira.settings import check_params
from ds_fira.shard import matrices_of

# (hidden, intermediate, heads, layers, rank): the paper's Tables 2 and 5, and its 7B at the higher of its two ranks.
LLAMAS = {
    "60m": (512, 1376, 8, 8, 128),
    "130m": (768, 2048, 12, 12, 256),
    "350m": (1024, 2736, 16, 24, 256),
    "1b": (2048, 5461, 32, 24, 512),
    "7b": (4096, 11008, 32, 32, 1024),
}
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
    hidden, intermediate, heads, layers, rank = LLAMAS[model]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=layers,
    )
    with torch.device("meta"):
        module = LlamaForCausalLM(config)
    settings = check_params({"rank": rank})
    groups = build_groups(module, module.parameters(), settings, zero_stage=2, dp_size=ranks)
    buffers, records = [], []
    state = [0] * ranks
    for group in groups:
        matrices, begin = [], 0
        for param in group["params"]:
            records.append(ParamRecord.of("", tuple(param.shape), {**group_defaults(settings), **group}))
            if "rank" in group:
                matrices += matrices_of("", tuple(param.shape), begin)
            begin += param.numel()
        # ZeRO pads a buffer to a multiple of twice the ranks.
        partition_size = math.ceil(begin / (2 * ranks)) * 2
        if "rank" in group:
            buffers.append((matrices, partition_size))
        else:
            state = [held + 2 * partition_size for held in state]
    layouts = plan_groups(buffers, ranks, [lambda shape: state_numel(shape, rank)] * len(buffers))
    for layout in layouts:
        for index in range(ranks):
            owned = (*layout.whole[index], *layout.owned_cuts(index))
            state[index] += sum(state_numel(matrix.shape, rank) for matrix in owned)
    return Plan(
        model=model,
        ranks=ranks,
        cut_matrices=sum(len(layout.cuts) for layout in layouts),
        by_rank=[BYTES * held for held in state],
        formula=BYTES * sum(record.state_elements for record in records),
        adamw=adamw_bytes(records),
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
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(plan) for plan in plans], file, indent=1)


if __name__ == "__main__":
    main()
