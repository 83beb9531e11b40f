"""The paper's Table 7 from its rankings, and the correlations and the plot of recorded scaling factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ds_fira

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from scipy.stats import kendalltau, spearmanr

from examples.reproduction import table_7
from examples.reproduction.lib import similarity
from tests.unit.observe.test_scaling_recorder import train_alone


def test_table_7_follows_from_the_rankings(tmp_path: Path) -> None:
    """All 12 figures, to the printed digits; a wrong ranking is told."""
    results = json.loads(json.dumps(table_7.compute()))
    assert table_7.differing(results) == []
    section = table_7.section(results, tmp_path)
    assert section.count("| equal |") == 3
    assert "Of the table's 12 figures 12 come out" in section
    results["pairs"]["R1, R2"]["kendall"] = 0.7
    assert table_7.differing(results) == ["R1, R2 kendall: 0.7000 for 0.7333"]
    assert "3 of 4 equal" in table_7.section(results, tmp_path)


def recording(averages: list[float], columns: int = 150, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Matrices of given average factors over steps 10, 20 and 30, with random columns."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.weight": {
            "steps": [10, 20, 30],
            "matrix": average * torch.tensor([0.5, 1.0, 1.5]),
            "column": average * (0.5 + torch.rand(columns, generator=generator, dtype=torch.float64)),
            "count": torch.full((columns,), 3.0, dtype=torch.float64),
            "side": "left",
            "rank": None,
            "shape": (4, columns),
        }
        for i, average in enumerate(averages)
    }


def test_matrix_level_goes_by_averages() -> None:
    """Averages over steps that are the paper's rankings give the paper's coefficients."""
    low, full = (recording([float(place) for place in table_7.RANKINGS[key]]) for key in ("R1", "R3"))
    found = similarity.correlations(low, full, seed=0)
    assert found["matrix"]["items"] == 10
    assert found["steps"] == [3, 3]
    printed = table_7.PRINTED["R1, R3"]
    assert (
        tuple(
            table_7.as_printed(found["matrix"][key], value) for key, value in zip(table_7.COLUMNS, printed, strict=True)
        )
        == printed
    )
    json.dumps(found, allow_nan=False)


def test_column_level_pools_the_same_hundred_columns_of_each_matrix() -> None:
    """Drawn by the seed where both trainings have a factor; `within` is free of what differs between matrices."""
    low, full = recording([1.0, 5.0, 30.0], seed=1), recording([2.0, 9.0, 90.0], seed=2)
    low["layers.0.weight"]["column"][:60] = torch.nan
    found = similarity.correlations(low, full, seed=3)
    assert found["column"]["items"] == 90 + 100 + 100
    assert found == similarity.correlations(low, full, seed=3)
    assert found != similarity.correlations(low, full, seed=4)
    # Random within a matrix; what correlates is that one matrix has the larger factors.
    assert found["column"]["spearman"] > 0.7
    assert abs(found["column"]["within"]) < 0.25
    same = similarity.correlations(full, full, seed=3)
    assert (same["column"]["spearman"], same["column"]["within"]) == pytest.approx((1.0, 1.0))
    # With no more columns than are drawn it is all of them.
    low, full = recording([1.0, 2.0, 3.0], 100, seed=1), recording([1.0, 2.0, 3.0], 100, seed=2)
    pooled = [torch.cat([one["column"] for one in recorded.values()]).numpy() for recorded in (low, full)]
    found = similarity.correlations(low, full, seed=0)["column"]
    assert found["spearman"] == pytest.approx(spearmanr(*pooled).statistic)
    assert found["kendall"] == pytest.approx(kendalltau(*pooled).statistic)


def test_recordings_of_different_models_are_refused() -> None:
    """With a sentence that says what differs."""
    low = recording([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="hold 2 matrices"):
        similarity.correlations(recording([1.0, 2.0]), recording([1.0, 2.0]), seed=0)
    with pytest.raises(ValueError, match=r"layers\.2\.weight is in one only"):
        similarity.correlations(low, recording([1.0, 2.0]), seed=0)
    other = recording([1.0, 2.0, 3.0])
    other["layers.1.weight"]["side"] = "right"
    with pytest.raises(ValueError, match=r"side of layers\.1\.weight is 'left'"):
        similarity.correlations(low, other, seed=0)


def test_recorded_trainings_are_compared_and_plotted(tmp_path: Path) -> None:
    """Low-rank beside full-rank training of the same gradients: like Figure 3, and like Table 8's signs."""
    shapes = [(9, 120 + 10 * i) for i in range(4)]
    low, full = (ds_fira.scaling_factors(train_alone(shapes, group, every=1)[0]) for group in ({"rank": 6}, {}))
    found = similarity.correlations(low, full, seed=0)
    assert found["column"]["items"] == 400
    assert found["column"]["within"] > 0.5
    similarity.plot({"rank 6": low, "full rank": full}, tmp_path / "factors.png")
    assert (tmp_path / "factors.png").stat().st_size > 10_000
    del low["m1"]["steps"][2]
    low["m1"]["matrix"] = torch.cat([low["m1"]["matrix"][:2], low["m1"]["matrix"][3:]])
    steps, values = similarity.grid(low, ["m1", "m0"])
    assert steps.tolist() == list(range(1, 8))
    assert np.isnan(values).nonzero()[0].tolist() == [0]
    np.testing.assert_allclose(10 ** values[1], low["m0"]["matrix"].numpy(), rtol=1e-6)
