"""Save and load what DeepSpeed's checkpoints lack for a run that goes on: random number generators, counters, records.

Written against DeepSpeed 0.19.8. What it relies on: `DeepSpeedEngine.save_checkpoint` writes `client_state` beside the
weights, and `load_checkpoint` gives it back, both on every rank. DeepSpeed itself saves weights, optimizer, scheduler,
loss scale (but that of float16 autocast) and the counts of steps and samples.

Every rank's part travels in one entry of the client state, `ds_fira`, which the caller does not see. It is read only
where optimizer states are loaded. Of another number of ranks, each takes over the generators that the rank of its
number had, and those beyond keep their own; counters go on from the sums. Recorded scaling factors are put together
over the ranks as they are saved.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.engine.deepspeed.loss_scale import autocast_scaler
from ds_fira.engine.deepspeed.monitor import forget_hook
from ds_fira.engine.deepspeed.save_load.calls import bound
from ds_fira.observe.metrics import StepMetrics

KEY = "ds_fira"
# Of a DeepSpeed config: the samples of a step, and what they are made of.
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# The parts of numpy's legacy generator's state beside its key.
NUMPY_PARTS = ("algorithm", "key", "position", "has_gauss", "cached_gaussian")


class RngState(TypedDict):
    """The states of the random number generators of a process; the names are keys in saved files."""

    cpu: Tensor
    device: Tensor | None
    python: list[object]
    numpy: dict[str, object]


def load_with_resume_state(
    load: Callable[..., tuple[str | None, dict[str, object] | None]],
    engine: DeepSpeedEngine,
    *args: object,
    **kwargs: object,
) -> tuple[str | None, dict[str, object] | None]:
    """`load_checkpoint`: also takes over what `resume_state` saved, where states are loaded."""
    path, client_state = load(engine, *args, **kwargs)
    if path is not None and trains_ours(engine) and dist.get_rank() == 0:
        _warn_of_another_batch(engine, client_state.get("ds_config"))
    saved = client_state.pop(KEY, None) if client_state else None
    given = bound(load, engine, *args, **kwargs).arguments
    with_states = given["load_optimizer_states"] and not given["load_module_only"]
    if saved is not None and with_states and trains_ours(engine):
        _restore(engine, saved)
    return path, client_state


def _warn_of_another_batch(engine: DeepSpeedEngine, saved: object) -> None:
    """Say that what counts steps, such as the Trainer's place in the data, is off where a step takes other rows."""
    before, now = _global_batch(saved, engine.loaded_checkpoint_dp_world_size), engine.train_batch_size()
    if before is not None and before != now:
        warnings.warn(
            f"{engine.basic_optimizer.algorithm.name}: a step takes {now} samples, and took {before} in the run that "
            "saved; schedules and the Trainer's place in the data count steps, so samples are left out or seen twice: "
            f"keep micro-batch x accumulation x ranks at {before}, or find the place in the data by samples.",
            stacklevel=3,
        )


def _global_batch(config: object, ranks: int) -> int | None:
    """The samples of a step in a DeepSpeed config; None where it does not say."""
    if not isinstance(config, Mapping):
        return None
    whole, micro, accumulation = (config.get(name) for name in BATCH_KEYS)
    if isinstance(whole, int):
        return whole
    return micro * (accumulation if isinstance(accumulation, int) else 1) * ranks if isinstance(micro, int) else None


def own_part(engine: DeepSpeedEngine) -> Callable[[], dict[str, object]]:
    """Generators and counters of this rank as they are now; what it returns makes of them what the others get."""
    states, metrics = _rng_states(), engine.basic_optimizer.metrics.state_dict()
    # A tensor among what is gathered would be a file of torch.save of its own.
    return lambda: {"rng": _with(Tensor, Tensor.numpy, _plain(states)), "metrics": metrics}


def own_record(engine: DeepSpeedEngine) -> dict[str, object]:
    """What all ranks know alike; a collective call where scaling factors are recorded."""
    optimizer, recorder = engine.basic_optimizer, engine.basic_optimizer.recorder
    found: dict[str, object] = {"replicated": optimizer.replicated}
    if (scaler := autocast_scaler(engine)) is not None:
        found["autocast_scaler"] = scaler.state_dict()
    if recorder is not None:
        found["scaling_factors"] = recorder.gather(optimizer.communicator, optimizer.replicated, optimizer.counts)
    return found


def resume_state(parts: Iterable[Mapping[str, object]], record: Mapping[str, object]) -> dict[str, object]:
    """What is saved for an exact resume.

    Args:
        parts: what `own_part` of every rank has made, in order of rank.
        record: of `own_record`.
    """
    return {"ranks": [{**part, "rng": _with(np.ndarray, torch.from_numpy, part["rng"])} for part in parts], **record}


def _with(kind: type, change: Callable[[object], object], value: object) -> object:
    """Nested dicts and lists in which every value of a kind is changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _with(kind, change, item) for key, item in value.items()}
    return [_with(kind, change, item) for item in value] if isinstance(value, list) else value


def _restore(engine: DeepSpeedEngine, saved: Mapping[str, object]) -> None:
    optimizer, ranks = engine.basic_optimizer, saved["ranks"]
    rank, size = optimizer.communicator.dp_rank, optimizer.communicator.dp_size
    if rank < len(ranks):
        set_rng_state(ranks[rank]["rng"])
    counters = [part["metrics"] for part in ranks]
    if size == len(ranks):
        own = counters[rank]
    else:
        own = StepMetrics.together(counters, saved["replicated"], counts=optimizer.replicated or rank == 0)
    optimizer.metrics.load_state_dict(own)
    if (scaler := autocast_scaler(engine)) is not None and saved.get("autocast_scaler"):
        scaler.load_state_dict(saved["autocast_scaler"])
    if optimizer.recorder is not None:
        optimizer.recorder.restart(saved.get("scaling_factors") or {})
    # It has counted the steps before the load, which belong to another run or are to be made again.
    forget_hook(engine)


def rng_state() -> RngState:
    """The states of torch's generators on the CPU and on this process's device, of Python's `random` and of numpy.

    Returns:
        Tensors, numbers, strings and lists, so that `torch.load(..., weights_only=True)` reads it: about 12 kB. The
        device's is None where the device is the CPU.
    """
    return _plain(_rng_states())


def _rng_states() -> tuple[object, ...]:
    """Copies of the generators' states, each as it is given."""
    device = get_accelerator().get_rng_state() if get_accelerator().device_name() != "cpu" else None
    # numpy's is the one that others draw from.
    return torch.get_rng_state(), device, random.getstate(), np.random.get_state()


def _plain(states: tuple[object, ...]) -> RngState:
    cpu, device, (version, internal, gauss_next), drawn = states
    numpy = dict(zip(NUMPY_PARTS, drawn, strict=True))
    return {
        "cpu": cpu,
        "device": device,
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss_next],
        "numpy": {**numpy, "key": torch.from_numpy(numpy["key"].astype(np.int64))},
    }


def set_rng_state(state: RngState) -> None:
    """Let the generators go on where `rng_state` was called; one of a device is left where the device is another.

    Args:
        state: of `rng_state`, of this process or one like it.
    """
    torch.set_rng_state(state["cpu"].cpu())
    if state["device"] is not None and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(state["device"].cpu())
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    numpy = {**state["numpy"], "key": state["numpy"]["key"].numpy().astype(np.uint32)}
    np.random.set_state(tuple(numpy[part] for part in NUMPY_PARTS))
