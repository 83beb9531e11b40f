"""What the ranks of a test pool run with the optimizer on NVMe: models whose parts are large enough to be swapped.

The operator that reads and writes is compiled when it is first used, which takes minutes: see `operator_is_built`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, distributed
from torch.utils.cpp_extension import get_default_build_root

from ds_fira.optim.registry import fira_of
from tests.compatibility.engine_tensors import in_memory
from tests.compatibility.option_jobs import PARAMS, STEPS, WatchedNet, measure
from tests.distributed.probes import stepped_and_states
from tests.distributed.zero_jobs import batches, build, config

# The swapper takes what has a MiB. No part but the first of a group begins at a block of a disk.
SHAPES, VOCABULARY = [(133, 4000), (133, 4000), (11, 14)], 88_000
MAKE = functools.partial(WatchedNet, SHAPES, VOCABULARY)


def operator_is_built() -> bool:
    """Whether DeepSpeed's async_io is there: installed with DeepSpeed, or compiled on this machine before."""
    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        return False
    found = [*Path(get_default_build_root()).glob("*/async_io/async_io*.so")]
    return bool(found) or builder.jit_mode is False


def nvme_config(folder: str, dtype: str, params: bool = False, **how: Any) -> dict[str, Any]:
    """A config of stage 3 with the optimizer on NVMe, or where `how` says, and the parameters there too where asked."""
    block = {"device": "nvme", "nvme_path": folder}
    extra = {"zero_offload_optimizer": {**block, **how}}
    if params:
        extra["zero_offload_param"] = {**block, "buffer_size": 2_000_000, "max_in_cpu": 0}
    return config(3, dtype, PARAMS, **extra)


def parity(folder: str, dtype: str, **how: Any) -> dict[str, Any]:
    """`tests.compatibility.option_jobs.measure` of such a training.

    Returns:
        What it does; `swapped`: by partition the number of tensors that are in files; `moment`, `rows`: whether a
        moment has values that are in a file, and whether low-rank states are in memory.
    """
    torch.manual_seed(0)
    model = MAKE()
    engine = build(nvme_config(folder, dtype, **how), SHAPES, model=model)
    found = measure(engine, model, batches(STEPS, distributed.get_rank()), 1, 0.0, MAKE)
    swapper, optimizer = engine.optimizer.optimizer_swapper, fira_of(engine)
    params = dict(engine.module.named_parameters())
    found |= {
        "swapped": sorted(len(info.tensors) for info in swapper.swap_params_info.values()),
        "held": [info.tensors[0].compute_tensor.numel() for info in swapper.swap_params_info.values()],
        "moment": bool(safe_get_full_optimizer_state(params["lm_head.weight"], "exp_avg").any()),
        "low_rank": all(
            value.numel() > 0 for flat in optimizer.attachment.matrices for value in optimizer.state[flat].values()
        ),
    }
    engine.destroy()
    return found


def _ends(engine: Any) -> dict[str, Tensor]:
    return {name: safe_get_full_fp32_param(param).clone() for name, param in engine.module.named_parameters()}


def _advance(engine: Any, tokens: list[Tensor]) -> None:
    engine.module.watched = False
    for batch in tokens:
        engine.backward(engine(batch))
        engine.step()


def save(ds_config: dict[str, Any], folder: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Two steps, a checkpoint, two steps; all ranks with the same batches. Returns the weights, this rank's tensors."""
    torch.manual_seed(0)
    engine = build(ds_config, SHAPES, model=MAKE())
    tokens = batches(4, 0)
    _advance(engine, tokens[:2])
    engine.save_checkpoint(folder)
    _advance(engine, tokens[2:])
    return _ended(engine)


def load(ds_config: dict[str, Any], folder: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The same from the checkpoint on, in an engine with other weights."""
    torch.manual_seed(7)
    engine = build(ds_config, SHAPES, model=MAKE())
    assert engine.load_checkpoint(folder)[0] is not None
    _advance(engine, batches(4, 0)[2:])
    return _ended(engine)


def _ended(engine: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    weights = _ends(engine)
    with in_memory(engine):
        own = [tensor.clone() for tensor in stepped_and_states(engine)]
    engine.destroy()
    return weights, own
