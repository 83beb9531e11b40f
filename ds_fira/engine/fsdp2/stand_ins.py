"""What is stepped in place of FSDP2's parameters: the part that this rank holds of one, or a flat tensor of several.

What is not projected is stepped where it lies, element by element. Matrices are stepped together, as under ZeRO-3: what
a rank holds of them is put behind one another for the time of a step, so that a few collectives serve all of them. They
stay where they lie if a matrix fills such a tensor alone, or if no kernel reads them by one address.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ds_fira.core import kernels
from ds_fira.engine.fsdp2.shards import Shards, local_gradient, local_of
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.row_blocks import common, inside
from ds_fira.sharding.scattered import forget, scatter


class LocalStandIn:
    """What this rank holds of a parameter, stepped where it lies; see `ds_fira.optim.attachment.StandIn`.

    Attributes:
        param: the parameter.
        params: it alone.
        shards: how it is cut; None where the rank holds all of it.
        rank: this one among those that it is cut over.
    """

    def __init__(self, param: nn.Parameter, shards: Shards | None, rank: int) -> None:
        self.param, self.params, self.shards, self.rank = param, (param,), shards, rank
        self.tensor = self._local

    @property
    def held(self) -> list[range]:
        """The parameter's elements that it has, in its order."""
        return [range(self.param.numel())] if self.shards is None else self.shards.held(self.rank)

    def take(self) -> bool:
        """See `StandIn.take`."""
        grad = local_gradient(self.param)
        if grad is None:
            return False
        self.tensor.data = self._local  # FSDP2 may have moved it
        self.tensor.grad = grad.reshape(self.tensor.shape)
        return True

    def give_back(self) -> None:
        """Nothing has to be written; the gradient is the parameter's own again."""
        self.tensor.grad = None

    @property
    def _local(self) -> Tensor:
        local = local_of(self.param)
        return local if self.shards is None else local.view(-1)


class FlatTensor(Tensor):
    """A tensor of several matrices' parts, a key of the optimizer's `state`, that prints without its memory."""

    # As of `nn.Parameter`: what is computed with it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"FlatTensor(numel={self.numel()}, dtype={self.dtype}, device={str(self.device)!r})"


