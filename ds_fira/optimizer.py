"""`FiraAdam`: Fira over AdamW as a `torch.optim.Optimizer`, alone or inside DeepSpeed.

Alone, a parameter is one matrix, or several (3-D expert tensors). Inside ZeRO a parameter is a flat partition, and
`bind` tells which matrices lie in it, whole or cut. Both take the same path: a list of `MatrixTask`, refreshed, then
updated one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_fira import functional as F
from ds_fira.comm import Channel, CutExchange
from ds_fira.groups import group_defaults, split_flat_list
from ds_fira.layout import GroupLayout
from ds_fira.matrix_step import MatrixTask, new_basis, update_matrix
from ds_fira.memory import ParamRecord
from ds_fira.settings import GROUP_SETTINGS, check_params
from ds_fira.shard import MatrixShard, matrices_of
from ds_fira.state import (
    EXP_AVG,
    EXP_AVG_SQ,
    STEP,
    allocate,
    host_key,
    matrix_states,
    state_dtype,
)
from ds_fira.tracking import StepMetrics


@dataclass(frozen=True, slots=True)
class Binding:
    """Which matrices of a parameter this process owns.

    Attributes:
        whole: the matrices that lie whole in the parameter.
        exchange: carries the cut ones of its param group; None where no matrix of the group is cut on any rank.
        batched: whether the states have a leading dimension.
    """

    whole: tuple[MatrixShard, ...]
    exchange: CutExchange | None = None
    batched: bool = True

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(m, n) of every matrix owned, the whole ones first, then the cut ones."""
        cuts = self.exchange.owned if self.exchange is not None else ()
        return [matrix.shape for matrix in (*self.whole, *cuts)]


