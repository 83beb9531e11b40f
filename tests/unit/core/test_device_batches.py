"""Matrices that are tensors of their own, stepped in batches by the kernels: what they get is what each gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import ds_fira
from ds_fira import FiraAdam
from ds_fira.core import batches
from tests.reference.gradients import make_gradients, make_weight

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_allowed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The second is a batch of its own, and so is the last, a transposed tensor.
SHAPES = [(9, 20), (17, 6), (9, 20), (9, 20)]
# The rounding of products of up to 20 terms over 4 steps; a compressed state may round to another neighbour.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "int8": 5e-2}


def train(kernels: str = "auto", steps: int = 4, **settings: Any) -> tuple[list[Tensor], FiraAdam]:
    """The weights after some steps, of which the second has a gradient that is not finite in one matrix."""
    given = {"matmul_precision": "float32", "weight_decay": 0.1, "alpha": 0.5, "kernels": kernels, **settings}
    params = [Parameter(make_weight(shape, seed=i).to(DEVICE)) for i, shape in enumerate(SHAPES)]
    params[-1] = Parameter(params[-1].detach().t().contiguous().t())
    gradients = [make_gradients(shape, steps, seed=i) for i, shape in enumerate(SHAPES)]
    named = [(f"layer.{i}", param) for i, param in enumerate(params)]
    optimizer = FiraAdam(named, lr=0.01, rank=4, update_proj_gap=2, project_full_rank=True, **given)
    for step in range(steps):
        for index, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
            # Every gradient in memory of its own, as after `zero_grad`.
            param.grad = gradient[step].float().to(DEVICE)
            if (step, index) == (1, 2):
                param.grad[3, 4] = torch.nan
        optimizer.step()
    return [param.detach() for param in params], optimizer


@pytest.mark.parametrize(
    "settings",
    [{}, *(pytest.param(each, marks=pytest.mark.full) for each in ({"state_dtype": "int8"}, {"residual": "none"}))],
    ids=str,
)
def test_batches_make_the_steps_of_the_torch_functions(settings: dict[str, Any]) -> None:
    """Weights, metrics and recorded factors."""
    starts = [make_weight(shape, seed=i).to(DEVICE) for i, shape in enumerate(SHAPES)]
    expected, theirs = train("off", record_scaling_factors=1, **settings)
    found, ours = train("auto", record_scaling_factors=1, **settings)
    tolerance = TOLERANCE[settings.get("state_dtype", "float32")]
    for mine, wanted, start in zip(found, expected, starts, strict=True):
        assert (mine - wanted).norm() <= tolerance * (wanted - start).norm()
    mine, wanted = ours.metrics.totals(), theirs.metrics.totals()
    assert mine.matrix_steps == wanted.matrix_steps == 4 * len(SHAPES) - 1
    assert mine.limiter_activations == wanted.limiter_activations
    assert mine.captured_energy_sum == pytest.approx(wanted.captured_energy_sum, rel=1e-5)
    assert mine.residual_square_sum == pytest.approx(wanted.residual_square_sum, rel=tolerance)
    recorded, factors = (ds_fira.scaling_factors(optimizer) for optimizer in (ours, theirs))
    assert set(recorded) == set(factors) == {f"layer.{i}" for i in range(len(SHAPES))}
    for name, series in factors.items():
        assert recorded[name]["steps"] == series["steps"]
        for key in ("matrix", "column"):
            torch.testing.assert_close(recorded[name][key], series[key], rtol=10 * tolerance, atol=0.0)


@pytest.mark.parametrize("state_dtype", [pytest.param("float32", marks=pytest.mark.full), "int8"])
def test_a_batch_does_not_change_a_bit(state_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, _ = train(state_dtype=state_dtype, steps=2)
    monkeypatch.setattr(batches, "MAX_BATCH", 1)
    alone, _ = train(state_dtype=state_dtype, steps=2)
    for mine, wanted in zip(together, alone, strict=True):
        assert torch.equal(mine, wanted)
