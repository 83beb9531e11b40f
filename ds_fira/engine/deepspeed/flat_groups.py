"""What lies where in ZeRO's flat partitions: reads the private books of DeepSpeed's optimizer wrappers.

Written against DeepSpeed 0.17 to 0.19. What it relies on:

- `DeepSpeedZeroOptimizer` (stages 1 and 2): the flat buffer of group i holds `round_robin_bit16_groups[i]` at
  `round_robin_bit16_offsets[i]`; this rank's master partition is `single_partition_of_fp32_groups[i]`.
- `BF16_Optimizer` (stage 1, bf16 with fp32 accumulation): `bf16_groups[i]` back to back in
  `fp32_groups_flat_partition[i]`.
- `DeepSpeedZeroOptimizer_Stage3`: group g of the optimizer is divided into the sub-groups i with
  `sub_group_to_group_id[i]` = g. Of every parameter of `fp16_groups[i]` rank k has the elements from k s on,
  s = `ds_tensor.ds_numel`; they lie back to back in `fp32_partitioned_groups_flat[i]`, which is stepped in a call of
  its own. `sub_group_partition_counts[i]` ranks take part. Between steps the optimizer's groups are empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_fira.core.selection import numel_of, shape_of
from ds_fira.sharding.geometry import MatrixShard, Partitioning, Piece, matrices_of


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Parameters that ZeRO steps as one flat tensor on each rank.

    Attributes:
        group: the number of the optimizer's param group that they belong to; at stage 3 several may belong to one.
        hp_partition: the flat master partition on this rank.
        lp_params: the module's parameters, in the order of the flat tensor.
        partitioning: where they lie.
    """

    group: int
    hp_partition: Tensor
    lp_params: list[Tensor]
    partitioning: Partitioning

    def pieces(self, dp_rank: int) -> list[Piece]:
        """What of which parameter of `lp_params` lies where in a rank's partition; padding is left out."""
        return self.partitioning.pieces(dp_rank)

    def matrices(self, names: dict[int, str]) -> list[dict[int, MatrixShard]]:
        """The fragments of every matrix by dp_rank.

        Args:
            names: of the parameters, by their `id`.

        Raises:
            ValueError: a parameter has neither 2 nor 3 dimensions.
        """
        return [
            self.partitioning.fragments(index, matrix)
            for index, param in enumerate(self.lp_params)
            for matrix in matrices_of(names.get(id(param), f"parameter {self.group}.{index}"), shape_of(param))
        ]


def flat_groups(wrapper: Any, ranks: int) -> list[FlatGroup]:
    """The flat groups of a ZeRO optimizer wrapper, in the optimizer's order.

    Args:
        wrapper: the engine's `optimizer` at stage 1, 2 or 3.
        ranks: that ZeRO partitions over.

    Raises:
        RuntimeError: the wrapper is one that this package does not know, or it partitions over other ranks.
    """
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        # Before 0.19, without parameter_alignment, parameters lie back to back.
        back_to_back = [_offsets(params) for params in wrapper.round_robin_bit16_groups]
        books = zip(
            wrapper.single_partition_of_fp32_groups,
            wrapper.round_robin_bit16_groups,
            getattr(wrapper, "round_robin_bit16_offsets", back_to_back),
            wrapper.partition_size,
            strict=True,
        )
        return [
            FlatGroup(group, hp, list(params), _in_buffer(params, offsets, int(size), ranks))
            for group, (hp, params, offsets, size) in enumerate(books)
        ]
    if hasattr(wrapper, "fp32_groups_flat_partition"):
        found = []
        for group, (hp, params) in enumerate(zip(wrapper.fp32_groups_flat_partition, wrapper.bf16_groups, strict=True)):
            found.append(FlatGroup(group, hp, list(params), _in_buffer(params, _offsets(params), hp.numel(), ranks)))
        return found
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return [_sub_group(wrapper, index, ranks) for index in range(len(wrapper.fp32_partitioned_groups_flat))]
    raise RuntimeError(
        f"FiraAdam: DeepSpeed wrapped the optimizer in {type(wrapper).__name__}, whose layout is not known; use ZeRO "
        "stage 0, 1, 2 or 3 of a supported DeepSpeed version."
    )


def _offsets(params: Sequence[Tensor]) -> list[int]:
    """Where parameters begin that lie back to back."""
    return list(itertools.accumulate((param.numel() for param in params), initial=0))[:-1]


def _in_buffer(params: list[Tensor], offsets: list[int], partition_size: int, ranks: int) -> Partitioning:
    return Partitioning(tuple(numel_of(p) for p in params), tuple(offsets), partition_size, ranks, sliced=False)


def _sub_group(wrapper: Any, index: int, ranks: int) -> FlatGroup:
    params, hp_partition = wrapper.fp16_groups[index], wrapper.fp32_partitioned_groups_flat[index]
    partitioning = Partitioning.of_slices(tuple(numel_of(param) for param in params), ranks)
    # From 0.19 on, where parameters may have process groups of their own.
    counts = getattr(wrapper, "sub_group_partition_counts", None)
    count = ranks if counts is None else counts[index]
    held = [param.ds_tensor.ds_numel for param in params]
    if count != ranks or sum(held) != partitioning.partition_size or hp_partition.numel() != sum(held):
        raise RuntimeError(
            f"FiraAdam: ZeRO-3 cut a group of {len(params)} parameters over {count} ranks, not in even slices over the "
            f"{ranks} data-parallel ones; leave out what gives parameters process groups of their own (expert, tensor "
            "or sequence parallelism, a data_parallel_group of deepspeed.zero.Init)."
        )
    return FlatGroup(wrapper.sub_group_to_group_id[index], hp_partition, list(params), partitioning)
