"""Training under `torch.nn.parallel.DistributedDataParallel`: every rank holds all states, as at ZeRO stage 0.

DDP gives every rank the same gradients, so every rank makes the same step. An optimizer that is made of the DDP model,
or of `ds_fira.param_groups` of it, computes each basis on one rank and sends it to the others; one that is made of its
parameters alone cannot know that they are replicas, and computes every basis on every rank.
"""

from __future__ import annotations

from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ds_fira.engine.binding import agree_on_kernels, structure_of
from ds_fira.optim.attachment import EngineAttachment
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.doors import door_of_param
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.plan import digest


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
        communicator, groups = Communicator(self._group), optimizer.param_groups
        members = optimizer._members()
        structure = [structure_of(group, listed) for group, listed in zip(groups, members, strict=True)]
        communicator.require_same(digest(members, structure), optimizer.algorithm.name)
        params = [param for group in groups for param in group["params"]]
        replicas = {param: communicator for param in params if door_of_param(param) is self}
        # Names, slices and digest stay those of one process: so do its state dicts, on any number of ranks.
        optimizer.attach(EngineAttachment(communicator=communicator, replicas=replicas))
        agree_on_kernels(optimizer, params[0].device, communicator)
