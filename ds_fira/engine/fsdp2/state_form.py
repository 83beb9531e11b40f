"""States that FSDP2's ranks share in a state dict: by parameter the tensors that one process would have, as DTensors.

So torch's own optimizers have it, and `torch.distributed.checkpoint` expects it: a checkpoint loads on any number of
ranks and any mesh. A step keeps states where the plan puts them; what travels between the two is no larger than they.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_fira.checkpoint.named_state import StateDict
from ds_fira.core import quantization
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.core.state import STEP, compute_dtype, state_views, stored_moment
from ds_fira.engine.fsdp2.formed_param import FormedParam, Values, placed, placed_part, whole_of
from ds_fira.engine.fsdp2.shards import local_of
from ds_fira.engine.fsdp2.stand_ins import FlatStandIn, LocalStandIn
from ds_fira.engine.fsdp2.tracks import carry
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import matrices_of
from ds_fira.sharding.plan import GroupLayout


@dataclass(frozen=True)
class ShardedStates:
    """The states of an optimizer whose parameters FSDP2 has sharded; a `ds_fira.optim.attachment.StateForm`.

    Attributes:
        optimizer: whose they are; attached.
        everyone: all ranks of the mesh.
        layouts: by flat tensor, which rank holds and steps what.
    """

    optimizer: LowRankOptimizer
    everyone: Communicator
    layouts: dict[Tensor, GroupLayout]

    def gather(self) -> dict[int, dict[str, Tensor]]:
        """See `StateForm.gather`."""
        numbers, found = self._numbers(), {}
        for group, stand_in in self._stand_ins():
            if isinstance(stand_in, LocalStandIn):
                state = self.optimizer.state.get(stand_in.tensor)
                if state:
                    found[numbers[id(stand_in.param)]] = self._shown(stand_in, state)
            elif stand_in.taken:
                formed = self._formed(stand_in, group)
                self._carry(stand_in, group, formed, load=False)
                for param, each in zip(stand_in.params, formed, strict=True):
                    found[numbers[id(param)]] = each.shown()
        return dict(sorted(found.items()))

    def show_names(self, stepped: Tensor) -> None:
        """See `StateForm.show_names`; tensors without memory, for the states lie elsewhere."""
        for group, stand_in in self._stand_ins():
            if stand_in.tensor is stepped:
                for param, shapes in self._shapes(group, stand_in):
                    if param not in self.optimizer.state:
                        names = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
                        self.optimizer.state[param] = names

    def require_fit(self, state_dict: StateDict) -> None:
        """See `StateForm.require_fit`."""
        faults = self.everyone.gather_objects(self._fault(_by_number(state_dict)))
        fault = next((each for each in faults if each is not None), None)
        if fault is not None:
            raise ValueError(fault)

    def load(self, state_dict: StateDict) -> None:
        """See `StateForm.load`."""
        states = _by_number(state_dict)
        numbers = self._numbers()
        self.optimizer.state.clear()
        for group, stand_in in self._stand_ins():
            if isinstance(stand_in, LocalStandIn):
                state = states[numbers[id(stand_in.param)]]
                if state:
                    self._take(stand_in, group, state)
                continue
            own = [states[numbers[id(param)]] for param in stand_in.params]
            stand_in.taken = any(own)
            if stand_in.taken:
                formed = self._formed(stand_in, group)
                for each, state in zip(formed, own, strict=True):
                    each.take(state or each.shown())
                self._carry(stand_in, group, formed, load=True)

    def _numbers(self) -> dict[int, int]:
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        return {id(param): number for number, param in enumerate(params)}

    def _stand_ins(self) -> Iterator[tuple[ParamGroup, FlatStandIn | LocalStandIn]]:
        for number, batches in self.optimizer.attachment.stand_ins.items():
            for batch in batches:
                for stand_in in batch:
                    yield self.optimizer.param_groups[number], stand_in

    def _formed(self, flat: FlatStandIn, group: ParamGroup) -> list[FormedParam]:
        settings, algorithm, rank = GroupSettings.of(group), self.optimizer.algorithm, flat.communicator.dp_rank
        pairs = zip(flat.params, flat.shards, strict=True)
        return [FormedParam(param, shards, settings, algorithm, rank) for param, shards in pairs]

    def _carry(self, flat: FlatStandIn, group: ParamGroup, formed: Sequence[FormedParam], load: bool) -> None:
        """Bring all states of a flat tensor from one form to the other; a collective call."""
        optimizer, layout, dtype = self.optimizer, self.layouts[flat.tensor], compute_dtype(flat.tensor.dtype)
        state = optimizer._state_of(flat.tensor, group)
        views = {
            part.name: state_views(state, part.side, part.mark, part.index, algorithm=optimizer.algorithm, dtype=dtype)
            for part in optimizer._slices(flat.tensor, group).matrices
        }
        values = {name: (Values.like if load else Values.of)(each) for name, each in views.items()}
        held = {matrix.name: (matrix, rank) for rank, each in enumerate(layout.unsplit) for matrix in each}
        held |= {matrix.name: (matrix, matrix.owner) for matrix in layout.split}
        tracks = [
            track
            for shards, each in zip(flat.shards, formed, strict=True)
            for element, matrix in enumerate(matrices_of(shards.name, shards.shape))
            for track in each.tracks(element, *held[matrix.name], values.get(matrix.name), load)
        ]
        carry(tracks, flat.communicator, torch.empty(0, dtype=dtype, device=flat.tensor.device))
        if load:
            for name, each in values.items():
                each.write(views[name])

    def _shown(self, stand_in: LocalStandIn, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of what is stepped where it lies: cut as the parameter is, or as it is where that is not cut."""
        param = stand_in.param
        if stand_in.shards is None:
            return dict(state)
        shown = {STEP: state[STEP]}
        for name in self.optimizer.algorithm.states:
            values = quantization.read(stored_moment(state, name), compute_dtype(param.dtype))
            shown[name] = placed(values.view(local_of(param).shape), param, param.placements, tuple(param.shape))
        return shown

    def _take(self, stand_in: LocalStandIn, group: ParamGroup, saved: dict[str, Tensor]) -> None:
        """The reverse of `_shown`."""
        state, param = self.optimizer._state_of(stand_in.tensor, group), stand_in.param
        if stand_in.shards is None:
            for key, value in state.items():
                value.copy_(whole_of(saved[key]))
            return
        state[STEP].copy_(whole_of(saved[STEP]))
        for name in self.optimizer.algorithm.states:
            value = saved[name]
            if isinstance(value, DTensor):
                values = placed_part(value, param.placements)
            else:
                values = stand_in.shards.part(value, stand_in.rank)
            values = values.reshape(-1).to(compute_dtype(param.dtype))
            quantization.write_(stored_moment(state, name), values, seed=None)

    def _fault(self, states: dict[int, dict[str, Tensor]]) -> str | None:
        """What speaks against loading some states, by number of the parameter; None for nothing."""
        numbers = self._numbers()
        for group, stand_in in self._stand_ins():
            for param, shapes in self._shapes(group, stand_in):
                found = {key: tuple(getattr(each, "shape", ())) for key, each in states[numbers[id(param)]].items()}
                if found and found != shapes:
                    key = min(key for key, _ in found.items() ^ shapes.items())
                    own = self.optimizer.attachment.names[id(param)]
                    return (
                        f"the state of {own} of shape {tuple(param.shape)} has {key} of shape {found.get(key)} where "
                        f"{shapes.get(key)} belongs; load the state that this model and these settings made."
                    )
        return None

    def _shapes(
        self, group: ParamGroup, stand_in: FlatStandIn | LocalStandIn
    ) -> Iterator[tuple[Tensor, dict[str, tuple[int, ...]]]]:
        """The parameters that something stands in for, each with the shapes of its states by name."""
        if isinstance(stand_in, FlatStandIn):
            for param, formed in zip(stand_in.params, self._formed(stand_in, group), strict=True):
                yield param, formed.shapes()
        elif stand_in.shards is not None:
            shape = tuple(stand_in.param.shape)
            yield stand_in.param, {STEP: (), **dict.fromkeys(self.optimizer.algorithm.states, shape)}
        else:
            state = self.optimizer._allocated(stand_in.tensor, group, torch.empty_like(stand_in.tensor, device="meta"))
            yield stand_in.param, {key: tuple(value.shape) for key, value in state.items()}


def _by_number(state_dict: StateDict) -> dict[int, dict[str, Tensor]]:
    """The states of a state dict by the number of the parameter; {} where there is none."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    return {number: state_dict["state"].get(key, {}) for number, key in enumerate(keys)}
