"""Continue a run of the released code, PyPI `fira` (1.0.2) and `galore-torch` (1.0), in FiraAdam and GaLoreAdam.

Both keep a pickled projector per projected weight. Neither says which parameter a state belongs to but by its position.
`ds_fira.checkpoint.released_files` knows the contents.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable, Mapping
from itertools import chain

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_fira.checkpoint.errors import errors_name
from ds_fira.checkpoint.reconcile import refuse_changed_structure
from ds_fira.checkpoint.released_files import optimizer_part, released_state
from ds_fira.core.algorithms import FIRA_ADAM, GALORE_ADAM, KEY
from ds_fira.engine.deepspeed.attach import attach
from ds_fira.engine.deepspeed.projection import project_as_saved
from ds_fira.engine.deepspeed.save_load.check import agreed
from ds_fira.engine.deepspeed.save_load.files import normalized
from ds_fira.engine.deepspeed.save_load.written import stepped_params
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.registry import fira_of

# A param group of the released run, or its parameters or their names.
ReleasedGroup = Mapping[str, object] | Iterable[Tensor | str] | Tensor


def load_released_state(
    engine_or_optimizer: DeepSpeedEngine | Optimizer,
    state_dict: Mapping[str, object] | str | os.PathLike[str],
    groups: Iterable[ReleasedGroup],
    model: nn.Module | None = None,
) -> None:
    """Go on where an optimizer of `fira` or `galore-torch` stopped: basis, moments, step counts and the limiter.

    Weights are not touched: load them into the model first. Learning rate and schedule are the caller's.

    Args:
        engine_or_optimizer: a DeepSpeed engine that trains with FiraAdam or GaLoreAdam at any stage, or one of these
            optimizers; its rank, proj_type and gap as in the run that saved. After GaLore, GaLoreAdam goes on as
            GaLore, and with FiraAdam the run becomes Fira.
        state_dict: what that optimizer's `state_dict()` gave, the same on every rank; or what `read_released_state`
            gave of a file with it, alone or under "optimizer"; or the path of such a file, which that reads.
        groups: its param groups in their order: dicts with "params", or sequences of parameters of the model, or of
            their names.
        model: the model whose parameters `groups` holds; None for the engine's module, or for names.

    Raises:
        ValueError: the groups do not fit the state dict or the model, or the state was made with another rank or side,
            is not finite, of another shape or otherwise no state of such an optimizer; the same on every rank.
    """
    optimizer = fira_of(engine_or_optimizer)
    if model is None:
        model = getattr(engine_or_optimizer, "module", None)
    with agreed(optimizer):
        members = optimizer._members()
        state_dict = optimizer_part(state_dict)
        saved = released_state(state_dict, _names(groups, model, optimizer), dict(chain.from_iterable(members)))
        if optimizer.algorithm in (FIRA_ADAM, GALORE_ADAM):  # whose states are alike
            for group in saved.groups:
                group.values.update({KEY: optimizer.algorithm.name})
        refuse_changed_structure(saved.groups, optimizer.param_groups, members)
    # The released code projects at any rank.
    is_engine = hasattr(engine_or_optimizer, "basic_optimizer")
    with errors_name(optimizer.algorithm.name):
        project_as_saved(optimizer, saved.groups, functools.partial(attach, engine_or_optimizer) if is_engine else None)
    with agreed(optimizer), stepped_params(engine_or_optimizer):
        optimizer.restore(saved, weights=False)
    stepped = saved.matrices.keys() | saved.moments.keys()
    fresh = [name for group in saved.groups for name in group.members if name not in stepped]
    if fresh and (optimizer.communicator is None or optimizer.communicator.dp_rank == 0):
        warnings.warn(
            f"{optimizer.algorithm.name}: the released run has no state for {fresh[0]}"
            f"{f' and {len(fresh) - 1} more' if len(fresh) > 1 else ''}, which so begin anew.",
            stacklevel=2,
        )


def _names(groups: Iterable[ReleasedGroup], model: nn.Module | None, optimizer: LowRankOptimizer) -> list[list[str]]:
    """The names of the parameters of every group."""
    known = {id(param): name for name, param in normalized(dict(model.named_parameters())).items()} if model else {}
    if not optimizer.members:  # alone, where FiraAdam knows its parameters by their numbers
        listed = zip(optimizer.param_groups, optimizer._members(), strict=True)
        known = {id(p): name for group, names in listed for p, (name, _) in zip(group["params"], names, strict=True)}
    found = []
    for group in groups:
        params = group["params"] if isinstance(group, Mapping) else group
        params = [params] if isinstance(params, Tensor) else list(params)
        strangers = [p for p in params if not isinstance(p, str) and id(p) not in known]
        if strangers:
            raise ValueError(
                f"groups hold a parameter of shape {tuple(strangers[0].shape)} that is none of the model's; build them "
                "from the model given to DeepSpeed, or give names."
            )
        found.append([p if isinstance(p, str) else known[id(p)] for p in params])
    return found
