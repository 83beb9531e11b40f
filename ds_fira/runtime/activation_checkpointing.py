"""Activation checkpointing of a model's layers: by transformers, or by DeepSpeed's `activation_checkpointing` block.

DeepSpeed reads the block but checkpoints nothing by itself: the model has to call `deepspeed.checkpointing`. This puts
that call into the layers. It is DeepSpeed's non-reentrant form, which keeps what the older one loses without a word:
gradients of layers whose input needs none (frozen embeddings), of tensors that a layer gets by keyword, and of what
hooks take out of a layer (the router logits of a mixture of experts, so its auxiliary loss).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

BLOCK = "activation_checkpointing"
METHODS = ("none", "transformers", "deepspeed")
# Settings of the block that cannot do here what they promise, and why. `cpu_checkpointing` is the one that can.
_REFUSED = {
    "partition_activations": "divides activations over tensor-parallel ranks, and ds_fira trains with one of them",
    "contiguous_memory_optimization": "works with partition_activations only, which ds_fira does not support",
    "number_checkpoints": "is read by contiguous_memory_optimization only, which ds_fira does not support",
    "synchronize_checkpoint_boundary": "ends DeepSpeed's non-reentrant checkpoint with an error in the backward pass",
    "profile": "ends DeepSpeed's non-reentrant checkpoint with an error in the backward pass",
}


def checkpoint_activations(
    model: nn.Module,
    ds_config: Mapping[str, object] | str | Path | None = None,
    *,
    method: str | None = None,
    layers: Iterable[nn.Module] | None = None,
) -> str:
    """Recompute the activations inside every layer in the backward pass, instead of keeping them.

    Call it before `deepspeed.initialize`, on every rank. Gradients are equal to the bit to those without; random
    states (dropout) and autocast are replayed. DeepSpeed's settings hold for the whole process.

    Args:
        model: a transformers model (or one that peft has wrapped); any module with `layers`.
        ds_config: DeepSpeed config or the path of its JSON file, for its `activation_checkpointing` block.
        method: `"transformers"`: the model's own. `"deepspeed"`: `deepspeed.checkpointing`, with the settings of the
            block or DeepSpeed's defaults. `"none"`: nothing is done but the check. None: `"deepspeed"` where the config
            has the block or `layers` are given, otherwise `"transformers"`.
        layers: submodules to checkpoint, whose first positional argument is the activation that is kept; for modules
            that transformers knows nothing of, with `"deepspeed"` only.

    Returns:
        The method used.

    Raises:
        ValueError: the method is unknown or contradicts the config, the block holds a setting that is unknown or would
            have no effect, the model cannot be checkpointed, or torch.distributed has not been started.
    """
    block = _read_block(ds_config)
    if method is None:
        method = "transformers" if block is None and layers is None else "deepspeed"
    if method not in METHODS:
        raise ValueError(f"activation checkpointing: method = {method!r} is unknown; choose one of {METHODS}.")
    for given, what, remedy in (
        (block, f"the {BLOCK} block of the DeepSpeed config", "remove the block"),
        (layers, "layers", "leave them out"),
    ):
        if method != "deepspeed" and given is not None:
            raise ValueError(
                f"activation checkpointing: method = {method!r} would ignore {what}; {remedy}, or choose 'deepspeed'."
            )
    if method == "deepspeed":
        _check_block(block or {}, model)
        _install(model, layers)
        deepspeed.checkpointing.configure(None, checkpoint_in_cpu=(block or {}).get("cpu_checkpointing", False))
    elif method == "transformers":
        _require_support(model)
        # Early releases of transformers 5 know it by the second name only; both take the settings first.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return method


def _read_block(ds_config: Mapping[str, object] | str | Path | None) -> dict[str, object] | None:
    """The block of a config, None where it has none."""
    if isinstance(ds_config, str | Path):
        path = Path(ds_config)
        if not path.is_file():
            raise ValueError(f"activation checkpointing: the DeepSpeed config {path} is not a file.")
        try:
            ds_config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"activation checkpointing: {path} is not valid JSON: {error}.") from error
    block = None if ds_config is None else ds_config.get(BLOCK)
    if block is not None and not isinstance(block, dict):
        raise ValueError(f"{BLOCK} = {block!r} in the DeepSpeed config is no object; give it braces.")
    return block


def _check_block(block: Mapping[str, object], model: nn.Module) -> None:
    """Refuse what DeepSpeed would ignore or could not do."""
    known = (*_REFUSED, "cpu_checkpointing")
    for name, value in block.items():
        if name not in known:
            raise ValueError(
                f"{BLOCK}.{name} = {value!r} is no setting of DeepSpeed, which would ignore it; it knows "
                f"{', '.join(sorted(known))}."
            )
        if name != "number_checkpoints" and not isinstance(value, bool):
            raise ValueError(f"{BLOCK}.{name} = {value!r} is neither true nor false; set one of them.")
        # 0 checkpoints are a wrong number, not the absence of one.
        if name in _REFUSED and value is not False and value is not None:
            off = "null" if name == "number_checkpoints" else "false"
            raise ValueError(f"{BLOCK}.{name} = {json.dumps(value)} {_REFUSED[name]}; set it to {off}.")
    if block.get("cpu_checkpointing"):
        if get_accelerator().device_name() == "cpu":
            raise ValueError(
                f"{BLOCK}.cpu_checkpointing = true moves nothing where the model itself is on the CPU; set it to false."
            )
        if getattr(getattr(model, "config", None), "output_hidden_states", False):
            raise ValueError(
                f"{BLOCK}.cpu_checkpointing = true empties the hidden states that output_hidden_states = True keeps; "
                "set one of them to false."
            )
    if not torch.distributed.is_initialized():
        raise ValueError(
            "activation checkpointing: deepspeed.checkpointing needs torch.distributed; call "
            "ds_fira.init_distributed() first."
        )


def _install(model: nn.Module, layers: Iterable[nn.Module] | None) -> None:
    """Make the layers call DeepSpeed's checkpoint."""
    if layers is None:
        _require_support(model)
        if "gradient_checkpointing_func" not in inspect.signature(model._set_gradient_checkpointing).parameters:
            raise ValueError(
                f"activation checkpointing: {type(model).__name__} has the form of transformers before 4.35, which "
                "cannot be given another checkpoint; choose 'transformers'."
            )
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=_checkpoint)
        return
    layers = list(layers)
    if not layers or not set(layers) <= set(model.modules()):
        raise ValueError(
            "activation checkpointing: layers is empty or holds a module that is not inside the model; give "
            "submodules of the model, such as model.layers."
        )
    for layer in layers:
        if getattr(layer.forward, "func", None) is not _layer_forward:
            layer.forward = functools.partial(_layer_forward, layer, layer.forward)


