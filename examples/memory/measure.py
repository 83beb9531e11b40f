"""One cell of the memory experiment in one process: train a few steps, and say what every byte at the peak was for."""

from __future__ import annotations

import gc
import logging
import time
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.utils import logger

import ds_fira
from benchmarks.memory.allocation import CPU, Block, Recording, storages
from ds_fira.engine.deepspeed.engine_memory import held_tensors, is_offloaded

from .grid import Cell, Run, deepspeed_config

STATE_LABELS = ("master weights", "optimizer states", "host gradients", "host buffers")
# Label of what an engine holds, by the names of `held_tensors`.
LABELS = {
    "parameters": "parameters",
    "master_weights": "master weights",
    "optimizer_states": "optimizer states",
    "gradients": "gradients",
    "host_gradients": "host gradients",
    "buffers": "gradients",
    "host_gradient_buffers": "host gradients",
    "host_parameter_buffers": "host buffers",
}


class RefusedError(Exception):
    """DeepSpeed or FiraAdam does not train this combination."""


def measure(cell: Cell, run: Run) -> dict[str, Any]:
    """Train a cell and measure it; every rank calls it, with torch.distributed started.

    Returns:
        `device` and `host`: peak bytes of the last step, their categories, and the phase of the peak; `held_bytes`,
        what parameters, master weights and states take between steps; `tokens_per_second` over all ranks, refreshes
        left out; `unexplained_bytes`, by which allocations and frees do not add up to what is there in the end;
        `refreshes` of FiraAdam, the measured step's included.

    Raises:
        RefusedError: the engine was not built, or does not do what the config says.
    """
    logger.setLevel(logging.ERROR)
    torch.manual_seed(run.seed)
    model = build_model(run)
    recording = Recording()
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: recording.label("gradients", [param.grad]))
    engine = start_engine(cell, run, model)
    try:
        watch_optimizer(engine, recording)
        tokens = torch.randint(
            0, model.config.vocab_size, (run.micro_batch, run.seq_length), device=next(model.parameters()).device
        )
        return train(engine, run, tokens, recording)
    finally:
        engine.destroy()


def build_model(run: Run) -> torch.nn.Module:
    """A LLaMA in bf16, made where it will be trained: a float32 copy, or one on the host, never exists."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    config = transformers.LlamaConfig(**{**run.model, "use_cache": False})
    with device:
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa" if on_gpu else "eager"
        )


def start_engine(cell: Cell, run: Run, model: torch.nn.Module) -> deepspeed.DeepSpeedEngine:
    """The engine of a cell; raises `RefusedError` with what DeepSpeed or FiraAdam said."""
    config = deepspeed_config(cell, run, max(param.numel() for param in model.parameters()))
    try:
        ds_fira.checkpoint_activations(model, config, method=run.method if cell.checkpointing else "none")
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        raise RefusedError(str(error) or type(error).__name__) from error
    if cell.offload and not is_offloaded(engine):
        engine.destroy()
        raise RefusedError(f"DeepSpeed ignores offload_optimizer at stage {cell.stage}")
    return engine


def watch_optimizer(engine: deepspeed.DeepSpeedEngine, recording: Recording) -> None:
    """Label what the optimizer is given, and tell its own temporary memory from DeepSpeed's."""

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        name = "host gradients" if is_offloaded(engine) else "gradients"
        recording.label(name, [param.grad for group in optimizer.param_groups for param in group["params"]])
        recording.phase("optimizer")

    engine.basic_optimizer.register_step_pre_hook(before)
    engine.basic_optimizer.register_step_post_hook(lambda *_: recording.phase("step"))


def train(engine: deepspeed.DeepSpeedEngine, run: Run, tokens: torch.Tensor, recording: Recording) -> dict[str, Any]:
    """Two steps to warm up, the timed ones, and the measured one, which refreshes the subspaces."""
    for _ in range(2):
        step(engine, tokens)
    seconds = timed(engine, tokens, run.steps)
    if tokens.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    # What is left of an earlier engine would be freed in the middle of the measured step, which never allocated it.
    gc.collect()
    recording.begin()
    held = held_bytes(engine)
    step(engine, tokens, recording)
    label_all(engine, recording)
    recording.end()
    result = {
        "device": as_dict(recording.peak(lambda block: device_category(block, engine))),
        "host": as_dict(recording.peak(lambda block: host_category(block, engine))),
        "held_bytes": held,
        "tokens_per_second": run.processes * run.steps * tokens.numel() / seconds,
        "unexplained_bytes": recording.unexplained_bytes,
        "wrapper": type(engine.optimizer).__name__,
    }
    if tokens.is_cuda:
        result["allocator_peak_bytes"] = torch.cuda.max_memory_allocated()
    if type(engine.basic_optimizer) is ds_fira.FiraAdam:
        result["refreshes"] = ds_fira.metrics(engine)["refreshes"]
    return result


def step(engine: deepspeed.DeepSpeedEngine, tokens: torch.Tensor, recording: Recording | None = None) -> None:
    """One training step, recorded where a recording is given."""
    if recording is not None:
        label_all(engine, recording)
        recording.phase("forward")
    loss = engine(input_ids=tokens, labels=tokens).loss
    if recording is not None:
        recording.phase("backward")
    engine.backward(loss)
    if recording is not None:
        label_all(engine, recording)
        recording.phase("step")
    engine.step()


def timed(engine: deepspeed.DeepSpeedEngine, tokens: torch.Tensor, steps: int) -> float:
    """Seconds of some steps, from and to a barrier."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step(engine, tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - began


def label_all(engine: deepspeed.DeepSpeedEngine, recording: Recording) -> None:
    """Label everything that the engine holds now."""
    held = held_tensors(engine)
    for name, label in LABELS.items():
        recording.label(label, held[name])


def held_bytes(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """Bytes by purpose, every storage once."""
    seen: set[tuple[int, int]] = set()
    found: dict[str, int] = {}
    held = held_tensors(engine)
    for name, label in LABELS.items():
        own = {key: size for key, size in storages(held[name]) if key not in seen}
        seen |= own.keys()
        found[label] = found.get(label, 0) + sum(own.values())
    return found


def on_host(block: Block, engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether a block is host memory.

    On a CPU, where all of it is, the part is meant that offload moves there: master weights, states, their gradients,
    and what the optimizer allocates while it steps.
    """
    if next(engine.module.parameters()).is_cuda:
        return block.device == CPU
    return is_offloaded(engine) and (
        block.label in STATE_LABELS or (block.label is None and block.phase == "optimizer")
    )


def category_of(block: Block) -> str:
    """What a block is for."""
    if block.label is not None:
        return {"host gradients": "gradients", "host buffers": "other"}.get(block.label, block.label)
    if block.born == 0:
        return "other"
    return "activations" if block.phase in ("forward", "backward") else "temporary"


def device_category(block: Block, engine: deepspeed.DeepSpeedEngine) -> str | None:
    """Of blocks on the device."""
    return None if on_host(block, engine) else category_of(block)


def host_category(block: Block, engine: deepspeed.DeepSpeedEngine) -> str | None:
    """Of blocks on the host."""
    return category_of(block) if on_host(block, engine) else None


def as_dict(peak: Any) -> dict[str, Any]:
    """A peak for JSON."""
    return {"peak_bytes": peak.bytes, "categories": dict(sorted(peak.by_category.items())), "phase": peak.phase}
