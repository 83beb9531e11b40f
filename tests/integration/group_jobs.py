"""Two param groups with a scheduler that has a value for each, through accelerate and the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import ds_fira
from ds_fira.optim.registry import fira_of
from tests.integration.hf_jobs import example

SETTINGS = {"lr": 0.01, "weight_decay": 0.0}
FIRA = {"rank": 4, "update_proj_gap": 2, "target_modules": ["first", "second", "third"]}
STEPS = 4


class Layers(nn.Module):
    """Weights of two shapes, which the first group has both of, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss, as the Trainer takes it; the labels are not read."""
        return {"loss": self.third(torch.tanh(self.second(torch.tanh(self.first(inputs))))).square().mean()}


def two_groups(model: Layers) -> list[dict[str, Any]]:
    """Two layers, and one with a rate of its own; parameters with their names."""
    named = dict(model.named_parameters())
    last = [(name, param) for name, param in named.items() if name.startswith("third")]
    rest = [(name, param) for name, param in named.items() if not name.startswith("third")]
    return [{"params": rest}, {"params": last, "lr": 0.002}]


def schedule(optimizer: Optimizer) -> LambdaLR:
    """One function a group."""
    return LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1 / (1 + step)])


def expected() -> list[list[float]]:
    """The rates of both groups before every step."""
    return [[0.01 * 0.5**step, 0.002 / (1 + step)] for step in range(STEPS)]


def rates(optimizer: Any) -> tuple[list[float], set[tuple[float, ...]]]:
    """What the groups show, and what the parts of both are stepped with, each once."""
    stepped = {
        (number, group["lr"]) for number, group in zip(fira_of(optimizer).origins, _parts(optimizer), strict=True)
    }
    return [group["lr"] for group in optimizer.param_groups], stepped


def _parts(optimizer: Any) -> list[dict[str, Any]]:
    return fira_of(optimizer).param_groups


def accelerate_groups(way: str) -> list[tuple[list[float], set[tuple[float, ...]]]]:
    """Train through accelerate: FiraAdam from a JSON with a function that makes the scheduler, or both as objects."""
    with example("accelerate_train"):
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, InitProcessGroupKwargs

        config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
        if way == "json":
            config["optimizer"] = {"type": "FiraAdam", "params": {**SETTINGS, **FIRA}}
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        backend = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
        accelerator = Accelerator(
            deepspeed_plugin=plugin, kwargs_handlers=backend, step_scheduler_with_optimizer=way == "json"
        )
        torch.manual_seed(0)
        model: Any = Layers()
        groups = two_groups(model)
        if way == "json":
            bare = [{**group, "params": [param for _, param in group["params"]]} for group in groups]
            optimizer: Any = DummyOptim(bare, **SETTINGS)
            scheduler: Any = DummyScheduler(optimizer, lr_scheduler_callable=schedule)
        else:
            optimizer = ds_fira.FiraAdam(groups, **SETTINGS, **FIRA)
            scheduler = schedule(optimizer.user_groups)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        found = []
        for _ in range(STEPS):
            found.append(rates(optimizer))
            accelerator.backward(model(torch.randn(2, 12, device=accelerator.device))["loss"])
            optimizer.step()
            scheduler.step()
        del optimizer, scheduler
        accelerator.free_memory()
    return found


def trainer_groups(folder: str) -> list[tuple[list[float], set[tuple[float, ...]]]]:
    """Train through a Trainer that makes an optimizer of its own, and a scheduler of the optimizer's groups."""
    with example("hf_trainer"):
        from transformers import Trainer, TrainerCallback, TrainingArguments

        found = []

        class Sees(TrainerCallback):
            def on_step_begin(self, args: object, state: object, control: object, **given: Any) -> None:
                found.append(rates(given["optimizer"]))

        class Grouped(Trainer):
            def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
                self.optimizer = ds_fira.FiraAdam(two_groups(self.model), **SETTINGS, **FIRA)
                return self.optimizer

            def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
                self.lr_scheduler = schedule(self.optimizer if optimizer is None else optimizer)
                return self.lr_scheduler

        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(Path(folder)),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            deepspeed={"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}},
        )
        rows = [{"inputs": torch.randn(12), "labels": torch.zeros(1)} for _ in range(4 * STEPS)]
        trainer = Grouped(model=Layers(), args=arguments, train_dataset=rows, callbacks=[Sees()])
        trainer.train()
        trainer.accelerator.free_memory()
    return found
