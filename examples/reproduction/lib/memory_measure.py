"""What the methods of Table 2 really hold: models, adapters and optimizers made and stepped, their tensors counted."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path

import peft
import torch
import transformers
from galore_torch import GaLoreAdamW
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_fira import FiraAdam, param_groups
from ds_fira.core.selection import find_projected_weights
from ds_fira.core.state import SMALL_PARAM
from ds_fira.optim.state_size import state_bytes
from ds_fira.tools.dry_run import PlannedRun

BFLOAT16 = 2
FLOAT32 = 4
# Of the step count that torch.optim keeps of every tensor, a float32; and of FiraAdam's, and its step of last refresh.
TORCH_STEP = 4
FIRA_STEP = 8
TOKENS = 8


def build(config: str | Path, device: str = "cpu") -> nn.Module:
    """A causal language model in bfloat16 from a transformers config file; on "meta", its shapes alone."""
    loaded = transformers.AutoConfig.from_pretrained(config)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(loaded, dtype=torch.bfloat16)


def add_lora(model: nn.Module, rank: int, target_modules: Iterable[str], *, train_rest: bool) -> nn.Module:
    """LoRA adapters by peft, in the weights' dtype.

    Args:
        model: taken over.
        rank: of the adapters.
        target_modules: ends of the names of the modules that get one.
        train_rest: whether embeddings, head and norms are trained too, as in pre-training.
    """
    rest = [param for name, param in model.named_parameters() if not _is_target(name, target_modules)]
    config = peft.LoraConfig(r=rank, target_modules=list(target_modules))
    # By default peft keeps adapters of bfloat16 weights in float32, which the paper's formula does not.
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for param in rest if train_rest else []:
        param.requires_grad_(True)
    return wrapped


def make(method: str, model: nn.Module, rank: int, state_dtype: str = "bfloat16") -> tuple[nn.Module, Optimizer]:
    """A method's model and optimizer; the linear layers but the head are its low-rank part.

    Args:
        method: "Full-Rank", "Fira", "GaLore" or "LoRA".
        model: taken over, in bfloat16.
        rank: of the low-rank part.
        state_dtype: of Fira's states; the others have the weights'.
    """
    if method == "Fira":
        # The subspace is computed the fast way: the states are the same tensors.
        # The dtype goes to the optimizer, for the groups without a rank too.
        return model, FiraAdam(param_groups(model, rank, subspace="randomized"), lr=1e-3, state_dtype=state_dtype)
    projected = find_projected_weights(model)
    if method == "LoRA":
        model = add_lora(model, rank, sorted({name.split(".")[-2] for name in projected.values()}), train_rest=True)
    trained = [param for param in model.parameters() if param.requires_grad]
    if method == "GaLore":
        low_rank = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        groups = [
            {"params": [param for param in trained if id(param) in projected], **low_rank},
            {"params": [param for param in trained if id(param) not in projected]},
        ]
        return model, GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)
    return model, torch.optim.AdamW(trained, lr=1e-3, foreach=False)


def measure(method: str, model: nn.Module, rank: int, state_dtype: str = "bfloat16") -> dict[str, int]:
    """Bytes that a method holds after one step of training; arguments as of `make`.

    Returns:
        `weights`, all parameters; `states`, all tensors of the optimizer's state; `trained`, elements of the
        parameters that it trains.
    """
    model, optimizer = make(method, model, rank, state_dtype)
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    if trained[0].is_meta:
        for param in trained:
            param.grad = torch.empty_like(param)
    else:
        tokens = torch.randint(0, model.config.vocab_size, (1, TOKENS))
        model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    projectors = [state["projector"].ortho_matrix for state in optimizer.state.values() if "projector" in state]
    held = {
        "weights": _bytes(model.parameters()),
        "states": state_bytes(optimizer) + _bytes(projectors),
        "trained": sum(param.numel() for param in trained),
    }
    del model, optimizer, trained
    gc.collect()
    return held


def bookkeeping_bytes(method: str, run: PlannedRun, element: int = BFLOAT16) -> int:
    """Bytes of state beyond the paper's formula: counters, and small tensors that stay in float32.

    AdamW of torch keeps a step count of every tensor. FiraAdam keeps two of every matrix and one of every other tensor;
    in float32, whatever the dtype of the states, the limiter's norm and the moments of tensors below `SMALL_PARAM`
    elements. galore-torch's counters are Python numbers.

    Args:
        method: as of `make`.
        run: the model, planned with the rank.
        element: bytes of an element of the states.
    """
    rest = [record for record in run.records if record.rank is None]
    matrices = sum(record.matrices for record in run.records)
    if method == "Full-Rank":
        return TORCH_STEP * len(run.records)
    if method == "LoRA":
        return TORCH_STEP * (2 * matrices + len(rest))
    if method == "GaLore":
        return 0
    small = sum(record.state_elements for record in rest if record.state_elements < 2 * SMALL_PARAM)
    return matrices * (2 * FIRA_STEP + FLOAT32 - element) + FIRA_STEP * len(rest) + small * (FLOAT32 - element)


def _is_target(name: str, target_modules: Iterable[str]) -> bool:
    return name.split(".")[-2] in target_modules


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
