"""The numbers of a step that kernels make, looked up when something asks: all of them stay on the device."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ds_fira.core.kernels import numbers as places
from ds_fira.core.settings import GroupSettings
from ds_fira.core.step import StepStats


class DeviceStats(StepStats):
    """`StepStats` by places in a memory, of which a kind of step gives `_number`."""

    _settings: GroupSettings
    _number: Callable[[int], Tensor]  # one of `ds_fira.core.kernels.numbers`, of each matrix

    @property
    def grad_sq(self) -> Tensor:
        """|G|^2."""
        return self._number(places.GRAD_SQ)

    @property
    def residual_sq(self) -> Tensor:
        """|S|^2 before the limiter."""
        return self._number(places.RESIDUAL_SQ)

    @property
    def limiter_divisor(self) -> Tensor | None:
        """S is divided by it; None without a limiter."""
        return self._number(places.DIVISOR) if self._settings.has_limiter else None

    @property
    def grad_finite(self) -> Tensor:
        """Whether the gradient was finite."""
        return self._number(places.FINITE) != 0.0