class FiraAdam(Optimizer):
    """Adam with low-rank states, full-rank updates: Fira (arXiv 2410.01623, Algorithm 1) with AdamW for the rest.

    Param groups with a `rank` key are projected; their parameters are 2-D, or 3-D for experts. Groups without one are
    AdamW. A flat list of parameters with a constructor `rank` is split as `ds_fira.param_groups` would.

    Args:
        params: parameters, (name, parameter) pairs, or param groups; groups may set every argument but
            `target_modules` for themselves.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to sqrt(V).
        weight_decay: decoupled, applied after the update.
        rank: subspace rank of the projected weights of a flat list; never applies to param groups.
        update_proj_gap: steps from one refresh of the subspace to the next.
        alpha: scale of the back-projection (released), or of the whole update (paper).
        proj_type: the projected side: "std" the smaller, "reverse_std" the larger, "left", "right".
        gamma: the limiter's largest growth of the residual norm from one step to the next.
        residual_scale: multiplies the scaled residual in the update; 1 is the paper.
        scaling: the scaling factor per "column", per "matrix", or "none" (1).
        limiter: "growth", or "none".
        formulation: "released", the code behind the published figures (PyPI fira 1.0.2), or "paper", Algorithm 1.
        subspace: how a basis is computed: "svd", exact.
        target_modules: for a flat list with a rank, substrings of the names of the modules to project.

    Raises:
        ValueError: a value is out of range, nothing is to be projected, or a parameter cannot be.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        alpha: float = 1.0,
        proj_type: str = "std",
        gamma: float = 1.01,
        residual_scale: float = 1.0,
        scaling: str = "column",
        limiter: str = "growth",
        formulation: str = "released",
        subspace: str = "svd",
        target_modules: Sequence[str] | str | None = None,
    ) -> None:
        # Every argument by its own name, as a JSON config gives them.
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        settings = check_params(given)
        params = [params] if isinstance(params, Tensor) else list(params)
        self._reset_runtime()
        if settings["rank"] is not None and params:
            if not isinstance(params[0], dict):
                params = split_flat_list(params, settings["rank"], settings["target_modules"])
            elif not any("rank" in group for group in params):
                warnings.warn(
                    f"FiraAdam: rank = {settings['rank']} does not apply to param groups, and none has a 'rank' of its "
                    "own: nothing is projected. Give the groups a 'rank', or pass a flat list.",
                    stacklevel=2,
                )
        super().__init__(params, group_defaults(settings))

    def _reset_runtime(self) -> None:
        """What does not travel with a state dict, a pickle or a copy."""
        self.suspended = False
        self.metrics = StepMetrics()
        self._warned_decomposition = False
        # Set where the optimizer runs inside an engine.
        self.channel: Channel | None = None
        self.layouts: list[GroupLayout] = []
        self.inventory_of_module: list[ParamRecord] | None = None
        self.gradient_dtypes: dict[Tensor, torch.dtype] = {}
        self._bindings: dict[Tensor, Binding] = {}
        self._replicas: Channel | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also called by load_state_dict, on an optimizer that knows its place already.
        if "_bindings" not in self.__dict__:
            self._reset_runtime()
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in `torch.optim`, its own settings checked.

        Raises:
            ValueError: a setting is out of range, a parameter is complex, or one in a group with a rank has neither 2
                nor 3 dimensions.
        """
        own = {name: param_group[name] for name in GROUP_SETTINGS if name in param_group}
        checked = check_params(own, "FiraAdam param group")
        param_group = {**param_group, **{name: checked[name] for name in own}}
        if "rank" in own and own["rank"] is None:
            del param_group["rank"]
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.is_complex():
                raise ValueError(
                    f"FiraAdam: a parameter of dtype {param.dtype} cannot be optimized; use its torch.view_as_real."
                )
            if "rank" in group:
                matrices_of("", tuple(param.shape))

    def bind(self, param: Tensor, binding: Binding) -> None:
        """Say which matrices lie in a flat parameter; called once the parameter is final, before its first step."""
        self._bindings[param] = binding

    def replicate(self, channel: Channel) -> None:
        """Say that all ranks of `channel` hold the same parameters, so that each basis is computed once for all."""
        self._replicas = channel if channel.dp_size > 1 else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the gradients as they are.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, None without one.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.suspended:
            return loss
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                _require_dense(param)
            if "rank" in group:
                self._step_projected(params, group)
            else:
                for param in params:
                    self._step_adamw(param, group)
        return loss

    def _step_projected(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Step the matrices of a group: gather what is cut, refresh what is due, update, give back what was cut."""
        tasks: list[MatrixTask] = []
        borrowed: list[tuple[CutExchange, Tensor, list[Tensor]]] = []
        for param in params:
            binding = self._binding(param)
            if param not in self._bindings:
                # By dimension rather than through a flat view: a parameter or gradient may have any strides.
                pairs = [(param, param.grad)] if param.ndim == 2 else list(zip(param, param.grad, strict=True))
            else:
                pairs = [(shard.matrix(param), shard.matrix(param.grad)) for shard in binding.whole]
            if binding.exchange is not None:
                assembled = binding.exchange.to_owners(param, param.grad)
                borrowed.append((binding.exchange, param, [weight for weight, _ in assembled]))
                pairs += [(weight, grad) for weight, grad in assembled]
            tasks += self._tasks(param, pairs, binding, group)
        self._refresh([task for task in tasks if task.refresh_due])
        for task in tasks:
            update_matrix(task, self.metrics)
        for exchange, param, weights in borrowed:
            exchange.to_holders(param, weights)

    def _binding(self, param: Tensor) -> Binding:
        if param in self._bindings:
            return self._bindings[param]
        return Binding(tuple(matrices_of("", tuple(param.shape))), batched=param.ndim == 3)

    def _tasks(
        self, param: Tensor, pairs: list[tuple[Tensor, Tensor]], binding: Binding, group: dict[str, Any]
    ) -> list[MatrixTask]:
        state = self.state[param]
        if not state:
            state.update(allocate(param, binding.shapes, group, binding.batched))
        states = matrix_states(state, binding.shapes, group, binding.batched)
        resolution = F.negligible_share(self.gradient_dtypes.get(param, param.grad.dtype))
        return [
            MatrixTask(weight, grad, matrix, group, resolution)
            for (weight, grad), matrix in zip(pairs, states, strict=True)
        ]

    def _refresh(self, due: list[MatrixTask]) -> None:
        """New bases for the matrices that are due; among replicas each is computed on one rank and sent to all."""
        if self._replicas is None:
            for task in due:
                self._adopt(task, self._new_basis(task))
            return
        channel = self._replicas
        # In rounds of one matrix a rank: all ranks compute at once, and none holds more than one new basis.
        for first in range(0, len(due), channel.dp_size):
            turn = due[first : first + channel.dp_size]
            mine = self._new_basis(turn[channel.dp_rank]) if channel.dp_rank < len(turn) else None
            for rank, task in enumerate(turn):
                # One element in front says whether there is a basis at all.
                packed = task.state.basis.new_zeros(1 + task.state.basis.numel())
                if rank == channel.dp_rank and mine is not None:
                    packed[0] = 1.0
                    packed[1:] = mine.reshape(-1)
                packed = channel.broadcast(packed, rank)
                self._adopt(task, packed[1:].view_as(task.state.basis) if packed[0] else None)

    def _new_basis(self, task: MatrixTask) -> Tensor | None:
        """The basis of a task's gradient, None where there is none to be had; a failure is reported once."""
        try:
            return new_basis(task)
        except torch.linalg.LinAlgError as error:
            if not self._warned_decomposition:
                self._warned_decomposition = True
                warnings.warn(
                    f"FiraAdam: a decomposition failed ({error}); the matrix keeps its old basis and tries again at "
                    "its next step. Further failures are not reported.",
                    stacklevel=4,
                )
            return None

    def _adopt(self, task: MatrixTask, basis: Tensor | None) -> None:
        if basis is None:
            return  # stays due
        task.state.basis.copy_(basis)
        task.state.refresh_step.copy_(task.state.step)
        self.metrics.refreshes += 1

    def _step_adamw(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            dtype = state_dtype(param.dtype)
            state[STEP] = torch.zeros((), dtype=torch.int64)
            state[EXP_AVG] = torch.zeros_like(param, dtype=dtype)
            state[EXP_AVG_SQ] = torch.zeros_like(param, dtype=dtype)
        state[STEP] += 1
        F.adamw_(
            param,
            param.grad,
            state[EXP_AVG],
            state[EXP_AVG_SQ],
            step=int(state[STEP]),
            lr=group["lr"],
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    @property
    def inventory(self) -> list[ParamRecord]:
        """The parameters that are optimized, over all ranks."""
        if self.inventory_of_module is not None:
            return self.inventory_of_module
        return [ParamRecord.of("", tuple(p.shape), group) for group in self.param_groups for p in group["params"]]

    @property
    def replicated(self) -> bool:
        """Whether other ranks hold the same parameters and states."""
        return self._replicas is not None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as in `torch.optim`, every state in the dtype it was saved in.

        `torch.optim.Optimizer` casts floating state to the parameter's dtype and moves counters to its device.
        """
        super().load_state_dict(state_dict)
        saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    device = torch.device("cpu") if host_key(key) else param.device
                    self.state[param][key] = value.detach().to(device=device, copy=True)


def _require_dense(param: Tensor) -> None:
    if param.grad.is_sparse or param.grad.layout != torch.strided:
        raise ValueError(
            f"FiraAdam: the gradient of a parameter of shape {tuple(param.shape)} has layout {param.grad.layout}, "
            "which has no low-rank form here; build the embedding with sparse=False."
        )
