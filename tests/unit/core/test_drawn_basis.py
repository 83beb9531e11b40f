"""Bases that are drawn: the same on every rank and in every part, normal, and others in every matrix and refresh."""

from __future__ import annotations

import math

import pytest
import torch

from ds_fira.core.drawn_basis import AT_ONCE, DrawnBasis

CPU = torch.device("cpu")
BASIS = DrawnBasis(number=3, rows=900, rank=48)  # of more elements than are drawn at once


def draw(basis: DrawnBasis, refresh_step: int = 0, rows: range | None = None) -> torch.Tensor:
    return basis.draw(refresh_step, rows, torch.float32, CPU)


def test_some_rows_are_those_of_the_whole_to_the_bit() -> None:
    whole = draw(BASIS)
    assert whole.numel() > 2 * AT_ONCE
    assert whole.shape == (900, 48)
    for rows in (range(0), range(1), range(899, 900), range(341, 342), range(300, 700), range(5, 5), range(900)):
        assert torch.equal(draw(BASIS, rows=rows), whole[rows.start : rows.stop])


@pytest.mark.parametrize("basis", [DrawnBasis(0, 1, 1), DrawnBasis(7, 5, 1), DrawnBasis(2, 33, 31)], ids=str)
def test_small_ones_too(basis: DrawnBasis) -> None:
    whole = draw(basis, 4)
    assert whole.isfinite().all()
    assert torch.equal(torch.cat([draw(basis, 4, range(row, row + 1)) for row in range(basis.rows)]), whole)


def test_what_a_seed_gives_is_what_it_always_gave() -> None:
    """A checkpoint holds no basis: other numbers here would change the course of a resumed run."""
    found = draw(DrawnBasis(1, 3, 2), 200).flatten().tolist()
    assert found == pytest.approx([0.18872, -0.85115, -0.06276, -0.29078, 0.24876, -0.1021], abs=1e-5)


def test_entries_are_independent_and_normal_with_variance_1_over_r() -> None:
    bases = [draw(DrawnBasis(number, 900, 48), step) for number in range(3) for step in (0, 1, 200)]
    values = torch.stack(bases).double() * math.sqrt(48)
    count = values.numel()
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((values**power).mean()) - moment) < 4.0 * math.sqrt(variance / count), power
    # 99.73% lie within three standard deviations.
    assert float((values.abs() < 3.0).double().mean()) == pytest.approx(0.9973, abs=4e-4)
    pairs = [values[:, 1:] * values[:, :-1], values[:, :, 1:] * values[:, :, :-1]]
    pairs += [first * second for index, first in enumerate(values) for second in values[index + 1 :]]
    for products in pairs:
        assert abs(float(products.mean())) < 4.5 / math.sqrt(products.numel())
    assert len({float(basis[0, 0]) for basis in bases}) == len(bases)


def test_norms_are_kept_on_average() -> None:
    """|P'g|^2 is |g|^2 on average, which the factors of APOLLO live by."""
    vector = torch.randn(900, generator=torch.Generator().manual_seed(0))
    shares = [float((draw(DrawnBasis(number, 900, 48)).T @ vector).square().sum()) for number in range(60)]
    mean = sum(shares) / len(shares) / float(vector.square().sum())
    assert mean == pytest.approx(1.0, abs=4.0 * math.sqrt(2.0 / 48 / 60))


def test_float64_has_the_same_values() -> None:
    assert torch.equal(BASIS.draw(5, None, torch.float64, CPU), draw(BASIS, 5).double())
