"""`plug` puts Fira around a base optimizer of the user's: Algorithm 2 of the paper (arXiv 2410.01623)."""

from __future__ import annotations

import inspect

from ds_fira.core.algorithms import ALGORITHMS, Algorithm
from ds_fira.core.rules import RMSProp, Rule
from ds_fira.core.state import BASIS, REFRESH_STEP, RESIDUAL_AVG_SQ, RESIDUAL_NORM, STEP
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.settings import LEGAL

# The settings of FiraAdam that belong to Adam.
ADAM_SETTINGS = ("betas", "eps")
# Names of states that are not a rule's.
TAKEN = (STEP, REFRESH_STEP, BASIS, RESIDUAL_NORM, RESIDUAL_AVG_SQ)
DOCUMENTATION = """Fira around {rule}, in place of Adam.

    Param groups with a `rank` are projected; their parameters are 2-D, or 3-D for experts. The others are stepped by
    {rule} alone. Where no group has one, the constructor's applies to the weights to project in all of them.

    Raises:
        ValueError: a value is out of range, or a parameter cannot be projected.
    """


def plug(rule: type[Rule], name: str | None = None) -> type[LowRankOptimizer]:
    """An optimizer that is Fira around a rule, for one process or, after `ds_fira.register`, for DeepSpeed.

    Args:
        rule: the base optimizer.
        name: of the class, and of the type in a DeepSpeed config; None for "Fira" and the rule's name. Checkpoints
            carry it.

    Returns:
        A class with FiraAdam's arguments, the rule's hyper-parameters in place of `betas` and `eps`.

    Raises:
        ValueError: the rule has no `direction`, its states or hyper-parameters have names that are taken, or another
            optimizer has this one.
    """
    name = name or f"Fira{rule.__name__}"
    before = ALGORITHMS.get(name)
    if before is not None and (before.rule is None or _home(before.rule) != _home(rule)):
        raise ValueError(f"plug: name = {name!r} belongs to another optimizer; give another name.")
    if inspect.isabstract(rule):
        raise ValueError(f"plug: {rule.__name__} has no direction; define direction(self, grad, states, step).")
    for field, info in rule.model_fields.items():
        if field in LEGAL and field not in ADAM_SETTINGS:
            raise ValueError(f"plug: {rule.__name__}.{field} has the name of a setting of Fira; rename it.")
        if info.is_required():
            raise ValueError(f"plug: {rule.__name__}.{field} has no default; give it one.")
    for state, kind in rule.states.items():
        if not state.isidentifier() or state in TAKEN or state.endswith("_scale"):
            raise ValueError(f"plug: {rule.__name__}.states names {state!r}, which means something else; rename it.")
        if kind not in ("first", "second", "reset"):
            raise ValueError(
                f"plug: {rule.__name__}.states[{state!r}] = {kind!r} is not legal; choose 'first', 'second' or 'reset'."
            )
    # What is not elementwise has to see the whole R.
    fixed = {} if rule.elementwise else {"exact_cuts": True}
    # A preset was tuned with Adam.
    without = (*(setting for setting in ADAM_SETTINGS if setting not in rule.model_fields), *fixed, "preset")
    algorithm = ALGORITHMS[name] = Algorithm(name, states=dict(rule.states), without=without, fixed=fixed, rule=rule)
    documentation = DOCUMENTATION.format(rule=rule.__name__)
    content = {"algorithm": algorithm, "__doc__": documentation, "__module__": rule.__module__}
    return type(name, (LowRankOptimizer,), content)


def _home(rule: type[Rule]) -> tuple[str, str]:
    """Where a rule is defined: a definition that is run again, as in a notebook, replaces the one before."""
    return rule.__module__, rule.__qualname__


FiraRMSProp = plug(RMSProp)
FiraRMSProp.__module__ = __name__
