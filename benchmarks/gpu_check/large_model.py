"""Stage 10: training steps of LLaMA 7B on this one GPU: ZeRO-2, batch 1, activation checkpointing; time and memory."""

from __future__ import annotations

import copy
import gc
import json
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ds_fira
from benchmarks.common import seconds
from benchmarks.gpu_check.partition import small_model
from benchmarks.gpu_check.record import REPOSITORY, SEED, Check
from ds_fira.tools.estimate import estimate
from ds_fira.tools.estimate.from_config import setup_of
from ds_fira.tools.models import config_file

LENGTH, RANK = 1024, 256
REHEARSED_LENGTH, REHEARSED_RANK = 16, 8
# The one that saves most memory is tried where the other does not fit.
CONFIGS = ("zero2_bf16", "zero2_bf16_master")
NEEDS = 15.0


def measure(check: Check) -> None:
    """The first file whose training fits."""
    ds_fira.init_distributed()
    for name in CONFIGS:
        if not check.enough("training step", NEEDS if check.device.type == "cuda" else 1.0, config=name):
            break
        failures = check.failures
        with check.attempt("training step", config=name):
            _train(check, name)
        if check.failures == failures:
            break
    ds_fira.shutdown()


def _train(check: Check, name: str) -> None:
    config: dict[str, Any] = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 10**6}
    rank, length = (REHEARSED_RANK, REHEARSED_LENGTH) if check.rehearsal else (RANK, LENGTH)
    config["optimizer"]["params"] |= {"rank": rank, "update_proj_gap": 200}
    facts = {"config": name, "rank": rank, "seq_length": length, "model": check.sizes.large or "small"}
    _estimate(check, config, length, facts)
    engine = _engine(check, config)
    try:
        _steps(check, engine, length, facts)
    finally:
        engine.destroy()
        del engine
        gc.collect()


def _steps(check: Check, engine: Any, length: int, facts: dict[str, Any]) -> None:
    vocabulary = engine.module.config.vocab_size
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, vocabulary, (1, length), generator=generator).to(check.device)
    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(check.device)
    backward = lambda: engine.backward(engine(input_ids=tokens, labels=tokens).loss)  # noqa: E731
    backward()
    check.record("first step, with a refresh of all matrices", seconds(engine.step, check.device), "s", **facts)
    passes, steps = [], []
    for _ in range(2):
        passes.append(seconds(backward, check.device))
        steps.append(seconds(engine.step, check.device))
    check.record("training step", min(passes) + min(steps), "s", **facts)
    check.record("optimizer's part of it", min(steps), "s", **facts)
    if check.device.type == "cuda":
        check.record("peak memory", torch.cuda.max_memory_allocated(check.device) / 2**30, "GiB", **facts)
    states = ds_fira.memory_report(engine)["optimizer_state_bytes"][0]
    check.record("optimizer states", states / 2**30, "GiB", **facts)


def _engine(check: Check, config: dict[str, Any]) -> Any:
    torch.manual_seed(SEED)
    with torch.device(check.device):
        if check.sizes.large is None:
            model = small_model()
        else:
            found = AutoConfig.from_pretrained(str(config_file(check.sizes.large)))
            model = AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    ds_fira.checkpoint_activations(model, config, method="transformers")
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _estimate(check: Check, config: dict[str, Any], length: int, facts: dict[str, Any]) -> None:
    """What `python -m ds_fira estimate` says before the training."""
    setup = setup_of(config, gpus=1, seq_length=length, activation_checkpointing=True)
    with torch.device("meta"):
        model = small_model() if check.sizes.large is None else None
    params = copy.deepcopy(config["optimizer"]["params"])
    found = estimate(check.sizes.large if model is None else model, setup, ["Fira"], **params)
    check.record("estimated peak", found.methods["Fira"].by_rank[0].device.total / 2**30, "GiB", **facts)
