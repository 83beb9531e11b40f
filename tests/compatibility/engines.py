"""An engine that trains as `option_jobs.try_config` has it, around a model or with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

from tests.compatibility.option_jobs import SHAPES, STEPS, WatchedNet, measure, refusal, refuser
from tests.distributed.zero_jobs import batches, build


def make_net() -> WatchedNet:
    """The same on every rank."""
    torch.manual_seed(0)
    return WatchedNet(SHAPES)


def trained(
    ds_config: dict[str, Any],
    wrap: Callable[[WatchedNet], nn.Module] | None = None,
    prepare: Callable[[Any], None] | None = None,
    plain: WatchedNet | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """`measure` around a model that may come wrapped, and an engine that something is done to before it trains."""
    engine = None
    try:
        plain = plain or make_net()
        engine = build(ds_config, SHAPES, model=wrap(plain) if wrap else plain, **kwargs)
        if prepare:
            prepare(engine)
        return measure(engine, plain, batches(STEPS, distributed.get_rank()), 1, ds_config["gradient_clipping"])
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if refuser(error) == "FiraAdam" and not kwargs:
            return refusal(message, ds_config, wrap, prepare)
        return {"message": message, "refused_by": refuser(error)}
    finally:
        if engine is not None:
            engine.destroy()
