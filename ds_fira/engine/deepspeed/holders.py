"""Which ranks hold a parameter alike, or cut it over themselves, and the name by which all ranks know it.

Most parameters are held by all data-parallel ranks, under the name that the module gives. Experts of a DeepSpeed MoE
layer are not: the ranks of an expert-parallel group hold different ones, all called 0, 1 and so on, and one expert is
held by the ranks of an expert-data-parallel group. Nor are the layers of a pipeline, each of which is held by the
data-parallel ranks of its stage. Everything else here goes by what this file says.

Written against DeepSpeed 0.17 to 0.19. What it relies on: `is_moe_param` tells experts, whose `group_name` is the key
of their process groups; `deepspeed.moe.experts.Experts` holds rank e's share of n experts in its list
`deepspeed_experts`, of which number i is expert e n + i of the layer. `PipelineModule` names a layer by its number in
the whole model; `tied_comms` lists for each module that several stages hold the `ranks` with a copy, and in
`weight_attr` what of it they keep alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from deepspeed.moe.experts import Experts
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import groups
from torch import Tensor, nn

from ds_fira.core.whole_model import TIED
from ds_fira.engine.deepspeed.save_load.files import StageRank, normalized
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.comm import Communicator

T = TypeVar("T")


class Holders:
    """The ranks and names of an engine's parameters; made by a collective call where a pipeline has several stages.

    Attributes:
        everyone: all ranks that train together.
        dense: of these, the data-parallel ranks, which hold what is no expert: in a pipeline those of this stage.
        stage: of a pipeline this rank's, else 0.
        staged: whether other ranks hold other stages.
        names: of this rank's parameters, by their `id`: the same on every rank that holds one.
        order: the names of the parameters of all ranks, in the module's order and that of the layer's experts.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.dense = Communicator(engine.seq_data_parallel_group)
        self.staged = stages_of(engine.module) > 1
        self.stage = engine.module.stage_id if self.staged else 0
        self.everyone = Communicator() if self.staged else self.dense
        self._optimizer: LowRankOptimizer = engine.basic_optimizer
        self._stage = engine.zero_optimization_stage()
        found = getattr(engine, "expert_data_parallel_group", None) or {}
        self._experts = {name: Communicator(group) for name, group in found.items()}
        own = normalized(dict(engine.module.named_parameters()))
        self._copies = expert_names(engine.module)
        self.names = {id(param): name for name, param in own.items()}
        self.names |= untied_names(engine.module) if self.staged else {}
        ranks = {id(param): groups._get_expert_parallel_rank(param.group_name) for param in _experts_in(own.values())}
        self.names |= {key: copies[ranks[key]] for key, copies in self._copies.items()}
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
        if self._stage == 0 and self._copies:
            return 0, groups._get_expert_parallel_rank(groups._get_max_expert_size_name())
        return self.stage, self.dense.dp_rank

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

    def of(self, params: Sequence[Tensor]) -> Communicator:
        """The ranks that hold some parameters, which have to be the same for all of them.

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


def stages_of(module: nn.Module) -> int:
    """How many stages a module is cut into: 1 where it is no pipeline."""
    return module.num_stages if isinstance(module, PipelineModule) else 1


def shared_by_stages(module: PipelineModule) -> set[int]:
    """`id` of the parameters of this stage that other stages hold too, and keep alike."""
    return {id(weight) for weight, _ in module.get_tied_weights_and_groups()}


def untied_names(module: PipelineModule) -> dict[int, str]:
    """By `id`, names of what tied modules hold beside what is tied: each stage has its own under the same name."""
    shared, found = shared_by_stages(module), {}
    for key, tie in module.tied_comms.items():
        copy = sorted(tie["ranks"]).index(module.global_rank)
        for name, param in normalized(dict(module.tied_modules[key].named_parameters())).items():
            if copy and id(param) not in shared:
                found[id(param)] = f"{TIED}.{key}@{copy}.{name}"
    return found


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
