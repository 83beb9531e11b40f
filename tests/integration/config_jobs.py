"""What the ranks run to try a DeepSpeed config: a few steps of a small LLaMA, and a look into the engine."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.utils import safe_get_full_fp32_param

import ds_fira
from ds_fira.optim.registry import fira_of
from tests import small_models
from tests.small_models import SEQUENCE, VOCABULARY, loss_of


def fixed_tokens(batch: int, rank: int) -> torch.Tensor:
    """One batch of token ids, different on every rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, VOCABULARY, (batch, SEQUENCE), generator=generator)


def step(ds_config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train a LLaMA on one fixed batch until `steps` steps are made; returns what `look_into` sees and the losses."""
    torch.manual_seed(0)
    model = small_models.llama()
    if "activation_checkpointing" in ds_config:
        ds_fira.checkpoint_activations(model, ds_config)
    forwards: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: forwards.append(1))
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)[0]
    accumulation = engine.gradient_accumulation_steps()
    tokens = fixed_tokens(engine.train_micro_batch_size_per_gpu(), engine.global_rank).to(engine.device)
    start = master_weights(engine)
    seen: dict[str, Any] = {"loss_scale": getattr(engine.optimizer, "loss_scale", None)}
    losses, tries = [], 0
    while engine.global_steps - engine.skipped_steps < steps and tries < 4 * steps:
        tries += 1
        for micro_step in range(accumulation):
            loss = loss_of(engine, tokens)
            engine.backward(loss)
            if micro_step < accumulation - 1:
                seen["accumulated_dtypes"] = accumulated_dtypes(engine)
            engine.step()
        losses.append(float(loss.detach()))
    losses.append(float(loss_of(engine, tokens).detach()))
    seen |= look_into(engine)
    moved, end = master_weights(engine), whole_parameters(engine)
    seen |= {
        "losses": losses,
        "forwards_per_micro_step": (len(forwards) - 1) / (tries * accumulation),
        "moved": all(not torch.equal(start[name], value) for name, value in moved.items()),
        "module": {name: value.cpu() for name, value in end.items()},
    }
    engine.destroy()
    return seen


def whole_parameters(engine: Any) -> dict[str, torch.Tensor]:
    """The module's parameters in float32 by name; at stage 3 they are gathered."""
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param):
            found[name] = param.detach().float().clone()
    return found


def master_weights(engine: Any) -> dict[str, torch.Tensor]:
    """What the optimizer steps, by name, whole: a few steps of a norm are too small for its copy in the module."""
    module = whole_parameters(engine)
    masters = {name: safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}
    return {name: module[name] if value is None else value.clone() for name, value in masters.items()}


def accumulated_dtypes(engine: Any) -> set[torch.dtype]:
    """Dtypes of the gradients that DeepSpeed keeps from one micro-step to the next."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups_gradients_flat"):
        return {gradient.dtype for gradient in wrapper.fp32_groups_gradients_flat}
    if hasattr(wrapper, "grad_partitions_flat_buffer"):
        return {wrapper.grad_partitions_flat_buffer.dtype}
    if getattr(wrapper, "cpu_offload", False):
        return {gradient.dtype for gradient in wrapper.accumulated_grads_in_cpu.values()}
    if getattr(wrapper, "partition_gradients", False):
        return {gradient.dtype for parts in wrapper.averaged_gradients.values() if parts for gradient in parts}
    return {param.grad.dtype for param in engine.module.parameters() if param.grad is not None}


def look_into(engine: Any) -> dict[str, Any]:
    """What the engine really does, read from its tensors where there are tensors to read."""
    wrapper, optimizer = engine.optimizer, fira_of(engine)
    every = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    if engine.zero_optimization_stage() == 3:  # where the groups are empty between steps
        flats = wrapper.fp32_partitioned_groups_flat
        every = [(optimizer.param_groups[wrapper.sub_group_to_group_id[i]], flat) for i, flat in enumerate(flats)]
    states = [optimizer.state[p] for group, p in every if "rank" in group and p.numel()]
    return {
        "wrapper": type(wrapper).__name__,
        "stage": engine.zero_optimization_stage(),
        "module_dtypes": {p.dtype for p in engine.module.parameters()},
        "module_devices": {p.device.type for p in engine.module.parameters()},
        "master_dtypes": {p.dtype for _, p in every},
        "master_devices": {p.device.type for _, p in every},
        "moment_dtypes": {
            s[key].dtype for s in states for key in s if key.startswith("exp_avg") and "scale" not in key
        },
        "state_devices": {value.device.type for s in states for key, value in s.items() if key.startswith("exp_avg")},
        "gradient_clipping": getattr(wrapper, "clip_grad", None),
        "options": {
            name: getattr(wrapper, name, None)
            for name in ("overlap_comm", "contiguous_gradients", "reduce_bucket_size", "round_robin_gradients")
        },
        "cpu_offload": getattr(wrapper, "cpu_offload", False) or getattr(wrapper, "offload_optimizer", False),
        "settings": {key: value for key, value in optimizer.param_groups[0].items() if key != "params"},
        "lr": {group["lr"] for group in optimizer.param_groups},
        "batch": (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()),
        "metrics": ds_fira.metrics(engine),
        "memory": ds_fira.memory_report(engine),
        "skipped_steps": engine.skipped_steps,
    }


class Tokens(torch.utils.data.Dataset):
    """The same few sequences again and again."""

    def __init__(self, length: int) -> None:
        self.rows = fixed_tokens(2, 0)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index % len(self.rows)]
        return {"input_ids": row, "labels": row}


def step_with_trainer(ds_config: dict[str, Any], folder: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train with a real `transformers.Trainer`, which resolves the config's "auto".

    Returns:
        As `look_into`, with `resolved`, the config the engine was given, and `losses`.
    """
    from accelerate.state import AcceleratorState, PartialState

    environment = dict(os.environ)
    try:
        torch.manual_seed(0)
        training_arguments = transformers.TrainingArguments(
            output_dir=folder,
            deepspeed=ds_config,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **arguments,
        )
        trainer = transformers.Trainer(model=small_models.llama(), args=training_arguments, train_dataset=Tokens(64))
        trainer.train()
        engine = trainer.deepspeed
        seen = look_into(engine)
        seen["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        seen["resolved"] = dict(engine.config)
        engine.destroy()
        return seen
    finally:
        # Accelerate and transformers remember the config and the launch for the life of the process.
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
        AcceleratorState._reset_state()
        PartialState._reset_state()
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)
