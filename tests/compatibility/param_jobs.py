"""What a script does with groups, single parameters, universal checkpoints, for the features of `feature_jobs.py`."""

from __future__ import annotations

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_optimizer_state
from torch import distributed

import ds_fira
from ds_fira.optim.registry import fira_of
from tests.compatibility.option_jobs import SHAPES, STEPS, WatchedNet, measure
from tests.distributed.probes import stepped_and_states
from tests.distributed.zero_jobs import batches, build

RATES = [0.01, 0.002]


def measured(
    ds_config: dict[str, Any], ask: Callable[[Any], str], groups: Callable[[WatchedNet], Any] | None = None
) -> dict[str, Any]:
    """`measure`, then what is asked of the engine and has to be answered with nothing that is wrong."""
    torch.manual_seed(0)
    plain, engine = WatchedNet(SHAPES), None
    try:
        given = {"model_parameters": groups(plain)} if groups else {}
        engine = build(ds_config, SHAPES, model=plain, **given)
        found = measure(engine, plain, batches(STEPS, distributed.get_rank()), 1, ds_config["gradient_clipping"])
        return {**found, "wrong": "; ".join(filter(None, (found["wrong"], ask(engine))))}
    except Exception as error:
        ours = str(error).startswith("FiraAdam: ")
        return {"message": f"{type(error).__name__}: {error}", "refused_by": "FiraAdam" if ours else "DeepSpeed"}
    finally:
        if engine is not None:
            engine.destroy()


def scheduled_groups(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Two groups, and DeepSpeed's WarmupLR with a rate for each, which it keeps: one process steps with the same."""

    def two(plain: WatchedNet) -> list[dict[str, Any]]:
        params = list(plain.parameters())
        return [{"params": params[::2]}, {"params": params[1::2]}]

    def ask(engine: Any) -> str:
        stepped = {group["lr"] for group in fira_of(engine).param_groups}
        return "" if engine.get_lr() == RATES and stepped == set(RATES) else "the groups have other rates"

    block = {"warmup_min_lr": RATES, "warmup_max_lr": RATES, "warmup_num_steps": 2}
    return measured({**ds_config, "scheduler": {"type": "WarmupLR", "params": block}}, ask, two)


def states_of_parameters(ds_config: dict[str, Any]) -> dict[str, Any]:
    """`safe_get_full_optimizer_state` of all that is not projected, `low_rank_state` of all that is."""

    def ask(engine: Any) -> str:
        projected = {record.name for record in fira_of(engine).inventory if record.rank is not None}
        for name, param in engine.module.named_parameters():
            shape = getattr(param, "ds_shape", param.shape)
            if name in projected:
                state = ds_fira.low_rank_state(engine, param)
                good = state.shape == tuple(shape) and bool(state.exp_avg.any())
            else:
                state = safe_get_full_optimizer_state(param, "exp_avg")
                good = state.shape == shape and bool(state.any())
            if not good:
                return f"the state of {name} is not there"
        return ""

    return measured(ds_config, ask)


def state_of_a_projected_one(ds_config: dict[str, Any]) -> dict[str, Any]:
    """`safe_get_full_optimizer_state` of a projected parameter."""

    def ask(engine: Any) -> str:
        safe_get_full_optimizer_state(dict(engine.module.named_parameters())["layers.0.weight"], "exp_avg")
        return "it gave something"

    return measured(ds_config, ask)


def universal_checkpoint(ds_config: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's converter makes of a checkpoint, loaded over a step that came after it."""

    def ask(engine: Any) -> str:
        rank, folder = distributed.get_rank(), [tempfile.mkdtemp()]
        distributed.broadcast_object_list(folder)
        saved = [tensor.clone() for tensor in stepped_and_states(engine)]
        engine.save_checkpoint(folder[0], "saved")
        if rank == 0:
            paths = {"input_folder": f"{folder[0]}/saved", "output_folder": f"{folder[0]}/universal"}
            alone = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
            ds_to_universal.main(Namespace(**paths, **alone, strict=True, inject_missing_state=False))
        distributed.barrier()
        engine.backward(engine(batches(1, rank, seed=2)[0]))
        engine.step()
        moved = any(not torch.equal(*pair) for pair in zip(saved, stepped_and_states(engine), strict=True))
        engine.load_checkpoint(folder[0])
        same = all(torch.equal(*pair) for pair in zip(saved, stepped_and_states(engine), strict=True))
        distributed.barrier()
        if rank == 0:
            shutil.rmtree(folder[0])
        return "" if moved and same else "the load gave another state"

    return measured({**ds_config, "checkpoint": {"load_universal": True}}, ask)


# Name, whether it is supported, stages, and the way.
ROWS: list[tuple[str, bool, tuple[int, ...], Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("two param groups, a scheduler with a value for each", True, (0, 1, 2, 3), scheduled_groups),
    ("`checkpoint.load_universal`, of what `ds_to_universal` makes", True, (1, 2, 3), universal_checkpoint),
    ("`safe_get_full_optimizer_state`, `ds_fira.low_rank_state`", True, (1, 2, 3), states_of_parameters),
    ("`safe_get_full_optimizer_state` of a projected parameter", False, (1, 2, 3), state_of_a_projected_one),
]
