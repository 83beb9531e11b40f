"""Learning rates by the groups that the user gave, whatever an engine made of them.

ZeRO's flat partitions need param groups of one shape; schedulers, `engine.get_lr`, and whoever sets a rate of
`engine.optimizer.param_groups` count the user's groups. So they are given `LowRankOptimizer.user_groups`.

Written against DeepSpeed 0.17 to 0.19. What it relies on:

- `_configure_lr_scheduler` calls a function of the user's with `basic_optimizer`.
- DeepSpeed's own schedulers ask `lr_schedules.get_torch_optimizer` for the optimizer whose groups they change.
- ZeRO and the wrappers of stage 0 read the groups of `wrapper.optimizer`; `wrapper.param_groups`, a property, is for
  others, as for `engine.get_lr` and `get_mom`. At stage 0 in fp32 there is no wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.optim import Optimizer

from ds_fira.checkpoint.reconcile import SavedGroup, carry_schedule
from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.engine.deepspeed.save_load.calls import replaced
from ds_fira.optim.base import LowRankOptimizer


def show_user_groups(engine: DeepSpeedEngine) -> None:
    """Let `engine.optimizer` have the user's groups where it is the optimizer that the engine made, without a wrapper.

    An optimizer object of the user's stays the object that it is.
    """
    if engine.client_optimizer is None and engine.optimizer is engine.basic_optimizer:
        engine.optimizer = engine.basic_optimizer.user_groups


def schedule_user_groups(configure: Callable[..., None], engine: DeepSpeedEngine, *args: object) -> None:
    """`_configure_lr_scheduler`: a function of the user's makes a scheduler of the groups that the user gave."""
    if not trains_ours(engine):
        return configure(engine, *args)
    with replaced(engine, basic_optimizer=engine.basic_optimizer.user_groups):
        return configure(engine, *args)


def optimizer_to_schedule(find: Callable[[object], Optimizer], optimizer: object) -> Optimizer:
    """`get_torch_optimizer`: one of this package with the groups that the user gave."""
    found = find(optimizer)
    return found.user_groups if isinstance(found, LowRankOptimizer) else found


def param_groups_of(
    get: Callable[[DeepSpeedOptimizer], list[dict[str, Any]]], wrapper: DeepSpeedOptimizer
) -> Sequence[MutableMapping[str, Any]]:
    """`param_groups` of a wrapper: those that the user gave."""
    ours = isinstance(wrapper.optimizer, LowRankOptimizer)
    return wrapper.optimizer.shown_groups() if ours else get(wrapper)


@contextmanager
def carried_schedule(engine: DeepSpeedEngine, saved: Sequence[SavedGroup]) -> Iterator[None]:
    """For a while the engine's scheduler loads a state that has a value for each group of the run that saved it.

    Args:
        engine: with a scheduler or without.
        saved: the param groups of that run; none where it does not say.
    """
    scheduler, optimizer = engine.lr_scheduler, engine.basic_optimizer
    load = getattr(scheduler, "load_state_dict", None)
    if load is None or not saved:
        yield
        return
    # An object of the user's may be a scheduler of the optimizer as it was made, of its param groups.
    scheduled, members = getattr(scheduler, "optimizer", None), optimizer.members
    if len(getattr(scheduled, "param_groups", ())) != len(members):
        members = optimizer.of_user_groups(members)

    def load_carried(state: object) -> None:
        load(carry_schedule(state, scheduler.state_dict(), saved, members))

    # torch's schedulers save all their attributes; this one is gone before they do.
    with replaced(scheduler, load_state_dict=load_carried):
        yield
