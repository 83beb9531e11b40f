"""What the ranks of a test pool run to see whether a resumed run is the uninterrupted one, to the bit."""

from __future__ import annotations

import random
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.runtime import torch_autocast
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import ds_fira
from ds_fira.engine.deepspeed.loss_scale import autocast_scaler
from ds_fira.optim.registry import fira_of
from tests.distributed.zero_jobs import Net, batches

# Takes part in the loss, so that a wrong state of any generator shows in the weights.
SCALE = 0.1


class NoisyNet(Net):
    """`Net` with dropout, and with noise of Python's and numpy's generators in its loss."""

    def forward(self, tokens: Tensor) -> Tensor:
        noise = 1.0 + SCALE * (random.random() + float(np.random.rand()))
        dropped = nn.functional.dropout(self.lm_head(self.norm(self.embedding(tokens))), 0.5, self.training)
        return super().forward(tokens) * noise + dropped.square().mean()


def build_noisy(ds_config: dict[str, Any], shapes: list[tuple[int, int]], seed: int, torch_schedule: bool) -> Any:
    """An engine around `NoisyNet`, of generators that differ from rank to rank."""
    torch.manual_seed(seed)
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # which DeepSpeed leaves true for every later engine
    model = NoisyNet(shapes)
    model = model.bfloat16() if "bf16" in ds_config else model.half() if "fp16" in ds_config else model
    schedule = (lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 / (1 + step))) if torch_schedule else None
    engine = deepspeed.initialize(
        model=model, config=ds_config, model_parameters=list(model.parameters()), lr_scheduler=schedule
    )[0]
    own = 10 * seed + torch.distributed.get_rank()
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own)
    return engine


def make_step(engine: Any, step: int, overflow_at: int | None) -> list[float]:
    """One optimizer step on the batches of that step; the losses. At `overflow_at` a gradient is infinite."""
    accumulation = engine.gradient_accumulation_steps()
    losses = []
    for tokens in batches((step + 1) * accumulation, torch.distributed.get_rank())[-accumulation:]:
        loss = engine(tokens)
        weight = engine.module.layers[1].weight
        fault = weight.register_hook(lambda grad: torch.full_like(grad, torch.inf)) if step == overflow_at else None
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        if fault is not None:
            fault.remove()
    return losses


