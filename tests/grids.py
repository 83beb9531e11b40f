"""Which part of a grid of cases is in every run; `--full` has the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def full_if(full: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """The cases, those marked that only `--full` runs."""
    return [pytest.param(case, marks=pytest.mark.full if full(case) else ()) for case in cases]


def widest(cases: Iterable[Any]) -> list[Any]:
    """The cases, each a dict of settings, or first a dict and then more; those within another only `--full` runs.

    A case lies within another where all its settings are among the other's.
    """
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]

    def full(settings: dict[str, Any]) -> bool:
        return any(settings.items() < other.items() for other, *_ in rows)

    return [pytest.param(*row, marks=pytest.mark.full if full(row[0]) else ()) for row in rows]


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


def once(*axes: Iterable[Any]) -> list[Any]:
    """Every combination of the values of some axes, of which every run has each value at least once.

    The combinations in every run are few, and no two of them have more in common than they must: of those that have
    the most values that are still missing, the one with the most pairs of values that have not met comes next.
    """
    grid = list(itertools.product(*(list(enumerate(axis)) for axis in axes)))
    places = [{(axis, number) for axis, (number, _) in enumerate(case)} for case in grid]
    missing, met, now = set().union(*places), set(), set()

    def news(index: int) -> tuple[int, int]:
        return len(missing & places[index]), len(set(itertools.combinations(sorted(places[index]), 2)) - met)

    while missing:
        best = max(range(len(grid)), key=news)
        now.add(best)
        missing -= places[best]
        met |= set(itertools.combinations(sorted(places[best]), 2))
    return [
        pytest.param(*(value for _, value in case), marks=() if index in now else pytest.mark.full)
        for index, case in enumerate(grid)
    ]
