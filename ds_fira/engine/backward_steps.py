"""Steps in the midst of the backward pass, so that no more than one layer's gradient exists at a time.

`step_in_backward` has every parameter stepped as soon as its gradient is final, and frees the gradient. A training then
holds weights, optimizer states and one gradient (of replicas: two buckets of them), where it held all gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from ds_fira.engine.ddp import DdpDoor, attach_replicas
from ds_fira.optim.backward_clipping import Clipping, ClippingName, clipping_of
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.doors import door_of
from ds_fira.sharding.comm import Communicator, ProcessGroup
from ds_fira.sharding.mean_buckets import BUCKET_BYTES, MeanBuckets

# In a state dict of the optimizer: what the clipping knows of the step before.
KEY = "step_in_backward"


class Gradients(Protocol):
    """What says when gradients are final."""

    def arrive(self, param: Tensor) -> Iterable[Tensor]:
        """A parameter has its gradient on this rank: those whose gradients are final now."""

    def finish(self) -> Iterable[Tensor]:
        """The backward pass is over: the rest of them."""


class Own:
    """Gradients of one process, or of an engine that has reduced them: final as they come."""

    def arrive(self, param: Tensor) -> Iterable[Tensor]:
        """The parameter itself."""
        return (param,)

    def finish(self) -> Iterable[Tensor]:
        """Nothing is left."""
        return ()


class BackwardSteps:
    """An optimizer that steps in the backward pass; `remove` ends it.

    Args:
        optimizer: steps.
        gradients: say when they are final.
        clipping: of the gradients.
    """

    def __init__(self, optimizer: LowRankOptimizer, gradients: Gradients, clipping: Clipping) -> None:
        self._optimizer, self._gradients, self._clipping = optimizer, gradients, clipping
        self._arrived: set[int] = set()
        # By number, for a loaded state brings groups of its own.
        self._numbers = {
            param: number for number, group in enumerate(optimizer.param_groups) for param in group["params"]
        }
        self._handles = [
            *(param.register_post_accumulate_grad_hook(self._arrive) for param in self._numbers),
            optimizer.register_step_pre_hook(self._finish),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]
        # So that torch.amp.GradScaler hands its scale over, and can be refused by name.
        optimizer._step_supports_amp_scaling = True

    @property
    def grad_norm(self) -> float | None:
        """The norm of all gradients of the last step, before they were clipped; None where nothing is clipped by it."""
        return self._clipping.last_norm

    def remove(self) -> None:
        """Leave the gradients to `optimizer.step()` again."""
        for handle in self._handles:
            handle.remove()
        del self._optimizer._step_supports_amp_scaling

    def _arrive(self, param: Tensor) -> None:
        name = self._optimizer.algorithm.name
        if id(param) in self._arrived:
            raise RuntimeError(
                f"{name}: a parameter of shape {tuple(param.shape)} got a second gradient before optimizer.step(), and "
                "step_in_backward has made its step with the first; call optimizer.step() after every backward pass, "
                "and in place of gradient accumulation take larger batches, or train without step_in_backward."
            )
        self._arrived.add(id(param))
        self._step(self._gradients.arrive(param))

    def _finish(self, optimizer: LowRankOptimizer, positional: tuple[object, ...], named: dict[str, object]) -> None:
        if any(closure is not None for closure in (*positional[1:], *named.values())):
            raise ValueError(
                f"{optimizer.algorithm.name}: step(closure) is not supported with step_in_backward, which steps in "
                "loss.backward(); call loss.backward() first, and step() without a closure."
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ValueError(
                f"{optimizer.algorithm.name}: torch.amp.GradScaler is not supported with step_in_backward, because "
                "whether a gradient overflows is known when all are there; train in bfloat16, which needs no scale."
            )
        self._step(self._gradients.finish())
        self._arrived.clear()
        self._clipping.end_step()

    @torch.no_grad()
    def _step(self, params: Iterable[Tensor]) -> None:
        for param in params:
            self._clipping.clip_(param.grad)
            self._optimizer.step_one(param, self._optimizer.param_groups[self._numbers[param]])
            param.grad = None

    def _save(self, _: object, state_dict: dict[str, object]) -> None:
        state_dict[KEY] = {"last_norm": self._clipping.last_norm}

    def _load(self, _: object, state_dict: dict[str, object]) -> None:
        self._clipping.last_norm = state_dict.get(KEY, {}).get("last_norm")


def step_in_backward(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    *,
    max_norm: float | None = None,
    clip: ClippingName = "previous",
    process_group: ProcessGroup | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> BackwardSteps:
    """Step every parameter in the backward pass, as soon as its gradient is final, and free the gradient.

    The loop of the training stays as it is: `loss.backward(); optimizer.step(); scheduler.step()`. `optimizer.step()`
    ends the step, and every backward pass needs one. A gradient that is not finite leaves its own parameter as it is,
    and no other.

    Args:
        model: whose parameters the optimizer has.
        optimizer: of this package, without an engine.
        max_norm: clip gradients to this norm; None for no clipping. The norm of all gradients is not known while they
            come, so `clip` says which one it is.
        clip: "previous" scales all gradients by max_norm over the norm of all gradients of the step before, where that
            was larger (in the first step by "parameter"); "parameter" clips every parameter's own gradient.
        process_group: replicas that train together, each with its share of a batch: their gradients are averaged in
            buckets, and weights and buffers start as those of its first rank. None for this process alone.
        bucket_bytes: of gradients that are averaged together at most, or one parameter's.

    Returns:
        What steps; its `remove` ends it.

    Raises:
        ValueError: the optimizer has an engine, or a setting that does not go with it; the model is wrapped in
            DistributedDataParallel, is in float16, or has not got all of the optimizer's parameters.
    """
    params = _checked_params(model, optimizer)
    clipping = clipping_of(clip, max_norm, optimizer.algorithm.name)
    if process_group is None:
        return BackwardSteps(optimizer, Own(), clipping)
    communicator = Communicator(process_group)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(communicator.broadcast(tensor, 0))
    attach_replicas(optimizer, communicator, params)
    return BackwardSteps(optimizer, MeanBuckets(params, communicator, bucket_bytes), clipping)


def _checked_params(model: nn.Module, optimizer: LowRankOptimizer) -> list[Tensor]:
    """The trained parameters in the model's order.

    Raises:
        ValueError: see `step_in_backward`.
    """
    name = optimizer.algorithm.name
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    params = [param for param in model.parameters() if id(param) in own]
    halves = [path for path, param in model.named_parameters() if param.dtype == torch.float16]
    faults: list[tuple[Callable[[], bool], str]] = [
        (
            lambda: optimizer.suspended or optimizer.communicator is not None,
            "step_in_backward steps without an engine, and this optimizer has one; make another, as FiraAdam(model, "
            "rank=...), for a model that no engine holds.",
        ),
        (
            lambda: isinstance(model, nn.parallel.DistributedDataParallel) or isinstance(door_of(params), DdpDoor),
            "step_in_backward with DistributedDataParallel frees no gradient, because its buckets hold all of them; "
            "give the module itself and process_group=torch.distributed.group.WORLD.",
        ),
        (
            lambda: door_of(params) is not None,
            "step_in_backward does not step parameters that FSDP2 shards, of which a step takes several together; "
            "train with optimizer.step(), or without fully_shard.",
        ),
        (
            lambda: bool(halves),
            f"step_in_backward does not train {halves[0] if halves else ''} in float16, whose loss scale needs all "
            "gradients at once; train in bfloat16.",
        ),
        (
            lambda: any(group["capturable"] for group in optimizer.param_groups),
            "capturable = True does not go with step_in_backward, whose steps no graph holds; remove one of the two.",
        ),
        (
            lambda: len(params) != len(own),
            f"step_in_backward got a model with {len(params)} of the optimizer's {len(own)} parameters; give the model "
            "that the optimizer trains.",
        ),
    ]
    for fault, sentence in faults:
        if fault():
            raise ValueError(f"{name}: {sentence}")
    return params
