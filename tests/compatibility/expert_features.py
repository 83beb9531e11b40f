"""DeepSpeed's MoE layers and AutoEP on real ranks, for the compatibility page."""

from __future__ import annotations

from typing import Any

from torch import distributed

from tests.compatibility.option_jobs import STEP_LIMIT, refuser, relative
from tests.distributed import expert_jobs
from tests.distributed.expert_reference import combined, given, reference


def moe(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Two of DeepSpeed's MoE layers: every rank holds other experts of the first, and all of the second.

    With AutoEP in the config every rank holds other experts of both.
    """
    try:
        own = expert_jobs.train(ds_config, [4, 2] if "expert_parallel" in ds_config else [(4, 2), (3, 1)])
    except Exception as error:
        return {"message": f"{type(error).__name__}: {error}", "refused_by": refuser(error)}
    runs: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(runs, own)
    stage, clip = ds_config["zero_optimization"]["stage"], ds_config["gradient_clipping"]
    before, after = ({name: w for run in runs for name, w in run[key].items()} for key in ("before", "after"))
    differences = {
        "step_difference": relative(after, reference(runs, ds_config["optimizer"]["params"], clip, stage), before),
        "gradient_difference": max(
            relative(given(runs, step), combined(runs, step, clip, stage)) for step in range(expert_jobs.STEPS)
        ),
    }
    wrong = [name for name, value in differences.items() if not value < STEP_LIMIT["float32"]]
    return {"steps": expert_jobs.STEPS, **differences, "wrong": "; ".join(wrong)}
