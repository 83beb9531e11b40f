"""Stop where a layer is thawed that the optimizer does not have: it would get gradients, and never a step.

Written against DeepSpeed 0.19.8. What it relies on: `DeepSpeedEngine._take_model_step` makes the optimizer step on
every rank; the gradient of a parameter that no group has stays in `grad` until then, at every stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_fira.engine.deepspeed.chosen import trains_ours

T = TypeVar("T")


def note_frozen(engine: DeepSpeedEngine) -> None:
    """Remember which parameters have no gradient when the engine is built."""
    engine.fira_frozen = [(name, param) for name, param in engine.module.named_parameters() if not param.requires_grad]


def refuse_thawed(take_model_step: Callable[..., T], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> T:
    """`_take_model_step`: stops before a step that would leave a thawed parameter out.

    Raises:
        ValueError: a parameter was frozen when the engine was built, and has a gradient now.
    """
    if trains_ours(engine):
        thawed = [name for name, param in engine.fira_frozen if param.grad is not None]
        if thawed:
            more = f" and {len(thawed) - 1} more" if len(thawed) > 1 else ""
            raise ValueError(
                f"{engine.basic_optimizer.algorithm.name}: {thawed[0]}{more} had requires_grad = False when "
                "deepspeed.initialize was called, and has a gradient now, but no place in the optimizer; let it "
                "require gradients before, with lr = 0 in a param group of its own until it is to train."
            )
    return take_model_step(engine, *args, **kwargs)
