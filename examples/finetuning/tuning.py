"""The ways of fine-tuning that the paper's Table 3 compares: what is trained, and by which optimizer.

Fira is there twice, because the paper and its released code differ. Section 5.3 and Table 6 read as Fira on the weights
of the model, at LoRA's rank. The released script (github.com/xichen-fy/Fira, fine_tuning/ft_fira.sh) wraps the model in
LoRA adapters of rank 32 and steps these with Fira, projected to rank 16: `--lora_r 32 --lora_alpha 64 --p_rank 16`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn
from torch.optim import Optimizer

import ds_fira


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The paper's Table 6, and from the released script what the table leaves out.

    Attributes:
        rank: of Fira's and GaLore's subspaces and of LoRA's adapters.
        lora_alpha: LoRA's alpha; it multiplies the adapters by lora_alpha / rank.
        dropout: before LoRA's adapters; the other methods have no place for it.
        lr: highest learning rate.
        warmup_steps: steps in which it rises from 0; it then falls linearly to 0.
        batch_size: sequences a step, over all processes.
        epochs: passes over the training questions.
        target_modules: names of the modules that are projected or adapted.
        update_proj_gap: steps between subspaces (the script).
        virtual_tokens: of Prefix-tuning (the script).
        max_length: most tokens of a prompt with its response (the script).
        clipping: largest norm of the gradient (the Trainer's default, which the script keeps).
    """

    rank: int = 32
    lora_alpha: float = 64
    dropout: float = 0.05
    lr: float = 1e-4
    warmup_steps: int = 100
    batch_size: int = 16
    epochs: int = 3
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    update_proj_gap: int = 200
    virtual_tokens: int = 30
    max_length: int = 256
    clipping: float = 1.0

    @property
    def alpha(self) -> float:
        """LoRA's alpha as Fira's: both then multiply the low-rank update by the same number, 2 in Table 6."""
        return self.lora_alpha / self.rank

    @property
    def adapter_rank(self) -> int:
        """Rank to which the released script projects the gradients of LoRA's factors: half the factors' rank."""
        return max(1, self.rank // 2)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the comparison.

    Attributes:
        title: for tables.
        trains: `targets`, the weights of the target modules; `all` weights; `lora` or `prefix`, what peft adds.
        optimizer: "AdamW", "FiraAdam" or "GaLoreAdam".
        paper: the row of the paper's Table 3, None where it has none.
    """

    title: str
    trains: str
    optimizer: str
    paper: str | None


METHODS = {
    "fira": Algorithm("Fira", "targets", "FiraAdam", "Fira"),
    "fira_lora": Algorithm("Fira on LoRA's factors (released script)", "lora", "FiraAdam", None),
    "galore": Algorithm("GaLore", "targets", "GaLoreAdam", "GaLore"),
    "lora": Algorithm("LoRA", "lora", "AdamW", "LoRA"),
    "prefix": Algorithm("Prefix-tuning", "prefix", "AdamW", "Prefix"),
    "full": Algorithm("Full fine-tuning, AdamW", "all", "AdamW", None),
}
# The package's optimizers by the type that a DeepSpeed config gives them.
OPTIMIZERS = {"FiraAdam": ds_fira.FiraAdam, "GaLoreAdam": ds_fira.GaLoreAdam}


def is_target(name: str, recipe: Recipe) -> bool:
    """Whether a module's name ends in that of a target module."""
    return name.rpartition(".")[2] in recipe.target_modules


def prepare(model: nn.Module, method: str, recipe: Recipe) -> nn.Module:
    """Freeze what a method does not train, and add what it does; the random initialisation is torch's.

    Args:
        model: a causal language model of transformers; it is changed.
        method: one of `METHODS`.
        recipe: the settings.

    Returns:
        The model to train, with dropout switched on where the method has any.

    Raises:
        ValueError: the model has none of the target modules.
    """
    trains = METHODS[method].trains
    targets = [module for name, module in model.named_modules() if is_target(name, recipe)]
    if not targets and trains in ("targets", "lora"):
        raise ValueError(f"{type(model).__name__} has none of the modules {', '.join(recipe.target_modules)}")
    model.train()
    if trains == "lora":
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.dropout,
            target_modules=list(recipe.target_modules),
        )
        return peft.get_peft_model(model, config)
    if trains == "prefix":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=recipe.virtual_tokens)
        return peft.get_peft_model(model, config)
    model.requires_grad_(trains == "all")
    if trains == "targets":
        for module in targets:
            module.weight.requires_grad_(True)
    return model


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that the optimizer is given."""
    return [param for param in model.parameters() if param.requires_grad]


def optimizer_block(method: str, recipe: Recipe) -> dict[str, Any]:
    """The `optimizer` of a DeepSpeed config for a method.

    Which weights are projected need not be said: what the recipe does not project is not trained.
    """
    chosen = METHODS[method]
    if chosen.optimizer == "AdamW":
        # torch_adam: DeepSpeed's own is compiled when it is first used.
        params = {"lr": recipe.lr, "weight_decay": 0.0, "torch_adam": True}
        return {"type": "AdamW", "params": params}
    params = {"lr": recipe.lr, "weight_decay": 0.0, "update_proj_gap": recipe.update_proj_gap}
    if chosen.trains == "lora":
        params |= {"rank": recipe.adapter_rank, "alpha": 1.0}
    else:
        params |= {"rank": recipe.rank, "alpha": recipe.alpha}
    return {"type": chosen.optimizer, "params": params}


def build_optimizer(model: nn.Module, method: str, recipe: Recipe) -> Optimizer:
    """The same optimizer without DeepSpeed."""
    block = optimizer_block(method, recipe)
    params = block["params"]
    if block["type"] == "AdamW":
        return torch.optim.AdamW(trained_parameters(model), lr=params["lr"], weight_decay=params["weight_decay"])
    return OPTIMIZERS[block["type"]](ds_fira.param_groups(model, **params), lr=params["lr"])
