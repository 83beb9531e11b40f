"""What an engine tells an optimizer about the tensors it steps: one record, handed over by one call."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ds_fira.checkpoint.named_state import StateDict
from ds_fira.checkpoint.reconcile import Members
from ds_fira.core.settings import ParamGroup
from ds_fira.optim.doors import door_of
from ds_fira.optim.state_size import ParamRecord
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import ParamSlice
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.sharding.plan import GroupLayout


class StandIn(Protocol):
    """A tensor that is stepped in place of parameters whose engine keeps them in another form.

    Attributes:
        tensor: has the states; its memory, and its gradient, may be there in a step alone.
        params: the parameters.
    """

    tensor: Tensor
    params: Sequence[Tensor]

    def take(self) -> bool:
        """Fill it, and its gradient, from the parameters; False, and nothing done, where none has a gradient."""

    def give_back(self) -> None:
        """Write what was stepped into the parameters."""


class StateForm(Protocol):
    """How an engine's states look in a state dict, where they do not lie in it as they are stepped."""

    def gather(self) -> dict[int, dict[str, Tensor]]:
        """By a parameter's number among those of all groups its state; a collective call."""

    def show_names(self, stepped: Tensor) -> None:
        """Let the optimizer's `state` have the names of the states of parameters, whose stand-in now has states.

        torch's `set_optimizer_state_dict` looks there which names a flattened state dict has to have.
        """

    def require_fit(self, state_dict: StateDict) -> None:
        """Check the states of such a state dict; a collective call.

        Raises:
            ValueError: they do not fit, the same on every rank.
        """

    def load(self, state_dict: StateDict) -> None:
        """Take its states, which fit; a collective call."""


@dataclass(frozen=True, slots=True)
class EngineAttachment:
    """Where an engine has put the parameters of a model, as one rank sees it; the defaults are those of no engine.

    A stepped tensor is one that the optimizer has in its param groups on this rank: a parameter, or a flat partition
    with the elements of many.

    Attributes:
        communicator: all ranks that train together.
        replicas: by stepped tensor, the ranks that step the same one, so that one computes a basis for all; empty where
            no other rank does.
        members: of every param group, names and shapes of its parameters over all ranks.
        inventory: of every trained parameter over all ranks, how it is optimized.
        layouts: of every flat buffer with projected matrices, which rank holds and steps what.
        slices: by stepped tensor, the elements of parameters that it holds.
        vectors: by stepped tensor, whether all parameters in it, on all ranks, have at most one dimension.
        matrices: by flat partition, the projected matrices in it.
        gradient_dtypes: by stepped tensor, the dtype in which its gradient was computed.
        names: of the module's parameters, by their `id`.
        digest: of all that is the same on every rank; a state dict of another digest was saved elsewhere.
        stand_ins: by number of a param group, what is stepped in place of its parameters: lists of those that are
            stepped together, one list after the other. Empty where the parameters themselves are stepped.
        form: of the states in a state dict; None where they are in it as they are.
        replicated: whether all ranks hold the same parameters and states, and step the same matrices.
    """

    communicator: Communicator | None = None
    replicas: Mapping[Tensor, Communicator] = field(default_factory=dict)
    members: Sequence[Members] = ()
    inventory: Sequence[ParamRecord] = ()
    layouts: Sequence[GroupLayout] = ()
    slices: Mapping[Tensor, tuple[ParamSlice, ...]] = field(default_factory=dict)
    vectors: Mapping[Tensor, bool] = field(default_factory=dict)
    matrices: Mapping[Tensor, LocalMatrices] = field(default_factory=dict)
    gradient_dtypes: Mapping[Tensor, torch.dtype] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    digest: str = ""
    stand_ins: Mapping[int, Sequence[Sequence[StandIn]]] = field(default_factory=dict)
    form: StateForm | None = None
    replicated: bool = field(init=False)

    def __post_init__(self) -> None:
        held = self.replicas.values()
        alike = any(each.dp_size > 1 for each in held) and all(each is self.communicator for each in held)
        object.__setattr__(self, "replicated", alike)

    def is_vector(self, stepped: Tensor) -> bool:
        """Whether a stepped tensor has norms and biases alone: what `vectors` says, else by its own dimensions."""
        return self.vectors.get(stepped, stepped.dim() < 2)


