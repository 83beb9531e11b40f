"""States that leave the device or the memory, for the features of `feature_jobs.py`."""

from __future__ import annotations

from typing import Any

from tests.compatibility.engines import trained


def offloaded_between_steps(ds_config: dict[str, Any]) -> dict[str, Any]:
    """`engine.offload_states()` and `engine.reload_states()` behind every step."""

    def prepare(engine: Any) -> None:
        step = engine.step

        def step_and_move() -> None:
            step()
            engine.offload_states()
            engine.reload_states()

        engine.step = step_and_move

    return trained(ds_config, prepare=prepare)
