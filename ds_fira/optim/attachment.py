"""What an engine tells an optimizer about the tensors it steps: one record, handed over by one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_fira.checkpoint.reconcile import Members
from ds_fira.optim.state_size import ParamRecord
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import ParamSlice
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.sharding.plan import GroupLayout


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
        matrices: by flat partition, the projected matrices in it.
        gradient_dtypes: by stepped tensor, the dtype in which its gradient was computed.
        names: of the module's parameters, by their `id`.
        digest: of all that is the same on every rank; a state dict of another digest was saved elsewhere.
        replicated: whether all ranks hold the same parameters and states, and step the same matrices.
    """

    communicator: Communicator | None = None
    replicas: Mapping[Tensor, Communicator] = field(default_factory=dict)
    members: Sequence[Members] = ()
    inventory: Sequence[ParamRecord] = ()
    layouts: Sequence[GroupLayout] = ()
    slices: Mapping[Tensor, tuple[ParamSlice, ...]] = field(default_factory=dict)
    matrices: Mapping[Tensor, LocalMatrices] = field(default_factory=dict)
    gradient_dtypes: Mapping[Tensor, torch.dtype] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    digest: str = ""
    replicated: bool = field(init=False)

    def __post_init__(self) -> None:
        held = self.replicas.values()
        alike = any(each.dp_size > 1 for each in held) and all(each is self.communicator for each in held)
        object.__setattr__(self, "replicated", alike)


ALONE = EngineAttachment()


class Attachable:
    """Reads what `attachment` says; an optimizer without an engine reads the defaults."""

    attachment: EngineAttachment = ALONE

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
