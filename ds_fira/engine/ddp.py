"""Training under `torch.nn.parallel.DistributedDataParallel`: every rank holds all states, as at ZeRO stage 0.

DDP gives every rank the same gradients, so every rank makes the same step. An optimizer that is made of the DDP model,
or of `ds_fira.param_groups` of it, computes each basis on one rank and sends it to the others; one that is made of its
parameters alone cannot know that they are replicas, and computes every basis on every rank.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ds_fira.engine.binding import agree_on_kernels, structure_of
from ds_fira.optim.attachment import EngineAttachment
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.doors import door_of_param
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.plan import digest


def attach_replicas(optimizer: LowRankOptimizer, communicator: Communicator, params: Collection[Tensor]) -> None:
    """Tell an optimizer which of its parameters all ranks hold, with the same gradients; a collective call.

    Args:
        optimizer: makes every basis of them on one rank from now on.
        communicator: the ranks.
        params: these parameters; others are each rank's own.

    Raises:
        RuntimeError: ranks have other parameters or settings.
    """
    groups = optimizer.param_groups
    members = optimizer._members()
    structure = [structure_of(group, listed) for group, listed in zip(groups, members, strict=True)]
    communicator.require_same(digest(members, structure), optimizer.algorithm.name)
    # Names, slices and digest stay those of one process: so do its state dicts, on any number of ranks.
    optimizer.attach(EngineAttachment(communicator=communicator, replicas=dict.fromkeys(params, communicator)))
    agree_on_kernels(optimizer, groups[0]["params"][0].device, communicator)


class DdpDoor:
    """The door to the parameters of one DDP model.

    Args:
        model: the DDP model.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._group: dist.ProcessGroup = model.process_group

    def attach(self, optimizer: LowRankOptimizer) -> None:
        """Tell an optimizer which of its parameters all ranks hold; a collective call of those of the DDP model.

        Parameters of another model in the same optimizer are each rank's own.

        Raises:
            RuntimeError: ranks have other parameters or settings.
        """
        params = [param for group in optimizer.param_groups for param in group["params"]]
        attach_replicas(optimizer, Communicator(self._group), [p for p in params if door_of_param(p) is self])
