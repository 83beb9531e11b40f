"""Gradients of FSDP2 in a backward pass: those of a module are final together, once they are reduced and scattered.

`fully_shard` reduces all gradients of a module at once, behind the module's own backward pass, and calls the
post-accumulate hooks of the sharded parameters one after the other. So a *unit*, the parameters of such a module, is
stepped when the last of them has its gradient; if some have none, when the next unit begins, or the pass has ended.
FSDP2 reduces in one order on all ranks, so the steps come in one order too, and their collectives between its own.

Relies on, of torch 2.9 to 2.13: hooks of `register_post_accumulate_grad_hook` on sharded parameters, which run on the
stream of the gradients, and whose step the next forward pass waits for; `FSDPModule._get_fsdp_state`, the same of
modules that are sharded together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ds_fira.engine.fsdp2.attach import attach
from ds_fira.engine.fsdp2.shards import local_of, sharded_dims
from ds_fira.optim.backward_clipping import Held
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.comm import Communicator


def units_of(model: nn.Module, params: Sequence[Tensor]) -> list[list[Tensor]]:
    """The trained parameters that FSDP2 reduces together, in the order of the model.

    Args:
        model: with modules that `fully_shard` took.
        params: that are trained.
    """
    wanted, found = set(map(id, params)), dict[int, list[Tensor]]()

    def visit(module: nn.Module, owner: int) -> None:
        owner = id(module._get_fsdp_state()) if isinstance(module, FSDPModule) else owner
        for param in module.parameters(recurse=False):
            if id(param) in wanted:
                wanted.discard(id(param))  # of a tied one the first
                found.setdefault(owner, []).append(param)
        for child in module.children():
            visit(child, owner)

    visit(model, 0)
    return list(found.values())


class ShardedGradients:
    """Gradients that FSDP2 reduces, unit by unit; see `ds_fira.engine.backward_steps.Gradients`.

    Args:
        units: of `units_of`.
        name: of the optimizer.
    """

    def __init__(self, units: Sequence[Sequence[Tensor]], name: str) -> None:
        self._name = name
        self._sizes = [len(unit) for unit in units]
        self._number = {id(param): number for number, unit in enumerate(units) for param in unit}
        self._begun: list[int] = []  # in this backward pass
        self._arrived: list[Tensor] = []  # of the last of them

    def arrive(self, param: Tensor) -> Iterator[list[Tensor]]:
        """Take note of a gradient, and give the units that are complete now.

        Raises:
            RuntimeError: the parameter's unit has been given already.
        """
        unit = self._number[id(param)]
        if unit not in self._begun[-1:]:
            yield from self._give()
            if unit in self._begun:
                raise RuntimeError(
                    f"{self._name}: FSDP2 reduced the gradients of a module in two parts, and step_in_backward has "
                    "made the module's step with the first; call fully_shard for each of the modules that do not run "
                    "together, or train without step_in_backward."
                )
            self._begun.append(unit)
        self._arrived.append(param)
        if len(self._arrived) == self._sizes[unit]:
            yield from self._give()

    def finish(self) -> Iterator[list[Tensor]]:
        """Give the unit that is not complete, if one has begun, and await another backward pass."""
        yield from self._give()
        self._begun = []

    def _give(self) -> Iterator[list[Tensor]]:
        arrived, self._arrived = self._arrived, []
        if arrived:
            yield arrived


class HeldShards(Held):
    """Of a gradient a rank has a shard, maybe with others that have the same one.

    Args:
        everyone: all ranks of the parameters' mesh.
        name: of the optimizer.
    """

    def __init__(self, everyone: Communicator, name: str) -> None:
        self._everyone, self._name = everyone, name

    def of(self, param: Tensor) -> Tensor:
        """See `Held.of`."""
        return local_of(param.grad)

    def share(self, param: Tensor) -> float:
        """See `Held.share`: of ranks that hold the same shard each counts its part of it."""
        ranks = 1
        for dim in sharded_dims(param, self._name, ""):
            ranks *= param.device_mesh.size(dim)
        return ranks / self._everyone.dp_size

    def total(self, squares: Tensor) -> Tensor:
        """See `Held.total`; a collective call of all ranks of the mesh."""
        return self._everyone.start_all_reduce(squares).wait()


def take_units(
    model: nn.Module, optimizer: LowRankOptimizer, params: Sequence[Tensor]
) -> tuple[ShardedGradients, Held]:
    """Have an optimizer step the units of a model one by one; states that it has go along. A collective call.

    Args:
        model: with modules that `fully_shard` took.
        optimizer: of its parameters.
        params: that are trained.

    Raises:
        ValueError: something is not supported, the same on every rank.
        RuntimeError: ranks disagree about the layout.

    Returns:
        When gradients are final, and what a rank has of them.
    """
    units = units_of(model, params)
    saved = optimizer.state_dict() if optimizer.attachment.stand_ins and optimizer.state else None
    optimizer.state.clear()
    attach(optimizer, units)
    if saved is not None:
        optimizer.load_state_dict(saved)
    name = optimizer.algorithm.name
    return ShardedGradients(units, name), HeldShards(optimizer.attachment.form.everyone, name)
