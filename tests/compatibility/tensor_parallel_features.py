"""AutoTP on real ranks, for the compatibility page."""

from __future__ import annotations

from typing import Any

from torch import distributed

from tests.compatibility.option_jobs import STEP_LIMIT, refuser, relative
from tests.distributed import tensor_parallel_jobs
from tests.distributed.tensor_parallel_reference import combined, given, in_order, reference, whole_of


def tensor_parallel(ds_config: dict[str, Any]) -> dict[str, Any]:
    """A LLaMA of which every rank has slices, of rows and of columns."""
    try:
        own = tensor_parallel_jobs.train(ds_config, "llama")
    except Exception as error:
        return {"message": f"{type(error).__name__}: {error}", "refused_by": refuser(error)}
    runs: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(runs, own)
    clip, steps, before = ds_config["gradient_clipping"], tensor_parallel_jobs.STEPS, own["whole"]
    after = whole_of([run["after"] for run in in_order(runs)[0]], {name: w.shape for name, w in before.items()})
    expected = reference(runs, ds_config["optimizer"]["params"], clip, steps)
    differences = {
        "step_difference": relative(after, expected, before),
        "gradient_difference": max(relative(given(runs, step), combined(runs, step, clip)) for step in range(steps)),
    }
    wrong = [name for name, value in differences.items() if not value < STEP_LIMIT["float32"]]
    return {"steps": steps, **differences, "wrong": "; ".join(wrong)}
