"""Stage 7: DeepSpeed engines of one process, from the files in ds_configs: do they train, skip, save and resume."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import ds_fira
from benchmarks.gpu_check.partition import small_model
from benchmarks.gpu_check.record import REPOSITORY, SEED, Check
from ds_fira.optim.registry import fira_of

# Of some sixty million weights on a GPU.
SIZES = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
BATCH, LENGTH, RANK = 4, 256, 64
REHEARSED = {"batch": 2, "length": 16, "rank": 8}
# The step of the first refresh lies before the save, that of the second behind it.
STEPS, SAVED, GAP = 7, 4, 5
# Files of ds_configs.
CONFIGS = ("zero2_bf16", "zero2_fp16", "zero2_offload", "zero3", "zero2_bf16_master", "zero2_everything")
NEEDS = 9.0


def measure(check: Check) -> None:
    """Train with every file, then with infinite gradients, then once more from the middle."""
    ds_fira.init_distributed()
    if check.rehearsal:
        # DeepSpeed refuses fp16 where it is slow, which does not matter here.
        get_accelerator().is_fp16_supported = lambda: True
    for name in CONFIGS:
        if check.enough("trains", NEEDS if check.device.type == "cuda" else 2.0, config=name):
            with check.attempt("trains", config=name):
                _train(check, name)
    ds_fira.shutdown()


def configuration(check: Check, name: str) -> dict[str, Any]:
    """A file of ds_configs with a batch, a rank and a gap for a few steps of a small model."""
    config = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    batch = REHEARSED["batch"] if check.rehearsal else BATCH
    config |= {"train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": 1, "steps_per_print": 10**6}
    rank = REHEARSED["rank"] if check.rehearsal else RANK
    config["optimizer"]["params"] |= {"rank": rank, "update_proj_gap": GAP, "lr": 0.003}
    if "fp16" in config:
        # No step is lost to finding the scale, and the infinite one is skipped at once.
        config["fp16"] |= {"initial_scale_power": 12, "hysteresis": 1}
    return config


@contextmanager
def running(check: Check, config: dict[str, Any], seed: int) -> Iterator[Any]:
    """An engine around a LLaMA whose weights depend on a seed; gone at the end of the block."""
    torch.manual_seed(seed)
    with torch.device(check.device):
        model = small_model(**({} if check.rehearsal else {**SIZES, "max_position_embeddings": LENGTH}))
    if "activation_checkpointing" in config:
        ds_fira.checkpoint_activations(model, config)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    try:
        yield engine
    finally:
        engine.destroy()
        del engine, model
        gc.collect()


def step(check: Check, engine: Any, tokens: Tensor, infinite: bool = False) -> float:
    """One step on the same tokens as every other; the loss."""
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss * float("inf") if infinite else loss)
    engine.step()
    return float(loss.detach())


def batch_of(check: Check, engine: Any) -> Tensor:
    """The tokens of every step."""
    generator = torch.Generator().manual_seed(SEED)
    length = REHEARSED["length"] if check.rehearsal else LENGTH
    size = (engine.train_micro_batch_size_per_gpu(), length)
    vocabulary = engine.module.config.vocab_size
    return torch.randint(0, vocabulary, size, generator=generator).to(check.device)


def held(engine: Any) -> list[Tensor]:
    """Copies of all that the next step depends on: the weights that are stepped, and their states."""
    optimizer = fira_of(engine)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = [*params, *(value for param in params for value in optimizer.state[param].values())]
    return [tensor.detach().clone() for tensor in tensors if isinstance(tensor, Tensor)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two lists hold the same bits, NaN too."""
    as_bytes = lambda tensor: tensor.contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(first, second, strict=True)
    )


def _train(check: Check, name: str) -> None:
    config, folder = configuration(check, name), check.work / "checkpoints" / name
    losses, times = [], []
    with running(check, config, SEED) as engine:
        tokens = batch_of(check, engine)
        for number in range(STEPS):
            if number == SAVED:
                engine.save_checkpoint(str(folder), tag="kept")
            start = time.perf_counter()
            losses.append(step(check, engine, tokens))
            times.append(time.perf_counter() - start)
        ended = held(engine)
        learned = losses[-1] < losses[0] and all(torch.isfinite(value).all() for value in map(torch.tensor, losses))
        facts = {"first loss": losses[0], "last loss": losses[-1], "skipped": engine.skipped_steps}
        check.fact("trains", learned, config=name, ms=min(times) * 1e3, **facts)
        _overflow(check, engine, tokens, name, config)
    with running(check, config, SEED + 1) as engine:
        engine.load_checkpoint(str(folder), tag="kept")
        again = [step(check, engine, tokens) for _ in range(SAVED, STEPS)]
        same = again == losses[SAVED:] and equal(held(engine), ended)
        check.fact("resumed equal to the bit", same, config=name, steps=STEPS - SAVED)
    _remove(folder)


def _overflow(check: Check, engine: Any, tokens: Tensor, name: str, config: dict[str, Any]) -> None:
    """A step whose gradients are infinite: fp16 skips it, and whatever a dtype does, no weight is lost."""
    skipped = engine.skipped_steps
    step(check, engine, tokens, infinite=True)
    if "fp16" in config:
        check.fact("overflow is skipped", engine.skipped_steps == skipped + 1, config=name)
    weights = [param for group in fira_of(engine).param_groups for param in group["params"]]
    check.fact("weights stay finite", all(bool(param.isfinite().all()) for param in weights), config=name)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