ALONE = EngineAttachment()


class Attachable:
    """Reads what `attachment` says; an optimizer without an engine reads the defaults.

    Attributes:
        param_groups: of the optimizer.
    """

    attachment: EngineAttachment = ALONE
    param_groups: list[ParamGroup]
    _asked: tuple[int, ...] = ()

    def find_place(self) -> None:
        """Ask who holds the parameters, before they are stepped or their states saved; may be a collective call.

        Asked once, and again where other parameters have taken their places, as accelerate does once it has sharded
        a model.

        Raises:
            ValueError: the way in which they are held is not supported, the same on every rank.
        """
        held = self.attachment
        if held is not ALONE and not held.stand_ins:
            return  # an engine has told, and every step asks
        params = [param for group in self.param_groups for param in group["params"]]
        if held.stand_ins and not {id(param) for param in params} == held.names.keys():
            raise ValueError(
                "ds_fira: the param groups hold other parameters than at the first step, and those would be stepped; "
                "shard the model before the first step, and make a new optimizer for new parameters."
            )
        asked = tuple(map(id, params))
        if held is not ALONE or asked == self._asked:
            return
        door = door_of(params)
        if door is not None:
            door.attach(self)
        self._asked = asked

    def stepped(self, number: int) -> list[Tensor]:
        """The tensors that are stepped for a param group: its parameters, or what stands in for them."""
        batches = self.attachment.stand_ins.get(number)
        if batches is None:
            return self.param_groups[number]["params"]
        return [each.tensor for batch in batches for each in batch]

    def _show_names(self, stepped: Tensor) -> None:
        if self.attachment.form is not None:
            self.attachment.form.show_names(stepped)

    def _lent(self, number: int, among: Collection[Tensor] | None = None) -> Iterator[list[Tensor]]:
        """Lists of a group's tensors that have a gradient and are stepped together, each given back behind its step.

        Args:
            number: of the group.
            among: those of its parameters that are to be stepped; None for all of them.
        """
        batches = self.attachment.stand_ins.get(number)
        if batches is None:
            params = self.param_groups[number]["params"] if among is None else among
            yield [param for param in params if param.grad is not None]
            return
        chosen = None if among is None else set(map(id, among))
        for batch in batches:
            wanted = [each for each in batch if chosen is None or not chosen.isdisjoint(map(id, each.params))]
            taken = [each for each in wanted if each.take()]
            yield [each.tensor for each in taken]
            for each in taken:
                each.give_back()

    @property
    def communicator(self) -> Communicator | None:
        """All ranks that train together; None where no engine says."""
        return self.attachment.communicator

    @property
    def replicated(self) -> bool:
        """Whether all ranks hold the same parameters and states, and step and count the same matrices."""
        return self.attachment.replicated

    def counts(self, param: Tensor) -> bool:
        """Whether this rank counts a stepped tensor's steps: one of those that step it does, or all ranks alike."""
        return self.counts_among(self.attachment.replicas.get(param))

    def counts_among(self, replicas: Communicator | None) -> bool:
        """The same of the ranks that step a tensor, None for this one alone."""
        return replicas is None or replicas.dp_rank == 0 or self.replicated

    @property
    def members(self) -> Sequence[Members]:
        """Of every param group, names and shapes of its parameters over all ranks; empty where no engine says."""
        return self.attachment.members

    @property
    def elsewhere(self) -> set[str]:
        """Names of trained parameters that other ranks have in param groups of their own: of a pipeline's stages."""
        return {record.name for record in self.attachment.inventory} - {n for listed in self.members for n, _ in listed}

    @property
    def layouts(self) -> Sequence[GroupLayout]:
        """The rank that holds and steps each projected matrix; empty where no engine says."""
        return self.attachment.layouts
