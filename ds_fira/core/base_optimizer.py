"""The base optimizer inside Fira: Adam, or a user's rule (Algorithm 2), on the low-rank gradient of a matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core import quantization
from ds_fira.core.norms import squared_norms
from ds_fira.core.quantization import Stored
from ds_fira.core.rules import Rule
from ds_fira.core.scalars import Scalar
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import EXP_AVG, EXP_AVG_SQ, MatrixState


def step_factor(step: Tensor, settings: GroupSettings, host: bool = False) -> Scalar:
    """The base optimizer's factor of the learning rate: Adam's bias correction, or the rule's `step_size`.

    Args:
        step: this step's count, from 1; int64, 0-dim or (k,).
        settings: of the param group.
        host: whether to return a number rather than a tensor like `step`, float64.
    """
    if settings.rule is None:
        return F.bias_correction(int(step) if host else step, settings.betas)
    factor = settings.rule.step_size(step)
    return (
        float(factor) if host else torch.as_tensor(factor, dtype=torch.float64, device=step.device).expand(step.shape)
    )


def adapt(
    low_rank: Tensor, state: MatrixState, settings: GroupSettings, grad_finite: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines 9 to 11 of Algorithm 1 on the stored moments, which change where the gradient is finite.

    Args:
        low_rank: R, (r, n) left or (m, r) right.
        state: its moments are of R's shape; its step is this step's count.
        settings: of the param group.
        grad_finite: whether R comes from a finite gradient; read by a rule's states alone, as without a rule the
            caller has asked for that already.

    Returns:
        N, of R's shape; `squared_norms` of N and of R.
    """
    if settings.rule is not None:
        direction = _rule_direction(settings.rule, low_rank, state, grad_finite)
        return direction, squared_norms(direction, state.side), squared_norms(low_rank, state.side)
    exp_avg, exp_avg_sq = (quantization.read(state.moments[key], state.dtype) for key in (EXP_AVG, EXP_AVG_SQ))
    result = F.adam_direction_(
        low_rank,
        exp_avg,
        exp_avg_sq,
        betas=settings.betas,
        eps=settings.eps,
        side=state.side,
    )
    store(state.moments, {EXP_AVG: exp_avg, EXP_AVG_SQ: exp_avg_sq}, state.step)
    return result


def advance(rule: Rule, grad: Tensor, states: dict[str, Tensor], step: Tensor) -> Tensor:
    """N as `Rule.direction` gives it, in memory of its own; the states change in place.

    Raises:
        ValueError: the rule breaks its contract, in one sentence.
    """
    # The rule may change its gradient; the caller's R is still needed, and N is used up.
    given, own, name = dict(states), grad.clone(), type(rule).__name__
    direction = rule.direction(own, states, step)
    if not isinstance(direction, Tensor) or direction.shape != grad.shape:
        found = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(
            f"{name}.direction returned {found} for a gradient of shape {tuple(grad.shape)}; return a tensor of that "
            "shape."
        )
    for key, value in states.items():
        if key not in given or value.shape != grad.shape:
            raise ValueError(
                f"{name}.direction left a state {key!r} of shape {tuple(value.shape)}; keep the states that "
                "Rule.states names, in the gradient's shape."
            )
        if value is not given[key]:
            states[key] = given[key].copy_(value)
    return direction if direction is own else direction.to(grad.dtype, copy=True)


def _rule_direction(rule: Rule, low_rank: Tensor, state: MatrixState, grad_finite: Tensor | bool) -> Tensor:
    """N of one matrix's R by a rule; on a device that decides itself, a gradient that is not finite changes nothing."""
    states = {name: quantization.read(stored, low_rank.dtype) for name, stored in state.moments.items()}
    if isinstance(grad_finite, Tensor):
        before = {name: value.clone() for name, value in states.items()}
        direction = advance(rule, torch.where(grad_finite, low_rank, 0.0), states, state.step)
        for name, value in states.items():
            value.copy_(torch.where(grad_finite, value, before[name]))
    else:
        direction = advance(rule, low_rank, states, state.step)
    store(state.moments, states, state.step)
    return direction


def store(moments: dict[str, Stored], values: Mapping[str, Tensor], step: Tensor | int, start: int = 0) -> None:
    """Store states that were read and updated; the noise of their rounding goes by the step count."""
    for place, (name, stored) in enumerate(moments.items()):
        if stored[quantization.VALUES] is not values[name]:
            quantization.write_(stored, values[name], seed=len(moments) * step + place, start=start)
