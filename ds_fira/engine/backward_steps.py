"""Steps in the midst of the backward pass, so that no more than one layer's gradient exists at a time.

`step_in_backward` has every parameter stepped as soon as its gradient is final, and frees the gradient. A training then
holds weights, optimizer states and one gradient, where it held all of them; of replicas two buckets of gradients, and
under FSDP2 those of one module.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from ds_fira.engine.ddp import DdpDoor, attach_replicas
from ds_fira.optim.backward_clipping import ByPrevious, Clipping, ClippingName, clipping_of
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.doors import door_of
from ds_fira.sharding.comm import Communicator, ProcessGroup, is_first_process
from ds_fira.sharding.mean_buckets import BUCKET_BYTES, MeanBuckets

# In a state dict of the optimizer: what the clipping knows of the step before.
KEY = "step_in_backward"


class Gradients(Protocol):
    """What says when gradients are final."""

    def arrive(self, param: Tensor) -> Iterable[Sequence[Tensor]]:
        """A parameter has its gradient on this rank: those whose gradients are final now, in lists stepped together."""

    def finish(self) -> Iterable[Sequence[Tensor]]:
        """The backward pass is over: the rest of them."""


class Own:
    """Gradients of one process, or of an engine that has reduced them: final as they come."""

    def arrive(self, param: Tensor) -> Iterable[Sequence[Tensor]]:
        """The parameter itself."""
        return ((param,),)

    def finish(self) -> Iterable[Sequence[Tensor]]:
        """Nothing is left."""
        return ()


class BackwardSteps:
    """An optimizer that steps in the backward pass; `remove` ends it.

    `torch.distributed.checkpoint` takes it beside model and optimizer, as in `dcp.save({..., "steps": steps})`: what
    torch's `get_state_dict` takes of an optimizer has nothing of it.

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
            *(param.register_post_accumulate_grad_hook(_weak(self._arrive)) for param in self._numbers),
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

    def state_dict(self) -> dict[str, float | None]:
        """What the clipping knows of the step before."""
        return {"last_norm": self._clipping.last_norm}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """Take it over."""
        self._clipping.last_norm = state_dict["last_norm"]

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
    def _step(self, ready: Iterable[Sequence[Tensor]]) -> None:
        for params in ready:
            self._clipping.clip_(params)
            for number, own in groupby(sorted(params, key=self._numbers.get), self._numbers.get):
                self._optimizer.step_some(number, list(own))
            for param in params:
                param.grad = None

    def _save(self, _: object, state_dict: dict[str, object]) -> None:
        state_dict[KEY] = self.state_dict()

    def _load(self, optimizer: LowRankOptimizer, state_dict: dict[str, object]) -> None:
        if KEY in state_dict:
            self.load_state_dict(state_dict[KEY])
        elif isinstance(self._clipping, ByPrevious) and self._clipping.last_norm is None and is_first_process():
            warnings.warn(
                f"{optimizer.algorithm.name}: the state dict has no norm of the step before, which clip = 'previous' "
                "clips by; the next step clips by 'parameter'. Save what step_in_backward returns, and load it first.",
                stacklevel=3,
            )


def _weak(arrive: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that keeps nothing alive: Python's collector sees no cycle that runs through a tensor's hooks."""
    method = weakref.WeakMethod(arrive)

    def hook(param: Tensor) -> None:
        if (alive := method()) is not None:
            alive(param)

    return hook


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

    Under FSDP2 call it behind `fully_shard`; it steps a module's parameters when FSDP2 has reduced their gradients. A
    collective call there, as `optimizer.step()` is.

    Args:
        model: whose parameters the optimizer has.
        optimizer: of this package, without an engine.
        max_norm: clip gradients to this norm; None for no clipping. The norm of all gradients is not known while they
            come, so `clip` says which one it is.
        clip: "previous" scales all gradients by max_norm over the norm of all gradients of the step before, where that
            was larger (in the first step by "parameter"); "parameter" clips every parameter's own gradient.
        process_group: replicas that train together, each with its share of a batch: their gradients are averaged in
            buckets, and weights and buffers start as those of its first rank. None for this process alone, and under
            FSDP2.
        bucket_bytes: of gradients that are averaged together at most, or one parameter's.

    Returns:
        What steps; its `remove` ends it.

    Raises:
        ValueError: the optimizer has an engine, or a setting that does not go with it; the model is wrapped in
            DistributedDataParallel, is in float16, is sharded in part, or has not got all of the optimizer's
            parameters.
    """
    params = _checked_params(model, optimizer, process_group, bucket_bytes)
    clipping = clipping_of(clip, max_norm, optimizer.algorithm.name)
    if door_of(params) is not None:
        # What it needs of torch is imported where parameters are sharded.
        from ds_fira.engine.fsdp2.backward import take_units

        gradients, clipping.held = take_units(model, optimizer, params)
        return BackwardSteps(optimizer, gradients, clipping)
    if process_group is None:
        return BackwardSteps(optimizer, Own(), clipping)
    communicator = Communicator(process_group)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(communicator.broadcast(tensor, 0))
    attach_replicas(optimizer, communicator, params)
    return BackwardSteps(optimizer, MeanBuckets(params, communicator, bucket_bytes), clipping)


def _checked_params(
    model: nn.Module, optimizer: LowRankOptimizer, process_group: ProcessGroup | None, bucket_bytes: int
) -> list[Tensor]:
    """The trained parameters in the model's order.

    Raises:
        ValueError: see `step_in_backward`.
    """
    name = optimizer.algorithm.name
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    params = [param for param in model.parameters() if id(param) in own]
    halves = [path for path, param in model.named_parameters() if param.dtype == torch.float16]
    door = door_of(params)
    replicas = isinstance(model, nn.parallel.DistributedDataParallel) or isinstance(door, DdpDoor)
    sharded = door is not None and not replicas
    whole = [path for path, param in model.named_parameters() if id(param) in own and door_of([param]) is None]
    has_engine = optimizer.communicator is not None and not optimizer.attachment.stand_ins
    faults = {
        "step_in_backward steps without an engine, and this optimizer has one; make another, as FiraAdam(model, "
        "rank=...), for a model that no engine holds.": optimizer.suspended or has_engine,
        "step_in_backward with DistributedDataParallel frees no gradient, because its buckets hold all of them; "
        "give the module itself and process_group=torch.distributed.group.WORLD.": replicas,
        f"step_in_backward does not train {halves[0] if halves else ''} in float16, whose loss scale needs all "
        "gradients at once; train in bfloat16.": bool(halves),
        "capturable = True does not go with step_in_backward, whose steps no graph holds; remove one of the two.": any(
            group["capturable"] for group in optimizer.param_groups
        ),
        f"step_in_backward got a model with {len(params)} of the optimizer's {len(own)} parameters; give the model "
        "that the optimizer trains.": len(params) != len(own),
        "process_group does not go with step_in_backward under FSDP2, whose mesh says which ranks train together; "
        "leave it out.": sharded and process_group is not None,
        f"step_in_backward trains a model that fully_shard holds in part, and {whole[0] if whole else ''} is not "
        "sharded, so that nobody reduces its gradient; call fully_shard for the whole model, too.": sharded
        and bool(whole),
        f"bucket_bytes = {bucket_bytes} has no effect without process_group, whose buckets it measures; remove it.": (
            process_group is None and bucket_bytes != BUCKET_BYTES
        ),
    }
    for sentence, is_so in faults.items():
        if is_so:
            raise ValueError(f"{name}: {sentence}")
    return params
