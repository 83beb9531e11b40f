"""The doors of this package (`ds_fira.optim.doors`): what tells of a way to hold parameters, and who attaches to it.

What they need of torch is imported where a door opens, so that `import ds_fira` does not wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor, nn

from ds_fira.optim import doors
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.doors import Door


class Fsdp2:
    """Parameters sharded by `torch.distributed.fsdp.fully_shard`, each a DTensor."""

    def of_model(self, model: nn.Module) -> None:
        """Never: the parameters say it, and `fully_shard` may come after the optimizer."""

    def of_params(self, params: Sequence[Tensor]) -> Door | None:
        """Itself, where one is a DTensor."""
        module = sys.modules.get("torch.distributed.tensor")
        return self if module is not None and any(isinstance(param, module.DTensor) for param in params) else None

    def attach(self, optimizer: LowRankOptimizer) -> None:
        """See `ds_fira.engine.fsdp2.attach`."""
        from ds_fira.engine.fsdp2.attach import attach

        attach(optimizer)


class Fsdp1:
    """Parameters that FSDP's first version has flattened: the shapes of matrices are gone."""

    def of_model(self, model: nn.Module) -> None:
        """Refuse such a model.

        Raises:
            ValueError: it is one.
        """
        module = sys.modules.get("torch.distributed.fsdp")
        if module is not None and isinstance(model, module.FullyShardedDataParallel):
            raise ValueError(
                "ds_fira: the model is sharded by FullyShardedDataParallel, which flattens parameters so that no rank "
                "knows a matrix; shard it by torch.distributed.fsdp.fully_shard (fsdp_version: 2)."
            )

    def of_params(self, params: Sequence[Tensor]) -> None:
        """Never: one dimension, or none, is refused of any parameter that shall be projected."""


class Ddp:
    """Parameters of a `DistributedDataParallel`, the same on every rank."""

    def of_model(self, model: nn.Module) -> tuple[Door, nn.Module] | None:
        """Of such a model, compiled or not."""
        model = getattr(model, "_orig_mod", model)
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return None
        from ds_fira.engine.ddp import DdpDoor

        return DdpDoor(model), model.module

    def of_params(self, params: Sequence[Tensor]) -> None:
        """Never: torch leaves no mark on them, and ranks that train apart must not start to communicate."""


def add_doors() -> None:
    """Add them; called where the package is imported."""
    for each in (Fsdp2(), Fsdp1(), Ddp()):
        doors.add_doors(each)
