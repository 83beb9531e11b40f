"""Steps in a CUDA graph: whether one is being captured, and where such a step reads its learning rate.

A capture records what is launched, every argument by its value and every tensor by its address, and computes nothing. A
replay launches the same again. So no launch of a step between refreshes may have an argument that changes from one step
to the next: counts and learning rates are read on the device, and what the host has to do (upload a table, read a
count, compute a basis) is done in a step that is not captured, or refused in one sentence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fira.core.settings import GroupSettings


def capturing() -> bool:
    """Whether what the host launches now is recorded for a CUDA graph and not computed."""
    # The look at the flag is for processes without CUDA, where the other question is an error.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_if_capturing(reason: str, remedy: str) -> None:
    """Stop a capture that would record what must not be made again and again, or what the host has to do.

    Raises:
        ValueError: one sentence with reason and remedy.
    """
    if capturing():
        raise ValueError(f"a step is being captured in a CUDA graph, and {reason}; {remedy}.")


class DeviceRate:
    """The learning rate of a param group that holds a number, where kernels on one device read it.

    Attributes:
        tensor: it, float64, (1,).
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.empty(1, dtype=torch.float64, device=device)
        self._value: float | None = None

    def set(self, value: float) -> None:
        """Write it, where it is another than before; not inside a capture, which would write the same ever after."""
        if value != self._value:
            self._value = value
            self.tensor.fill_(value)


def lr_tensor_of(lr: object, device: torch.device, rates: dict[torch.device, DeviceRate]) -> Tensor:
    """Where the kernels find the learning rate of a param group.

    Args:
        lr: as the group holds it: a number, or a tensor of one element, which on the device is taken as it is.
        device: of the parameters.
        rates: of the group, by device; those that are there stay where they are.

    Raises:
        ValueError: a capture is under way and no step was made before it.
    """
    if isinstance(lr, Tensor) and lr.device == device:
        return lr
    if device not in rates:
        refuse_if_capturing("no step was made before it", "make one or more without a capture first")
        rates[device] = DeviceRate(device)
    if not capturing():
        rates[device].set(float(lr))
    return rates[device].tensor


def without_lr(settings: GroupSettings) -> GroupSettings:
    """Settings to compare those of two steps by: a replay may have another learning rate, and nothing else."""
    return settings.model_copy(update={"lr": 0.0, "lr_tensor": None})
