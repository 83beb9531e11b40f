"""What every engine's attachment has in common: the plan of a flat tensor becomes the matrices that a rank steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from ds_fira.checkpoint.reconcile import Members
from ds_fira.core import kernels
from ds_fira.core.algorithms import KEY
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.gather import GatherExchange
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.sharding.lowrank.step import LowRankMatrices
from ds_fira.sharding.plan import GroupLayout
from ds_fira.sharding.projection import is_projected


def bind_layout(
    layout: GroupLayout, communicator: Communicator, numbers: Mapping[str, int], replicas: Communicator | None = None
) -> LocalMatrices:
    """What a rank steps of a flat tensor, and the collectives that it takes part in for it.

    Args:
        layout: of the flat tensor over all ranks.
        communicator: the ranks.
        numbers: by name, every projected matrix's number in the model.
        replicas: the ranks that step the same flat tensor as this one; None for this one alone.
    """
    whole = layout.unsplit[communicator.dp_rank]
    exchanges = tuple(GatherExchange(turn, communicator) for turn in layout.gathered_turns)
    low_rank = LowRankMatrices(layout.low_rank, communicator, numbers, replicas) if layout.low_rank else None
    indices = tuple(numbers[matrix.name] for matrix in (*whole, *layout.gathered_by(communicator.dp_rank)))
    return LocalMatrices(whole, indices, exchanges, low_rank)


def structure_of(group: Mapping[str, object], members: Members) -> tuple[object, ...]:
    """The settings of a param group that decide how its states are laid out, and what it leaves unprojected."""
    return (
        *(group.get("rank"), group["proj_type"], group["formulation"]),
        *((group[KEY],) if KEY in group else ()),
        *((name for name, shape in members if not is_projected(shape, group)) if "rank" in group else ()),
    )


def agree_on_kernels(optimizer: LowRankOptimizer, device: torch.device, communicator: Communicator) -> None:
    """Where the kernels do not run on some rank, no rank uses them: replicas would drift apart by their rounding.

    One rank says so, for all, with the reason of the first that has one to tell. A collective call.

    Args:
        optimizer: that is attached.
        device: on which this rank steps.
        communicator: all ranks.
    """
    if optimizer.kernels == "off":
        return
    found = communicator.gather_objects(kernels.fault(device))
    faults = {rank: fault for rank, fault in enumerate(found) if fault is not None}
    if len(faults) == len(found):  # on devices that the kernels are not for, there is nothing to say
        faults = {rank: fault for rank, fault in faults.items() if not fault.known}
    if not faults:
        return
    optimizer.kernels = "off"
    if communicator.dp_rank == 0:
        rank, fault = min(faults.items(), key=lambda item: item[1].known)
        warnings.warn(f"{optimizer.algorithm.name}: on rank {rank} {fault.advice}", stacklevel=2)
