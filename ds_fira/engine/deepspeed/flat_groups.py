"""Where DeepSpeed puts parameters that its optimizer steps: reads private attributes of its optimizer wrappers.

lp means the module's low-precision parameters, hp the high-precision master weights that the optimizer steps. Written
against DeepSpeed 0.17 to 0.19. What it relies on:

- `FP16_UnfusedOptimizer` (stage 0) keeps an fp32 copy of every parameter `fp16_groups[i][j]` at that place of the
  optimizer's groups; in fp32 the optimizer steps the module's own parameters.
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
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_fira.core.selection import experts_of, first_element, numel_of, shape_of
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import MatrixShard, ParamSlice, Partitioning, matrices_of

# The ranks that hold some parameters, given those: `ds_fira.engine.deepspeed.holders.Holders.of`.
HoldersOf = Callable[[Sequence[Tensor]], Communicator]


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Parameters that are stepped as one tensor: of ZeRO a flat one, cut over the ranks; at stage 0 one parameter.

    Attributes:
        group: the number of the optimizer's param group that they belong to; at stages 0 and 3 several belong to one.
        hp_partition: the tensor that is stepped on this rank.
        lp_params: the module's parameters, in the order of the flat tensor.
        partitioning: where they lie.
        communicator: the ranks that the flat tensor is cut over; at stage 0 those that step the same parameter.
    """

    group: int
    hp_partition: Tensor
    lp_params: list[Tensor]
    partitioning: Partitioning
    communicator: Communicator

    @property
    def dtypes(self) -> set[str]:
        """Of the module's parameters."""
        return {str(param.dtype) for param in self.lp_params}

    def slices(self, dp_rank: int, names: Mapping[int, str]) -> tuple[ParamSlice, ...]:
        """The slices of `lp_params` in a rank's tensor, without padding.

        Args:
            dp_rank: of the rank; at stage 0 every rank has the only tensor there is.
            names: of the parameters, by their `id`.
        """
        listed = [names.get(id(param), "") for param in self.lp_params]
        if self.partitioning.partition_size == 0:  # a parameter without elements, at stage 0
            return (ParamSlice(listed[0], 0, 0, 0),)
        return self.partitioning.slices(
            dp_rank % self.partitioning.ranks, listed, [first_element(param) for param in self.lp_params]
        )

    def matrices(self, names: Mapping[int, str], chosen: Container[int] | None = None) -> list[dict[int, MatrixShard]]:
        """The fragments of every matrix by dp_rank.

        Args:
            names: of the parameters, by their `id`.
            chosen: `id` of the parameters that are asked for; None for all.

        Raises:
            ValueError: a parameter has neither 2 nor 3 dimensions.
        """
        return [
            self.partitioning.fragments(index, matrix)
            for index, param in enumerate(self.lp_params)
            if chosen is None or id(param) in chosen
            for matrix in held_matrices(names.get(id(param), f"parameter {self.group}.{index}"), param)
        ]


def held_matrices(name: str, param: Tensor) -> list[MatrixShard]:
    """The matrices that this rank, or those that share it, have in a parameter; raises as `matrices_of`."""
    return matrices_of(name, shape_of(param), experts=experts_of(param))


def by_group(flats: list[FlatGroup]) -> list[list[FlatGroup]]:
    """Those of every param group."""
    return [list(part) for _, part in itertools.groupby(flats, key=lambda flat: flat.group)]


def stepped_groups(engine: DeepSpeedEngine, holders_of: HoldersOf) -> list[FlatGroup]:
    """What the optimizer of an engine steps, in its order: at stage 0 every parameter, else ZeRO's flat groups.

    Args:
        engine: its optimizer wrapper is built.
        holders_of: gives the ranks that hold some parameters.

    Raises:
        RuntimeError: as of `flat_groups`.
        ValueError: likewise.
    """
    if engine.zero_optimization_stage() > 0:
        return flat_groups(engine.optimizer, holders_of)
    hp_groups = [list(group["params"]) for group in engine.basic_optimizer.param_groups]
    lp_groups = getattr(engine.optimizer, "fp16_groups", hp_groups)
    return [
        _in_buffer(number, hp_param, [lp_param], holders_of([lp_param]), partitions=1)
        for number, params in enumerate(zip(hp_groups, lp_groups, strict=True))
        for hp_param, lp_param in zip(*params, strict=True)
    ]


