"""A pipeline of DeepSpeed on real ranks, for the compatibility page."""

from __future__ import annotations

from typing import Any

from torch import distributed

from tests.compatibility.option_jobs import STEP_LIMIT, refuser, relative
from tests.distributed import pipe_jobs
from tests.distributed.pipe_reference import reference, whole_weights


def pipeline(ds_config: dict[str, Any]) -> dict[str, Any]:
    """A PipelineModule of two stages that share the embedding."""
    try:
        own = pipe_jobs.train(ds_config, stages=2, tied=True)
    except Exception as error:
        return {"message": f"{type(error).__name__}: {error}", "refused_by": refuser(error)}
    runs: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(runs, own)
    expected, _, apart = reference(runs, ds_config, pipelines=len(runs) // 2, tied=True)
    differences = {
        "step_difference": relative(whole_weights(runs, "after"), expected, whole_weights(runs, "before")),
        "gradient_difference": apart,
    }
    wrong = [name for name, value in differences.items() if not value < STEP_LIMIT["float32"]]
    return {"steps": pipe_jobs.STEPS, **differences, "wrong": "; ".join(wrong)}