def _require_support(model: nn.Module) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"activation checkpointing: {type(model).__name__} has none of transformers' own; name the submodules to "
            "checkpoint with layers=."
        )


def _layer_forward(layer: nn.Module, forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    """What a wrapped layer does: checkpoint in training, nothing else in evaluation."""
    if layer.training and torch.is_grad_enabled():
        return _checkpoint(forward, *args, **kwargs)
    return forward(*args, **kwargs)


def _checkpoint(function: Callable[..., object], *args: object, **kwargs: object) -> object:
    """`deepspeed.checkpointing` around a call, for any structure of arguments and outputs.

    DeepSpeed is given the first argument alone, the hidden states: under `cpu_checkpointing` it empties every tensor
    that it is given, and masks, rotary embeddings and an encoder's output serve the other layers too. Outputs go
    through it as a flat list, since it takes a tuple of one output apart.
    """
    device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), get_accelerator().device_name())
    # DeepSpeed recomputes outside of the autocast of the forward pass.
    autocast = functools.partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
    structure = []

    def run(*hidden: object) -> list[object]:
        with autocast():
            leaves, spec = pytree.tree_flatten(function(*hidden, *args[1:], **kwargs))
        structure[:] = [spec]
        return leaves

    outputs = deepspeed.checkpointing.non_reentrant_checkpoint(run, *args[:1])
    (spec,) = structure
    return pytree.tree_unflatten([outputs] if spec.num_leaves == 1 else list(outputs), spec)
