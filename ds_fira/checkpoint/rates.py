"""Learning rates where a run goes on with another optimizer: its own, at the place where the schedule is.

Two optimizers seldom want the same rate. So the rate that a group was made with stays, and of the run that saved comes
what a schedule had made of its own: lr / initial_lr. Where no schedule of torch's has left an initial_lr, the rate
stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ds_fira.checkpoint.reconcile import Members, SavedGroup

BASES, LAST = "base_lrs", "_last_lr"


def carry_rates(saved: Sequence[SavedGroup], groups: Sequence[dict[str, object]], members: Sequence[Members]) -> None:
    """Give param groups their own learning rates as far down, or up, as the schedule had come.

    Args:
        saved: the groups of the run that saved.
        groups: the param groups now; changed.
        members: of each, names and shapes of its parameters, over all ranks.
    """
    before = {name: group.values for group in saved for name in group.members}
    for group, listed in zip(groups, members, strict=True):
        values = next((before[name] for name, _ in listed if name in before), {})
        base = float(values.get("initial_lr") or 0.0)
        if not base or "initial_lr" not in group:
            continue
        rate = float(group["initial_lr"]) * float(values["lr"]) / base
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def with_own_rates(state: object, own: object) -> object:
    """The state of a scheduler with the rates that the new one starts from.

    Args:
        state: saved, its lists as long as the groups now.
        own: the state dict of the new scheduler.
    """
    if isinstance(state, dict) and isinstance(own, Mapping):
        result = {key: with_own_rates(value, own.get(key)) for key, value in state.items()}
        bases, mine = state.get(BASES), own.get(BASES)
        if isinstance(bases, list) and isinstance(mine, list) and len(bases) == len(mine):
            result[BASES] = list(mine)
            if isinstance(state.get(LAST), list) and len(state[LAST]) == len(mine) and all(map(float, bases)):
                rates = zip(mine, state[LAST], bases, strict=True)
                result[LAST] = [float(new) * float(last) / float(old) for new, last, old in rates]
        return result
    if isinstance(state, list | tuple) and isinstance(own, list | tuple) and len(state) == len(own):
        return type(state)(with_own_rates(value, mine) for value, mine in zip(state, own, strict=True))
    return state
