"""What the ranks of a test pool run with accelerate and the Trainer under FSDP2.

Both refuse FSDP without a GPU or the like, where torch's own `fully_shard` trains on a CPU as well. So the state that
accelerate makes says that it is FSDP; all that comes then is theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import accelerate.state as states
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

import ds_fira
import ds_fira.hf
from ds_fira.optim.registry import fira_of
from tests.small_models import llama

SETTINGS = {"rank": 3, "lr": 0.01, "update_proj_gap": 3, "exact_cuts": True}


@contextlib.contextmanager
def fsdp_on_a_cpu() -> Iterator[None]:
    """Let accelerate take processes on CPUs for such that may shard."""
    make = states.AcceleratorState.__init__

    def made(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        self.distributed_type = states.PartialState().distributed_type = DistributedType.FSDP

    states.AcceleratorState._reset_state(True)
    states.AcceleratorState.__init__ = made
    try:
        yield
    finally:
        states.AcceleratorState.__init__ = make
        states.AcceleratorState._reset_state(True)


def accelerate_train(folder: str, state_dict_type: str) -> dict[str, Any]:
    """Five steps, a save, four more; then the four once more from what was saved.

    Returns:
        `start`; `gradients` of the nine steps; `end`, and `again` of the second time; `kinds` of the parameters in the
        optimizer; `rates`.
    """
    with fsdp_on_a_cpu():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Linear"],
            state_dict_type=state_dict_type,
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(13, 22), nn.Tanh(), nn.Linear(22, 17), nn.Tanh(), nn.Linear(17, 5))
        optimizer: Any = ds_fira.FiraAdam(model, **SETTINGS)
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer.user_groups, lambda step: 1 / (1 + step))
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        gradients, rates = [], []

        def steps(first: int, last: int) -> dict[str, torch.Tensor]:
            for step in range(first, last):
                torch.manual_seed(step + 100 * accelerator.process_index)
                accelerator.backward(model(torch.randn(8, 13)).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                gradients.append({name: param.grad.full_tensor() for name, param in model.named_parameters()})
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            return {name: param.detach().full_tensor().clone() for name, param in model.named_parameters()}

        steps(0, 5)
        accelerator.save_state(folder)
        end = steps(5, 9)
        accelerator.load_state(folder)
        again = steps(5, 9)
        held = {type(param).__name__ for group in fira_of(optimizer).param_groups for param in group["params"]}
        accelerator.free_memory()
    return {"start": start, "gradients": gradients[:9], "rates": rates[:9], "end": end, "again": again, "kinds": held}


def trainer_train(folder: str, resume: str | None) -> dict[str, Any]:
    """Four steps of the Trainer with `optim="fira_adamw"`, or the last two of them."""
    with fsdp_on_a_cpu():
        ds_fira.hf.register()
        torch.manual_seed(0)
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 24, (32, 8))]
        args = TrainingArguments(
            output_dir=folder,
            optim="fira_adamw",
            optim_args="rank=4,update_proj_gap=3",
            learning_rate=0.01,
            use_cpu=True,
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            fsdp=True,
            fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=llama(), args=args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        optimizer = fira_of(trainer.optimizer)
        end = {name: param.detach().full_tensor() for name, param in trainer.model.named_parameters()}
        result = {"end": end, "split": len(optimizer.attachment.layouts[0].split), **ds_fira.memory_report(optimizer)}
        trainer.accelerator.free_memory()
    return result
