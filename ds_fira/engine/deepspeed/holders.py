"""Which ranks hold a parameter alike, or cut it over themselves, and the name by which all ranks know it.

Most parameters are held by all data-parallel ranks, under the name that the module gives. Experts of a DeepSpeed MoE
layer are not: the ranks of an expert-parallel group hold different ones, all called 0, 1 and so on, and one expert is
held by the ranks of an expert-data-parallel group. AutoEP's experts lie likewise, but those of a rank are one parameter
of three dimensions: it has one name on all ranks, and its matrices the experts' numbers. Nor are the layers of a
pipeline held by all, but by the data-parallel ranks of a stage. Of what AutoTP has sliced, tensor-parallel ranks hold
different slices (`tensor_parallel.py`). Everything else here goes by what this file says.

Written against DeepSpeed 0.17 to 0.19. What it relies on: `is_moe_param` tells experts, whose `group_name` is the key
of their process groups; `deepspeed.moe.experts.Experts` holds rank e's share of n experts in its list
`deepspeed_experts`, of which number i is expert e n + i of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from deepspeed.moe.experts import Experts
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import Tensor, nn

from ds_fira.core.selection import experts_of
from ds_fira.core.whole_model import TIED
from ds_fira.engine.deepspeed.flat_groups import FlatGroup
from ds_fira.engine.deepspeed.pipeline import stages_of, untied_names
from ds_fira.engine.deepspeed.save_load.files import StageRank, normalized
from ds_fira.engine.deepspeed.tensor_parallel import Grid, note_slices, sliced, uses_autotp
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.expert_groups import note_experts
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import MatrixShard

T = TypeVar("T")


class Holders:
    """The ranks and names of an engine's parameters; made by a collective call where a pipeline has several stages.

    Attributes:
        everyone: all ranks that train together.
        dense: of these, the data-parallel ranks, which hold what is no expert: in a pipeline those of this stage.
        stage: of a pipeline this rank's, else 0.
        staged: whether other ranks hold other stages.
        shared_out: whether ranks hold different experts of a layer under one name.
        grid: where AutoTP has sliced the module, where the slices lie; else None.
        names: of this rank's parameters, by their `id`: the same on every rank that holds one, or a slice of it.
        labels: likewise, but of a slice its own name.
        order: the names of the parameters of all ranks, in the module's order and that of the layer's experts.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.dense = Communicator(engine.seq_data_parallel_group)
        self.staged = stages_of(engine.module) > 1
        self.stage = engine.module.stage_id if self.staged else 0
        self._optimizer: LowRankOptimizer = engine.basic_optimizer
        self.grid = Grid(self.dense) if uses_autotp(engine) else None
        note_slices(engine, type(self._optimizer).__name__)
        note_experts(engine.module, type(self._optimizer).__name__)
        ranks = self.dense if self.grid is None else self.grid.everyone
        self.everyone = Communicator() if self.staged else ranks
        self._stage = engine.zero_optimization_stage()
        found = getattr(engine, "expert_data_parallel_group", None) or {}
        self._experts = {name: Communicator(group) for name, group in found.items()}
        own = normalized(dict(engine.module.named_parameters()))
        self.shared_out = any(experts_of(param) is not None for param in own.values())
        self._copies = expert_names(engine.module)
        self.names = {id(param): name for name, param in own.items()}
        self.names |= untied_names(engine.module) if self.staged else {}
        ranks = {id(param): groups._get_expert_parallel_rank(param.group_name) for param in _experts_in(own.values())}
        self.names |= {key: copies[ranks[key]] for key, copies in self._copies.items()}
        self.labels = self.names
        if self.grid is not None:
            self.labels = {id(param): self.grid.label(self.names[id(param)], param) for param in own.values()}
        self.order = list(self.of_all(dict.fromkeys(self._ordered(own.values()))))

    def _ordered(self, params: Iterable[Tensor]) -> Iterable[str]:
        layers: dict[str, list[str]] = {}
        for copies in self._copies.values():
            layers.setdefault(_layer_of(copies[0]), []).extend(copies)
        for param in params:
            name = self.names[id(param)]
            experts = layers.get(_layer_of(name)) if id(param) in self._copies else None
            # Of a layer in the order of its experts, however many of them are here.
            yield from [name] if experts is None else sorted(experts, key=_number_of)

    @property
    def place(self) -> StageRank:
        """By which DeepSpeed names its file with this rank's optimizer states, where there are several."""
        if self._stage == 0 and (self._copies or self.shared_out):
            return 0, groups._get_expert_parallel_rank(groups._get_max_expert_size_name())
        return self.stage, self.dense.dp_rank

    @property
    def planners(self) -> Communicator:
        """The ranks that plan alike: all, but in a pipeline those of this stage."""
        return self.dense if self.staged else self.everyone

    @property
    def slice_number(self) -> int:
        """Of the slices of the module that this rank has, 0 where it has all of it."""
        return 0 if self.grid is None else self.grid.rank

    @property
    def slices(self) -> int:
        """Into how many slices the module is taken apart."""
        return 1 if self.grid is None else self.grid.size

    def shown(self, param: Tensor) -> str:
        """The name of what this rank has of a parameter, of a slice or of some experts its own one."""
        name, experts = self.labels[id(param)], experts_of(param)
        return name if experts is None else f"{name}[{experts.start}:{experts.stop}]"

    def of_all(self, own: Mapping[str, T]) -> dict[str, T]:
        """What all stages have by the names of parameters or matrices, in the order of a module that holds all layers.

        Args:
            own: of this stage, in its module's order.

        Returns:
            The same on every rank; without a pipeline as it came, else by a collective call.
        """
        if not self.staged:
            return dict(own)
        parts = sorted(self.everyone.gather_objects((self.stage, dict(own))), key=lambda part: part[0])
        found = {name: item for _, part in reversed(parts) for name, item in part.items()}
        names = dict.fromkeys(name for _, part in parts for name in part)
        return {name: found[name] for name in sorted(names, key=lambda name: not name.startswith(f"{TIED}."))}

    def alike(self, params: Sequence[Tensor]) -> Communicator:
        """The ranks that hold the same of some parameters; raises as `of`."""
        return self.of(params) if self.grid is None or sliced(params) else self.everyone

    def replicas(self, flat: FlatGroup) -> Communicator | None:
        """The ranks that step the same tensor as this one; None for this one alone."""
        if self._stage == 0:
            return self.alike(flat.lp_params)
        return None if self.grid is None or sliced(flat.lp_params) else self.grid.row

    def sharers(self, flat: FlatGroup) -> Communicator:
        """The ranks that have the matrices of a tensor together, each some fragments."""
        if self.grid is None or not sliced(flat.lp_params):
            return flat.communicator
        return self.grid.row if self._stage == 0 else self.everyone

    def buffer(self, number: int, flat: FlatGroup) -> tuple[list[Mapping[int, MatrixShard]], int]:
        """Where the matrices of a tensor lie, as `plan_groups` takes it: over its `sharers`, the same on all of them.

        Args:
            number: of the tensor among all.
            flat: the tensor.

        Raises:
            ValueError: as of `FlatGroup.matrices`, or the slices of a matrix do not make up the whole.
        """
        if self.grid is None or not sliced(flat.lp_params):
            return flat.matrices(self.names), flat.partitioning.partition_size
        names = [self.names[id(param)] for param in flat.lp_params]
        return self.grid.buffer(number, flat, names, self._stage, self._optimizer.algorithm.name)

    def of(self, params: Sequence[Tensor]) -> Communicator:
        """The ranks that ZeRO cuts some parameters over, or leaves them alike at stage 0; the same for all of them.

        Raises:
            ValueError: they are not.
        """
        kinds = {param.group_name if is_moe_param(param) else None for param in params}
        if len(kinds) > 1:
            raise ValueError(
                f"{self._optimizer.algorithm.name}: a param group holds experts of a DeepSpeed MoE layer and other "
                "parameters, which ZeRO partitions over different ranks; give them groups of their own by "
                "deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer."
            )
        return self.dense if kinds in (set(), {None}) else self._experts[kinds.pop()]

    def everywhere(self, params: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """The names of some parameters on all ranks, each with the parameter that this rank has in its place."""
        copies = [self._copies.get(id(param), (self.names.get(id(param), ""),)) for param in params]
        count = max(map(len, copies), default=0)
        return [
            (names[rank], param)
            for rank in range(count)
            for names, param in zip(copies, params, strict=True)
            if rank < len(names)
        ]


def expert_names(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """By `id` of an expert's parameter, the names of what the ranks of its expert-parallel group hold in its place."""
    found = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, Experts):
            continue
        path, count = path.replace("_orig_mod.", ""), len(layer.deepspeed_experts)
        prefix = f"{path}.deepspeed_experts" if path else "deepspeed_experts"
        for index, expert in enumerate(layer.deepspeed_experts):
            for name, param in normalized(dict(expert.named_parameters())).items():
                ranks = range(groups._get_expert_parallel_world_size(param.group_name))
                found[id(param)] = tuple(f"{prefix}.{rank * count + index}.{name}" for rank in ranks)
    return found


def _experts_in(params: Iterable[Tensor]) -> list[Tensor]:
    return [param for param in params if is_moe_param(param)]


def _layer_of(name: str) -> str:
    return name.partition(".deepspeed_experts.")[0]


def _number_of(name: str) -> int:
    return int(name.partition("deepspeed_experts.")[2].partition(".")[0])
