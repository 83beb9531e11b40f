"""Which part of a grid of cases is in every run; `--full` has the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def full_if(full: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """The cases, those marked that only `--full` runs."""
    return [pytest.param(case, marks=pytest.mark.full if full(case) else ()) for case in cases]


def half(*axes: Iterable[Any]) -> list[Any]:
    """Every combination of the values of some axes, every second of which is in every run.

    The combinations whose positions have an even sum are. Each value occurs among them, and of three axes and more
    every two values of different axes meet.
    """
    result = []
    for numbered in itertools.product(*(enumerate(axis) for axis in axes)):
        now = sum(number for number, _ in numbered) % 2 == 0
        result.append(pytest.param(*(value for _, value in numbered), marks=() if now else pytest.mark.full))
    return result