class FlatStandIn:
    """Matrices of a param group whose parts lie behind one another; see `ds_fira.optim.attachment.StandIn`.

    Attributes:
        taken: whether it has been stepped since the start.

    Args:
        params: the parameters, of one dtype and device.
        shards: how each is cut.
        communicator: the ranks that they are cut over.
    """

    def __init__(self, params: Sequence[nn.Parameter], shards: Sequence[Shards], communicator: Communicator) -> None:
        self.params, self.shards, self.communicator, self.taken = params, shards, communicator, False
        self._sizes = [each.stepped_numel(communicator.dp_rank) for each in shards]
        local = local_of(params[0])
        self._in_place = len(params) == 1 and shards[0].steps_held
        self._contiguous = all(each.steps_held for each in shards)
        flat = local.view(-1) if self._in_place else local.new_empty(sum(self._sizes))
        self.tensor = flat.as_subclass(FlatTensor)
        self._empty()

    def _empty(self) -> None:
        for flat in (self.tensor, self.tensor.grad):
            if flat is not None:
                forget(flat)
        self.tensor.grad = None
        if not self._in_place:
            self.tensor.untyped_storage().resize_(0)

    def take(self) -> bool:
        """See `StandIn.take`; may be a collective call.

        Where only some have a gradient, the others' is NaN: such a matrix is left as it is, as by `torch.optim`.
        """
        grads = [local_gradient(param) for param in self.params]
        if all(grad is None for grad in grads):
            return False
        self.taken = True
        if self._in_place:
            self.tensor.data = local_of(self.params[0]).view(-1)
            self.tensor.grad = grads[0].reshape(-1)
            return True
        if self._contiguous and not kernels.supports(local_of(self.params[0])):
            self._scatter(grads)
            return True
        storage = self.tensor.untyped_storage()
        storage.resize_(self.tensor.numel() * self.tensor.itemsize)
        gradient = torch.empty_like(self.tensor)
        self._collect(self.tensor, [local_of(param) for param in self.params])
        self._collect(gradient, grads)
        self.tensor.grad = gradient
        return True

    def give_back(self) -> None:
        """See `StandIn.give_back`; may be a collective call."""
        if self.tensor.untyped_storage().nbytes() and not self._in_place:
            self._return()
        self._empty()

    def _scatter(self, grads: Sequence[Tensor | None]) -> None:
        """Step the parameters where they lie."""
        gradient = torch.empty_like(self.tensor)
        gradient.untyped_storage().resize_(0)
        parts = [
            self.tensor.new_full((size,), torch.nan) if grad is None else grad.reshape(-1).to(self.tensor.dtype)
            for size, grad in zip(self._sizes, grads, strict=True)
        ]
        scatter(self.tensor, [local_of(param).view(-1) for param in self.params])
        scatter(gradient, parts)
        self.tensor.grad = gradient

    def _parts(self, flat: Tensor) -> Iterator[tuple[Shards, Tensor]]:
        yield from zip(self.shards, flat.split(self._sizes), strict=True)

    def _collect(self, flat: Tensor, locals_: Sequence[Tensor | None]) -> None:
        """Fill a flat tensor from what this rank holds, None for NaN, and from what others do of the same rows."""
        rank, sent, expected, targets = self.communicator.dp_rank, [], [], {}
        for index, ((each, part), local) in enumerate(zip(self._parts(flat), locals_, strict=True)):
            if local is None:
                part.fill_(torch.nan)
            elif each.steps_held:
                part.copy_(local.reshape(-1))
            else:
                held, columns = each.rows[rank], each.columns[rank]
                values = local.reshape(len(held), len(columns))
                sent += [(to, [values[inside(rows, held)]]) for to, rows in self._common(each, rank)]
                targets[index] = part.view(-1, each.width)
                expected += [
                    (source, (index, source), len(rows) * len(each.columns[source]))
                    for source, rows in self._sources(each)
                ]
        arrived = self.communicator.deliver(sent, expected, flat, bool(targets))
        for (index, source), values in arrived.items():
            place = self._place(index, source, targets[index])
            place.copy_(values.view(place.shape))

    def _common(self, shards: Shards, rank: int) -> list[tuple[int, range]]:
        """The ranks that step some of the rows that a rank holds elements of, and which rows."""
        if not len(shards.columns[rank]):
            return []
        found = [(to, common(shards.rows[rank], rows)) for to, rows in enumerate(shards.stepped_rows)]
        return [(to, rows) for to, rows in found if len(rows)]

    def _sources(self, shards: Shards) -> list[tuple[int, range]]:
        """The ranks that hold elements of the rows that this one steps, and which rows."""
        own = self.communicator.dp_rank
        return [(rank, rows) for rank in range(shards.ranks) for to, rows in self._common(shards, rank) if to == own]

    def _place(self, index: int, source: int, target: Tensor) -> Tensor:
        """Where that lies which a rank holds of the rows that this one steps, as rows and columns."""
        shards = self.shards[index]
        own, columns = shards.stepped_rows[self.communicator.dp_rank], shards.columns[source]
        return target[inside(common(shards.rows[source], own), own), columns.start : columns.stop]

    def _return(self) -> None:
        """The way back of `_collect`, for weights."""
        rank, sent, expected, targets = self.communicator.dp_rank, [], [], {}
        for index, ((each, part), param) in enumerate(zip(self._parts(self.tensor), self.params, strict=True)):
            local = local_of(param)
            if each.steps_held:
                local.view(-1).copy_(part)
                continue
            values, held, columns = part.view(-1, each.width), each.rows[rank], each.columns[rank]
            sent += [(to, [self._place(index, to, values)]) for to, _ in self._sources(each)]
            targets[index] = local.view(len(held), len(columns)), held, dict(self._common(each, rank))
            expected += [(to, (index, to), len(rows) * len(columns)) for to, rows in targets[index][2].items()]
        arrived = self.communicator.deliver(sent, expected, self.tensor, bool(targets))
        for (index, source), values in arrived.items():
            local, held, rows = targets[index]
            place = local[inside(rows[source], held)]
            place.copy_(values.view(place.shape))