def flat_groups(wrapper: ZeROOptimizer, holders_of: HoldersOf) -> list[FlatGroup]:
    """The flat groups of a ZeRO optimizer wrapper, in the optimizer's order.

    Args:
        wrapper: the engine's `optimizer` at stage 1, 2 or 3.
        holders_of: gives the ranks that ZeRO partitions some parameters over.

    Raises:
        RuntimeError: the wrapper is one that this package does not know, or it partitions over other ranks.
        ValueError: one of its groups holds parameters of different ranks.
    """
    hp_partitions, lp_groups = None, ()
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        hp_partitions, lp_groups = wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups
    elif hasattr(wrapper, "fp32_groups_flat_partition"):
        hp_partitions, lp_groups = wrapper.fp32_groups_flat_partition, wrapper.bf16_groups
    if hp_partitions is not None:
        # Parameters lie back to back in bf16, and before 0.19, without parameter_alignment.
        offsets = getattr(wrapper, "round_robin_bit16_offsets", [None] * len(lp_groups))
        _require_counts(wrapper, lp_groups, holders_of)
        books = zip(hp_partitions, lp_groups, map(holders_of, lp_groups), offsets, strict=True)
        return [_in_buffer(group, *book) for group, book in enumerate(books)]
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return [_sub_group(wrapper, index, holders_of) for index in range(len(wrapper.fp32_partitioned_groups_flat))]
    raise RuntimeError(
        f"{wrapper.optimizer.algorithm.name}: DeepSpeed wrapped the optimizer in {type(wrapper).__name__}, whose "
        "layout is not known; use ZeRO stage 0, 1, 2 or 3 of a supported DeepSpeed version."
    )


def _require_counts(wrapper: ZeROOptimizer, lp_groups: Sequence[Sequence[Tensor]], holders_of: HoldersOf) -> None:
    """Stop unless ZeRO has cut every group over the ranks that hold its parameters."""
    counts = getattr(wrapper, "partition_count", None)
    for number, (params, count) in enumerate(zip(lp_groups, counts or [None] * len(lp_groups), strict=True)):
        ranks = holders_of(params).dp_size
        if count not in (None, ranks):
            raise RuntimeError(
                f"{wrapper.optimizer.algorithm.name}: ZeRO cut param group {number} over {count} ranks, and {ranks} "
                "hold its parameters; leave moe and name of param groups to deepspeed.initialize."
            )


def _in_buffer(
    group: int,
    hp_partition: Tensor,
    lp_params: Sequence[Tensor],
    communicator: Communicator,
    offsets: Sequence[int] | None = None,
    partitions: int | None = None,
) -> FlatGroup:
    """A flat tensor that holds parameters one after the other: back to back, unless offsets say where they begin."""
    numels = tuple(numel_of(param) for param in lp_params)
    if offsets is None:
        offsets = list(itertools.accumulate(numels, initial=0))[:-1]
    ranks = communicator.dp_size if partitions is None else partitions
    partitioning = Partitioning(numels, tuple(offsets), hp_partition.numel(), ranks, sliced=False)
    return FlatGroup(group, hp_partition, list(lp_params), partitioning, communicator)


def _sub_group(wrapper: ZeROOptimizer, index: int, holders_of: HoldersOf) -> FlatGroup:
    params, hp_partition = wrapper.fp16_groups[index], wrapper.fp32_partitioned_groups_flat[index]
    communicator = holders_of(params)
    ranks = communicator.dp_size
    partitioning = Partitioning.of_slices(tuple(numel_of(param) for param in params), ranks)
    # From 0.19 on, where parameters may have process groups of their own.
    counts = getattr(wrapper, "sub_group_partition_counts", None)
    count = ranks if counts is None else counts[index]
    held = [param.ds_tensor.ds_numel for param in params]
    # Without elements while it is swapped out.
    numel = hp_partition.numel() or wrapper.fp16_partitioned_groups_flat_numel[index]
    if count != ranks or not sum(held) == partitioning.partition_size == numel:
        raise RuntimeError(
            f"{wrapper.optimizer.algorithm.name}: ZeRO-3 cut a group of {len(params)} parameters over {count} ranks, "
            f"not in even slices over the {ranks} data-parallel ones; leave out what gives parameters process groups "
            "of their own (expert, tensor or sequence parallelism, a data_parallel_group of deepspeed.zero.Init)."
        )
    return FlatGroup(wrapper.sub_group_to_group_id[index], hp_partition, list(params), partitioning, communicator)
