"""Ways to build or to drive an engine that are features by themselves, for the compatibility page."""

from __future__ import annotations

from typing import Any

import torch

from ds_fira.engine.deepspeed.loss_scale import autocast_scaler
from tests.compatibility.engines import trained
from tests.compatibility.option_jobs import WatchedNet


def compiled_engine(ds_config: dict[str, Any]) -> dict[str, Any]:
    """`engine.compile()`."""
    return trained(ds_config, prepare=lambda engine: engine.compile(backend="eager"))


def deepcompiled(ds_config: dict[str, Any]) -> dict[str, Any]:
    """`engine.compile()` with DeepSpeed's own passes."""
    return trained(ds_config, prepare=lambda engine: engine.compile())


def generating(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Evaluation between two steps, as of a model that generates; DeepSpeed's containers for that need a GPU."""

    def switch(engine: Any) -> None:
        step = engine.step

        def step_and_evaluate() -> None:
            step()
            engine.eval()
            engine.train()

        engine.step = step_and_evaluate

    return trained(ds_config, prepare=switch)


def compiled_model(ds_config: dict[str, Any]) -> dict[str, Any]:
    """`torch.compile(model)` before `deepspeed.initialize`: names get a prefix."""
    return trained(ds_config, wrap=lambda plain: torch.compile(plain, backend="eager"))


def in_float16(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Float16 autocast with a scale that no step is skipped for, and that grows in every second."""

    def start_low(engine: Any) -> None:
        scaler = autocast_scaler(engine)
        scaler.load_state_dict({**scaler.state_dict(), "scale": 256.0, "growth_interval": 2})

    return trained(ds_config, prepare=start_low)


def sparse_embedding(ds_config: dict[str, Any]) -> dict[str, Any]:
    """nn.Embedding(sparse=True)."""

    def make_sparse(plain: WatchedNet) -> WatchedNet:
        plain.embedding.sparse = True
        return plain

    return trained(ds_config, wrap=make_sparse)
