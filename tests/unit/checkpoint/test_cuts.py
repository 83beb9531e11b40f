"""Slices of a parameter that are read from others: what torch's own indexing takes, however both are cut."""

from __future__ import annotations

import itertools

import pytest
import torch

from ds_fira.checkpoint.cuts import Cut, Recut, moves
from ds_fira.sharding.slice_names import param_of, slice_name

SHAPE = (6, 8)
# By name the slices: the axis, and the runs of each.
CUTS = {
    "whole": (0, [[range(6)]]),
    "rows": (0, [[range(4)], [range(4, 6)]]),
    "columns": (1, [[range(3)], [range(3, 8)]]),
    "of either half a half": (1, [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]]),
    "three, one of two pieces": (0, [[range(1), range(5, 6)], [range(1, 3)], [range(3, 5)]]),
}


def cuts(name: str) -> tuple[Cut, ...]:
    axis, runs = CUTS[name]
    if len(runs) == 1:
        return (Cut.whole("w", SHAPE),)
    return tuple(Cut(slice_name("w", i, len(runs)), SHAPE, axis, tuple(own)) for i, own in enumerate(runs))


def taken(whole: torch.Tensor, cut: Cut) -> torch.Tensor:
    rows, columns = ([number for run in cut.along(axis) for number in run] for axis in (0, 1))
    return whole[rows][:, columns]


@pytest.mark.parametrize(("before", "now"), [*itertools.product(CUTS, CUTS)])
def test_any_slice_is_read_of_any_others(before: str, now: str) -> None:
    whole = torch.arange(48.0).view(SHAPE)
    saved = {cut.label: taken(whole, cut).reshape(-1) for cut in cuts(before)}
    for own in cuts(now):
        recut, expected = Recut(own, cuts(before)), taken(whole, own)
        assert (own.numel, own.width, own.param) == (expected.numel(), expected.shape[1], "w")
        sources = recut.sources({label: [0] for label in saved})
        assert (sources == (own,)) == (own in cuts(before))
        for start, stop in ((0, own.numel), (1, 2), (3, own.numel - 1), (own.width, 2 * own.width)):
            found = recut.read(sources, start, stop, lambda label, first, last: saved[label][first:last])
            assert torch.equal(found, expected.reshape(-1)[start:stop])
        # Where the whole is there, as in a universal checkpoint, the slices before do not matter.
        if own not in cuts(before):
            assert recut.sources({"w": [0]}) == (Cut.whole("w", SHAPE),)


@pytest.mark.parametrize(("before", "now"), [*itertools.product(CUTS, CUTS)])
def test_rows_and_columns_are_found_in_the_other_order(before: str, now: str) -> None:
    """The matrix that is stepped has those of the first slice first."""
    whole = torch.arange(48.0).view(SHAPE)
    axes = [CUTS[name][0] for name in (before, now)]
    old, new = (
        torch.cat([taken(whole, cut) for cut in cuts(name)], dim=axis)
        for name, axis in zip((before, now), axes, strict=True)
    )
    for axis in (0, 1):
        for there, first in moves(cuts(before), cuts(now), axis):
            old_part = old.narrow(axis, there.start, len(there)).sort(1 - axis).values
            assert torch.equal(old_part, new.narrow(axis, first, len(there)).sort(1 - axis).values)
        assert sum(len(there) for there, _ in moves(cuts(before), cuts(now), axis)) == SHAPE[axis]


def test_names() -> None:
    assert param_of(slice_name("a.b", 1, 2)) == "a.b"
    assert [param_of(name) for name in ("a.b", "tied_modules.tie@1.bias")] == ["a.b", "tied_modules.tie@1.bias"]