def snapshot(engine: Any) -> dict[str, Any]:
    """Everything that the next step depends on, and what a user is told; copies."""
    optimizer = fira_of(engine)
    found: dict[str, Any] = {f"lp {name}": param for name, param in engine.module.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for i, param in enumerate(params):
        found[f"hp {i}"] = param
        found |= {f"state {i} {key}": value for key, value in optimizer.state[param].items()}
    found["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    found["scheduler"] = None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict()
    found["counts"] = [engine.global_steps, engine.global_samples, engine.skipped_steps]
    found["loss scale"] = loss_scale(engine.optimizer)
    scaler = autocast_scaler(engine)
    found["autocast scale"] = None if scaler is None else scaler.state_dict()
    found["metrics"] = {k: v for k, v in ds_fira.metrics(engine).items() if k != "refresh_seconds"}
    found["random"] = [torch.get_rng_state(), random.getstate(), *np.random.get_state()]
    return {key: copied(value) for key, value in found.items()}


def loss_scale(wrapper: Any) -> dict[str, Any]:
    """The scale and its window, from whichever object the wrapper keeps them in."""
    for name in ("loss_scaler", "loss_scale_config"):
        if getattr(wrapper, name, None) is not None:
            return {k: v for k, v in vars(getattr(wrapper, name)).items() if isinstance(v, (bool, int, float))}
    return {}


def copied(value: Any) -> Any:
    """Tensors and arrays as copies, lists and dicts of them too."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.int64))
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, dtypes too."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
            return False
        return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def resume_everywhere(
    ds_config: dict[str, Any],
    shapes: list[tuple[int, int]],
    steps: int,
    folder: str,
    torch_schedule: bool = False,
    overflow_at: int | None = None,
    rollback: bool = False,
) -> tuple[list[str], dict[str, Any]]:
    """Save one run at every step, resume it from each, and compare everything after the load and three further steps.

    Args:
        ds_config: DeepSpeed config.
        shapes: of the linear layers.
        steps: optimizer steps of the run.
        folder: for the checkpoints.
        torch_schedule: whether torch's LambdaLR sets the learning rate.
        overflow_at: see `make_step`.
        rollback: whether the running engine itself goes back, instead of a new one.

    Returns:
        What differed ("saved at 2, after 3: hp 0"), and the last step's snapshot, without tensors.
    """
    engine = build_noisy(ds_config, shapes, 0, torch_schedule)
    expected, losses = [snapshot(engine)], []
    for step in range(steps):
        losses.append(make_step(engine, step, overflow_at))
        expected.append(snapshot(engine))
        if step + 1 < steps:
            engine.save_checkpoint(folder, tag=str(step + 1), client_state={"place": step + 1})
    wrong, order = [], list(range(1, steps))
    if rollback:
        # Forward too, to a refresh that the engine as it was before the load would not expect.
        engine.load_checkpoint(folder, tag="1")
        make_step(engine, 1, overflow_at)
        order = [4, 3, 1, 2, *order[4:]]
    for saved_at in order:
        if not rollback:
            engine.destroy()
            engine = build_noisy(ds_config, shapes, 7, torch_schedule)
        _, client_state = engine.load_checkpoint(folder, tag=str(saved_at))
        if client_state["place"] != saved_at or "ds_fira" in client_state:
            wrong.append(f"saved at {saved_at}: client state {sorted(client_state)}")
        wrong += differences(saved_at, saved_at, expected[saved_at], snapshot(engine))
        # As many as from one refresh to the next.
        for step in range(saved_at, min(saved_at + 3, steps)):
            if make_step(engine, step, overflow_at) != losses[step]:
                wrong.append(f"saved at {saved_at}, after {step + 1}: loss")
            wrong += differences(saved_at, step + 1, expected[step + 1], snapshot(engine))
    engine.destroy()
    return wrong, {key: expected[-1][key] for key in ("counts", "loss scale", "metrics", "scheduler")}


def differences(saved_at: int, step: int, expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The entries of two snapshots that differ."""
    keys = sorted(expected.keys() | found.keys())
    differing = [key for key in keys if key not in expected or key not in found or not same(expected[key], found[key])]
    return [f"saved at {saved_at}, after {step}: {key}" for key in differing]


def save_here(ds_config: dict[str, Any], shapes: list[tuple[int, int]], steps: int, folder: str) -> dict[str, Any]:
    """Train and save; the metrics, and the state of torch's generator on this rank."""
    engine = build_noisy(ds_config, shapes, 0, False)
    for step in range(steps):
        make_step(engine, step, None)
    engine.save_checkpoint(folder)
    found = {"metrics": ds_fira.metrics(engine), "random": torch.get_rng_state()}
    engine.destroy()
    return found


def load_here(ds_config: dict[str, Any], shapes: list[tuple[int, int]], folder: str, **how: Any) -> dict[str, Any]:
    """Load into a new engine and make two steps, with files of events.

    Args:
        ds_config: DeepSpeed config.
        shapes: of the linear layers.
        folder: of the checkpoint.
        **how: to load, as `engine.load_checkpoint` takes it.

    Returns:
        `metrics` after the load, `trained` after the steps; `random` and `before`, torch's generator on this rank
        after and before the load.
    """
    engine = build_noisy(ds_config, shapes, 7, False)
    before = torch.get_rng_state()
    engine.load_checkpoint(folder, **how)
    found = {"metrics": ds_fira.metrics(engine), "random": torch.get_rng_state(), "before": before}
    for step in range(2):
        make_step(engine, step, None)
    found["trained"] = ds_fira.metrics(engine)
    engine.destroy()
    return found
