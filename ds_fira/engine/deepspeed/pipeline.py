"""The stages of a pipeline: which parameters several of them hold, and by which names all of them know a parameter.

Written against DeepSpeed 0.17 to 0.19. What it relies on: `PipelineModule` names a layer by its number in the
whole model; `tied_comms` lists for each module that several stages hold the `ranks` with a copy, and in `weight_attr`
what of it they keep alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import nn

from ds_fira.core.whole_model import TIED
from ds_fira.engine.deepspeed.flat_groups import FlatGroup
from ds_fira.engine.deepspeed.projection import kinds_of
from ds_fira.engine.deepspeed.save_load.files import normalized
from ds_fira.optim.base import LowRankOptimizer


def stages_of(module: nn.Module) -> int:
    """How many stages a module is cut into: 1 where it is no pipeline."""
    return module.num_stages if isinstance(module, PipelineModule) else 1


def shared_by_stages(module: PipelineModule) -> set[int]:
    """`id` of the parameters of this stage that other stages hold too, and keep alike."""
    return {id(weight) for weight, _ in module.get_tied_weights_and_groups()}


def second_copies(module: PipelineModule) -> set[str]:
    """The names of the parameters of this stage that an earlier one holds too, and keeps alike."""
    found, shared = set(), shared_by_stages(module)
    for key, tie in module.tied_comms.items():
        if sorted(tie["ranks"]).index(module.global_rank):
            named = normalized(dict(module.tied_modules[key].named_parameters()))
            found |= {f"{TIED}.{key}.{name}" for name, param in named.items() if id(param) in shared}
    return found


def untied_names(module: PipelineModule) -> dict[int, str]:
    """By `id`, names of what tied modules hold beside what is tied: each stage has its own under the same name."""
    shared, found = shared_by_stages(module), {}
    for key, tie in module.tied_comms.items():
        copy = sorted(tie["ranks"]).index(module.global_rank)
        for name, param in normalized(dict(module.tied_modules[key].named_parameters())).items():
            if copy and id(param) not in shared:
                found[id(param)] = f"{TIED}.{key}@{copy}.{name}"
    return found


def refuse_shared(engine: DeepSpeedEngine, optimizer: LowRankOptimizer, flats: Sequence[FlatGroup]) -> None:
    """Stop where a weight is projected of which several stages of a pipeline hold a copy.

    Each would step it in a basis of its own, cut in its own way, and the copies would drift apart by their rounding.

    Raises:
        ValueError: names the weight and the remedy.
    """
    shared = shared_by_stages(engine.module) if stages_of(engine.module) > 1 else set()
    for flat in flats:
        for param, projected in zip(flat.lp_params, kinds_of(flat, optimizer.param_groups), strict=True):
            if projected and id(param) in shared:
                name = next(name for name, own in engine.module.named_parameters() if own is param)
                raise ValueError(
                    f"{optimizer.algorithm.name}: {name} is tied over stages of the PipelineModule, and a weight of "
                    "which several stages hold a copy cannot be projected; leave it out of target_modules, or put it "
                    "into a param group with rank = None."
                )
