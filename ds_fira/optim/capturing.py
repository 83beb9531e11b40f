"""Steps in a CUDA graph, by an optimizer without an engine: which groups allow it, when a captured step is replayed.

A capture is a call of `step` between refreshes inside `torch.cuda.graph`; what it launches reads counts and learning
rates on the device. `replay` makes that step again unless the next one is the host's to make: one that computes a
basis, or one whose scaling factors are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ds_fira.checkpoint.errors import errors_name
from ds_fira.core import kernels
from ds_fira.core.algorithms import Algorithm
from ds_fira.core.capture import DeviceRate, lr_tensor_of, refuse_if_capturing, without_lr
from ds_fira.core.kernels import Choice
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.core.state import compute_dtype
from ds_fira.optim.stepping import Stepping


class Graph(Protocol):
    """A `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Launch what was captured."""


@dataclass(frozen=True)
class Captured:
    """What a captured step of a param group has for good.

    Attributes:
        settings: of the group, but the learning rate.
        rate: the address at which that is read.
        places: addresses of the parameters and of their gradients.
    """

    settings: GroupSettings
    rate: int
    places: tuple[int, ...]

    @classmethod
    def of(cls, params: Sequence[Tensor], settings: GroupSettings) -> Captured:
        """A step of these parameters, as it is made now."""
        places = tuple(each.data_ptr() for param in params for each in (param, param.grad))
        rate = 0 if settings.lr_tensor is None else settings.lr_tensor.data_ptr()
        return cls(without_lr(settings), rate, places)

    def changed(self, now: Captured) -> str | None:
        """What is not as it was, in words for a message; None for nothing."""
        for name in type(self.settings).model_fields:
            before, value = getattr(self.settings, name), getattr(now.settings, name)
            if before != value:
                return f"{name} was {before!r} when a step was captured and is {value!r}; capture one with that"
        if self.rate != now.rate:
            return "lr is another tensor than when a step was captured; fill that one in place, or capture a step anew"
        if self.places != now.places:
            return (
                "parameters or gradients do not lie where they lay when a step was captured; clear gradients by "
                "zero_grad(set_to_none=False), or capture a step anew"
            )
        return None


def refuse_capturable(
    settings: GroupSettings, params: Sequence[Tensor], where: str, algorithm: Algorithm, choice: Choice
) -> None:
    """Stop if a param group is capturable and the kernels, which alone can be captured, do not step it.

    Args:
        settings: of the group.
        params: of the group; they may yet move to another device.
        where: what the message begins with.
        algorithm: of the optimizer.
        choice: what the setting `kernels` comes to.

    Raises:
        ValueError: one sentence with the settings, their values and the remedy.
    """
    if not settings.capturable:
        return
    if algorithm.rule is not None:
        raise ValueError(
            f"{where}: capturable = True is not supported with the rule {algorithm.rule.__name__}, which the host "
            "computes; remove it, or train with FiraAdam."
        )
    if choice == "off":
        raise ValueError(
            f"{where}: capturable = True needs the kernels, and kernels = 'off'; remove one of the two, or "
            f"{kernels.VARIABLE}=0 from the environment."
        )
    for param in params:
        if compute_dtype(param.dtype) == torch.float64:
            raise ValueError(
                f"{where}: capturable = True needs the kernels, which step no parameter of dtype {param.dtype}; train "
                "it in float32, or remove capturable."
            )


class Capturing(Stepping):
    """The part of an optimizer whose steps a CUDA graph captures and replays."""

    kernels: Choice

    def _forget_captures(self) -> None:
        """Say that what was captured does not go with the states that there are."""
        self._captured: list[Captured] | None = None
        self._rates: list[dict[torch.device, DeviceRate]] = []

    def load_state_dict(self, state_dict: dict) -> None:
        """As `Resumable.load_state_dict`; a step captured before reads the states before, and is refused."""
        super().load_state_dict(state_dict)
        self._forget_captures()

    def replay(self, graph: Graph) -> bool:
        """Make the next step by replaying a captured one, unless it has to be made by `step`.

        A learning rate that the group holds as a number is written to the device before. Call it once for every step.

        Args:
            graph: a `torch.cuda.CUDAGraph` that captured a step of this optimizer between two refreshes.

        Returns:
            Whether it was replayed; False where a basis is due, or scaling factors are to be recorded: then nothing is
            done, and the caller makes the step without the graph.

        Raises:
            ValueError: no step was captured since the states were loaded or a group was added, or something that a
                captured step has for good has changed: a setting other than the learning rate, or where it, parameters
                or gradients lie.
        """
        name = self.algorithm.name
        if self._captured is None:
            raise ValueError(
                f"{name}.replay: no step was captured since the optimizer was made, loaded or given a group; capture "
                "one by torch.cuda.graph first (docs/performance.md)."
            )
        groups = list(self._groups_to_step())
        projected = [
            (param, self._matrices(param), settings)
            for group, params, settings in groups
            for param in params
            if self._projects(param, group)
        ]
        if self.recorder is not None and any(
            self.recorder.due(self.metrics.next_step(params[0])) for _, params, _ in groups
        ):
            return False
        for param, matrices, settings in projected:
            tasks = matrices.tasks(param, 0, (), settings, 0.0)
            if self._refresher.any_due(param, tasks, matrices.indices):
                return False
        self._require_as_captured([Captured.of(params, settings) for _, params, settings in groups])
        graph.replay()
        for _, params, _ in groups:
            self.metrics.count_step(params[0])
        for param, matrices, _ in projected:
            self._refresher.count(param, range(len(matrices.shapes)))
        return True

    def _capture_step(self) -> None:
        """Make a step whose launches are recorded: nothing is computed, and so nothing counted."""
        with errors_name(self.algorithm.name):
            for group in self.param_groups:
                if not GroupSettings.of(group).capturable:
                    raise ValueError(
                        "a step is being captured in a CUDA graph, and capturable = False; make the optimizer with "
                        "capturable = True."
                    )
            captured = []
            for group, params, settings in self._groups_to_step():
                self._step_group(group, params, settings)
                captured.append(Captured.of(params, settings))
            self._captured = captured

    def _require_as_captured(self, now: list[Captured]) -> None:
        changes = [before.changed(after) for before, after in zip(self._captured, now, strict=False)]
        changes += [None] if len(now) == len(self._captured) else ["other groups have gradients; capture a step anew"]
        found = next((change for change in changes if change is not None), None)
        if found is not None:
            raise ValueError(f"{self.algorithm.name}.replay: {found}.")

    def _groups_to_step(self) -> Iterator[tuple[ParamGroup, list[Tensor], GroupSettings]]:
        """The groups with gradients: each with its parameters that have one, and its settings at this step."""
        for number, group in enumerate(self.param_groups):
            for params in self._lent(number):
                if params:
                    settings = GroupSettings.of(group)
                    if settings.capturable:
                        settings = self._on_device(number, params, settings, group["lr"])
                    yield group, params, settings

    def _on_device(
        self, number: int, params: list[Tensor], settings: GroupSettings, lr: float | Tensor
    ) -> GroupSettings:
        """The settings of a capturable group, with the place of its learning rate.

        Raises:
            ValueError: its parameters are not what the kernels take, or lie on several devices.
        """
        device, name = params[0].device, self.algorithm.name
        refuse_capturable(settings, params, name, self.algorithm, self.kernels)
        for param in params:
            if not kernels.supports(param):
                fault = kernels.fault(param.device)
                reason = "" if fault is None else f" ({fault.reason})"
                raise ValueError(
                    f"{name}: capturable = True needs the kernels, which do not step a parameter of shape "
                    f"{tuple(param.shape)}, strides {param.stride()} and dtype {param.dtype} on {param.device}"
                    f"{reason}; train on a GPU that they run on, or remove capturable."
                )
            if param.device != device:
                raise ValueError(
                    f"{name}: capturable = True, and a param group lies on {device} and {param.device}; give the "
                    "parameters of each device a group of their own."
                )
        while len(self._rates) <= number:
            self._rates.append({})
        return settings.model_copy(update={"lr_tensor": lr_tensor_of(lr, device, self._rates[number])})

    def _state_of(self, param: Tensor, group: ParamGroup) -> dict[str, Tensor]:
        if not self.state[param]:
            # It would be zero again in every replay.
            refuse_if_capturing(
                "a parameter has no state yet", "make a step with all gradients without a capture first"
            )
        return super()._state_of(param, group)
