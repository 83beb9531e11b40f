"""States that leave the device or the memory, for the features of `feature_jobs.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed

from ds_fira.engine.deepspeed.save_load.calls import replaced
from tests.compatibility.engines import trained
from tests.distributed.nvme_jobs import parity


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


def partly_offloaded(ds_config: dict[str, Any]) -> dict[str, Any]:
    """A part of the sub-groups on the accelerator; a CPU under another name stands for it where there is no other."""
    places: set[str] = set()
    name = get_accelerator()._name if torch.cuda.is_available() else "cpu:0"
    with replaced(get_accelerator(), _name=name):
        found = trained(ds_config, prepare=lambda engine: places.update(engine.optimizer.subgroup_to_device.values()))
    return {**found, "wrong": found["wrong"] or f"all on {places}" * (len(places) < 2)} if "wrong" in found else found


def on_nvme(ds_config: dict[str, Any]) -> dict[str, Any]:
    """A model that is large enough for DeepSpeed to put it there; the swap files in a folder of its own."""
    folder = [tempfile.mkdtemp() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(folder)
    block = ds_config["zero_optimization"]
    how = {key: value for key, value in block["offload_optimizer"].items() if key != "nvme_path"}
    found = parity(folder[0], "bf16", params="offload_param" in block, **how)
    files = [path.stat().st_size for path in Path(folder[0]).rglob("*.swp")]
    return {**found, "wrong": found["wrong"] or "nothing is in files" * (sum(files) < 2**24)}
