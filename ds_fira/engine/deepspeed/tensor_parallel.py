"""Tensor parallelism of DeepSpeed's AutoTP: which slice of which parameter a rank has, and where all slices lie.

Written against DeepSpeed 0.19.8. What it relies on:

- AutoTP leaves a rank some rows or some columns of a weight, in the same parameter, and notes in it, for universal
  checkpoints, which shape it had. What it says of the dimension is another one for `Conv1D`, so shapes tell it here.
- The ranks of `groups.get_tensor_model_parallel_group()` have the slices of one copy of the model. ZeRO partitions what
  a rank has over the data-parallel group, as if it were all there is.
- It leaves alone what it does not know, such as norms; every rank has that whole, with the same gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import Tensor

from ds_fira.core.selection import WHOLE_SHAPE, held_shape, is_sliced, numel_of, shape_of
from ds_fira.engine.deepspeed.flat_groups import FlatGroup
from ds_fira.optim.expert_groups import keys_of
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import MatrixShard, Partitioning
from ds_fira.sharding.slice_names import slice_name

# Where AutoTP notes what a parameter was, and that a rank has a slice of it.
NOTE, _MARK = "ds_autotp_universal_checkpoint_meta", "tensor_model_parallel"
# Fragments by the rank that holds each.
Fragments = dict[int, MatrixShard]


def uses_autotp(engine: DeepSpeedEngine) -> bool:
    """Whether AutoTP slices the module of an engine."""
    return engine.autotp_size() > 1


def note_slices(engine: DeepSpeedEngine, optimizer: str) -> None:
    """Note the shape of the whole in every parameter of which this rank has a slice.

    Args:
        engine: whose module AutoTP has sliced, if its config says so.
        optimizer: the name of the user's optimizer, for the error.

    Raises:
        ValueError: a slice is none of rows or columns, this rank has nothing of the parameter, or it is an expert's.
    """
    setting = f"tensor_parallel.autotp_size = {engine.autotp_size()}"
    for name, param in engine.module.named_parameters() if uses_autotp(engine) else ():
        if keys_of(param):
            raise ValueError(
                f"{optimizer}: {setting} is not supported with DeepSpeed's MoE layers, as of {name}, whose experts "
                "other ranks hold than the slices; set it to 1."
            )
        note, own = getattr(param, NOTE, None) or {}, held_shape(param)
        whole = tuple(note.get("original_shape") or note.get("logical_shape") or own)
        if own == whole and (note or not getattr(param, _MARK, False)):
            continue
        alike = sum(mine == all_of_it for mine, all_of_it in zip(own, whole, strict=False))
        if not len(own) == len(whole) == alike + 1 or len(own) > 2 or numel_of(param) == 0:
            raise ValueError(
                f"{optimizer}: {setting} leaves a rank {own} of {name} of shape {whole}, which has to be some of its "
                "rows or some of its columns; set it to a smaller size, or leave the layer whole by a partition_config."
            )
        setattr(param, WHOLE_SHAPE, whole)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells of its flat tensors: where their parameters lie, and the shapes of its slices."""

    place: tuple[int, int]
    partitionings: list[Partitioning]
    shapes: list[list[tuple[int, ...]]]


class Grid:
    """The ranks of a training with AutoTP: of a row, which have the slices of one copy, and of a column, with the same.

    Attributes:
        everyone: all ranks.
        row: those that have the slices of one copy, in the order of the slices.
        size: how many these are.
        rank: this rank's place among them.
    """

    def __init__(self, column: Communicator) -> None:
        """Read the process groups; a collective call.

        Args:
            column: the data-parallel ranks.
        """
        self.everyone = Communicator()
        self.row = Communicator(groups.get_tensor_model_parallel_group())
        self.size, self.rank = self.row.dp_size, self.row.dp_rank
        self._column = column
        self._told: list[_Told] = []

    def label(self, name: str, param: Tensor) -> str:
        """The name of what this rank has of a parameter, of a slice another one than of the other slices."""
        return slice_name(name, self.rank, self.size) if is_sliced(param) else name

    def learn(self, flats: Sequence[FlatGroup], name: str) -> list[list[Partitioning]]:
        """Ask all ranks where their slices lie; a collective call.

        Args:
            flats: of this rank.
            name: of the optimizer, for the error.

        Returns:
            Where the parameters of the flat tensors lie on every rank, alike on all of them.

        Raises:
            ValueError: the flat tensors of some ranks do not hold the same parameters.
        """
        shapes = [[held_shape(param) for param in flat.lp_params] for flat in flats]
        own = _Told((self.rank, self._column.dp_rank), [flat.partitioning for flat in flats], shapes)
        self._told = self.everyone.gather_objects(own)
        if len({tuple(map(len, told.shapes)) for told in self._told}) > 1:
            raise ValueError(
                f"{name}: zero_optimization.sub_group_size puts slices of the same matrix into other groups on each "
                f"rank with tensor_parallel.autotp_size = {self.size}; remove it."
            )
        return [told.partitionings for told in self._told]

    def buffer(
        self, number: int, flat: FlatGroup, names: Sequence[str], stage: int, name: str
    ) -> tuple[list[Fragments], int]:
        """The fragments of the sliced matrices of a flat tensor, by rank: of everyone, at stage 0 of the row.

        And the elements of the largest partition: slices need not be of one size.

        Args:
            number: of the flat tensor, among those that `learn` was given.
            flat: on this rank.
            names: of its parameters.
            stage: of ZeRO.
            name: of the optimizer, for the error.

        Raises:
            ValueError: the slices of a matrix do not make up the whole.
        """
        ranks = {told.place: rank for rank, told in enumerate(self._told)}
        holders = {place: place[0] for place in ranks} if stage == 0 else ranks
        found = []
        for index, (own, param) in enumerate(zip(names, flat.lp_params, strict=True)):
            whole, fragments = shape_of(param), Fragments()
            first = [0, 0]
            for tp in range(self.size):
                told = self._told[ranks[tp, 0]]
                shape = told.shapes[number][index]
                along = next(dim for dim in (0, 1) if shape[dim] != whole[dim])
                slice_of_it = MatrixShard(own, shape, 0, 0, shape[0] * shape[1])
                for dp, part in told.partitionings[number].fragments(index, slice_of_it).items():
                    fragments[holders[tp, dp]] = part.within(whole, tuple(first))
                first[along] += shape[along]
            if first[along] != whole[along]:
                raise ValueError(
                    f"{name}: the slices that tensor_parallel.autotp_size = {self.size} leaves the ranks of {own} have "
                    f"{first[along]} of its {whole[along]} {'rows' if along == 0 else 'columns'} together; leave its "
                    "layer out by target_modules, or whole by a partition_config."
                )
            found.append(fragments)
        return found, max(told.partitionings[number].partition_size for told in self._told)


def sliced(params: Iterable[Tensor]) -> bool:
    """Whether a rank has but a slice of some parameter."""
    return any(map(is_sliced, params))
