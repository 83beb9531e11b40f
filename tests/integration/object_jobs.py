"""Trainings with a FiraAdam object through accelerate and the Trainer, on the ranks of a test pool."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

import ds_fira
from ds_fira.optim.registry import fira_of
from tests.compatibility.object_features import without_compiled_adam
from tests.integration.hf_jobs import example
from tests.small_models import llama

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
STEPS = 3
RANK = 4


def accelerate_object(zero: dict[str, Any], compiled: bool, scheduled: bool = False) -> dict[str, Any]:
    """`accelerator.prepare(model, FiraAdam(...))`, every rank with the same batch; as one process with no engine.

    Args:
        zero: block `zero_optimization`.
        compiled: whether DeepSpeed's Adam, which accelerate makes under offload, has its operator.
        scheduled: whether a scheduler of the object comes with it.

    Returns:
        `weights` of the module, those `alone`, the optimizer's `name`, its `steps`, `keys` of its groups, their `lrs`.
    """
    with example("accelerate_train"):
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_optimization": zero}
        gloo = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=gloo)
        model, optimizer, scheduler = _made(scheduled)
        given = [model, optimizer, *([scheduler] if scheduled else [])]
        if compiled:
            prepared = accelerator.prepare(*given)
        else:
            with without_compiled_adam():
                prepared = accelerator.prepare(*given)
        model = prepared[0]
        for inputs in _inputs():
            accelerator.backward(model(inputs).square().mean())
            if scheduled:
                prepared[2].step()
        inner = fira_of(model)
        result = {
            "weights": [param.detach().float().clone() for param in model.module.parameters()],
            "alone": _alone(scheduled),
            "name": type(model.basic_optimizer).__name__,
            "steps": sorted({int(state["step"].max()) for state in inner.state.values() if "step" in state}),
            "keys": sorted(set().union(*inner.param_groups)),
            "lrs": sorted({group["lr"] for group in inner.param_groups}),
        }
        del optimizer, inner, given, prepared, scheduler, model
        accelerator.free_memory()
    return result


def _made(scheduled: bool) -> tuple[torch.nn.Module, ds_fira.FiraAdam, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    optimizer = ds_fira.FiraAdam(ds_fira.param_groups(model, rank=RANK, target_modules=["0", "2"]), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) if scheduled else None
    return model, optimizer, scheduler


def _inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 12) for _ in range(STEPS)]


def _alone(scheduled: bool) -> list[Tensor]:
    """The weights of one process that trains with the same batches and the object itself."""
    model, optimizer, _ = _made(False)
    for number, inputs in enumerate(_inputs()):
        for group in optimizer.param_groups if scheduled else ():
            # accelerate steps a scheduler once for each process.
            group["lr"] = 0.05 / (1 + number * torch.distributed.get_world_size())
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


def trainer_object(blocks: dict[str, Any], elsewhere: bool = False) -> tuple[str, list[float]]:
    """`Trainer(optimizers=(FiraAdam(...), None))` under DeepSpeed.

    Args:
        blocks: of the DeepSpeed config.
        elsewhere: whether the Trainer has no object, and one of another model is there.

    Returns:
        The optimizer that trained, or what was said; the losses.
    """
    with example("hf_trainer"), without_compiled_adam():
        from transformers import Trainer, TrainingArguments

        config = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", **blocks}
        args = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            deepspeed=config,
            max_steps=STEPS,
            logging_steps=1,
            per_device_train_batch_size=2,
            use_cpu=not torch.cuda.is_available(),
            learning_rate=0.01,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        model = llama()
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 24, (24, 8))]
        other = ds_fira.FiraAdam(llama(), rank=RANK) if elsewhere else None
        # As a user writes it: nobody but the Trainer has the object.
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows,
            optimizers=(None if elsewhere else ds_fira.FiraAdam(model, rank=RANK, lr=0.01), None),
        )
        try:
            trainer.train()
            said = type(trainer.model_wrapped.basic_optimizer).__name__
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.accelerator.free_memory()
        del other
    return said, losses
