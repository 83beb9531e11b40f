"""Adam with moments in bfloat16 and int8: the moments follow the gradients, and the losses those of float32."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from ds_fira.core import quantization as C
from ds_fira.core.unprojected import adamw_


def zero(numel: int, state_dtype: str, signed: bool) -> dict[str, Tensor]:
    return C.allocate((numel,), (), state_dtype, dtype=torch.float32, device="cpu", signed=signed)


def track_second_moment(state_dtype: str, stochastic: bool) -> Tensor:
    """V / V in float32 after half of the gradients of every block fell by 10 for 1500 steps, those elements only."""
    generator = torch.Generator().manual_seed(0)
    scale, exact = 10.0 ** -torch.rand(512, generator=generator), torch.zeros(512)
    falling = torch.arange(512) % 2 == 0
    state = zero(512, state_dtype, False)
    for step in range(1800):
        grad = torch.randn(512, generator=generator) * scale
        grad = torch.where(falling & (step >= 300), 0.1 * grad, grad)
        value = C.read(state).mul(0.999).addcmul(grad, grad, value=1e-3)
        C.write_(state, value, seed=step if stochastic else None)
        exact.mul_(0.999).addcmul_(grad, grad, value=1e-3)
    return (C.read(state) / exact)[falling]


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_second_moment_follows_falling_gradients(state_dtype: str) -> None:
    """Rounded to nearest it stalls at several times its value. With noise it is right in the mean.

    Its own noise adds steps of a gap g with probability change / g: a relative variance of about g / 2 for changes of
    1e-3 over a memory of 1000 steps, and more while it falls. g is 2^-8 to 2^-7, and at most 0.6 in the map's third
    decade; the mean of 256 elements has a sixteenth of the standard deviation.
    """
    assert float(track_second_moment(state_dtype, False).median()) > 2.5
    ratio = track_second_moment(state_dtype, True)
    deviation = {"bfloat16": math.sqrt(2.0**-7), "int8": math.sqrt(0.6)}[state_dtype]
    assert float(ratio.mean()) == pytest.approx(1.0, abs=4.0 * deviation / 16.0)
    assert float(ratio.std()) < 2.0 * deviation


def test_small_first_moments_decay_in_int8() -> None:
    """At 1/200 of the block's largest the points lie 11% apart; to nearest, a decay by 10% comes to a halt."""
    left = {}
    for stochastic in (False, True):
        state = zero(256, "int8", True)
        C.write_(state, torch.tensor([1.0] + [0.005] * 255), seed=None)
        for step in range(100):
            value = C.read(state) * 0.9
            value[0] = 1.0
            C.write_(state, value, seed=step if stochastic else None)
        left[stochastic] = float(C.read(state)[1:].mean())
    assert left[False] > 1e-6
    assert left[True] < 0.1 * left[False]


@functools.cache
def train(state_dtype: str, stochastic: bool, drop: float, steps: int) -> float:
    """The loss of a logistic regression, 200 examples of 600 features over two decades, after Adam's steps on batches.

    Gradients are multiplied by `drop` from step 150 on, and V has to follow before steps are as large as before.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 600, generator=generator) * torch.logspace(0, -2, 600)
    labels = (inputs @ torch.randn(600, generator=generator) > 0.0).float()
    weight, exp_avg, exp_avg_sq = torch.zeros(600), zero(600, state_dtype, True), zero(600, state_dtype, False)
    for step in range(1, steps + 1):
        batch = torch.randint(200, (64,), generator=generator)
        error = (inputs[batch] @ weight).sigmoid() - labels[batch]
        grad = inputs[batch].t() @ error / 64 * (1.0 if step < 150 else drop)
        m, v = C.read(exp_avg), C.read(exp_avg_sq)
        adamw_(weight, grad, m, v, step=step, lr=3e-3, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0)
        C.write_(exp_avg, m, seed=2 * step if stochastic else None)
        C.write_(exp_avg_sq, v, seed=2 * step + 1 if stochastic else None)
    return float(torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weight, labels))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(("drop", "steps"), [(1.0, 300), (0.01, 1000)])
def test_adam_trains_as_with_float32(state_dtype: str, drop: float, steps: int) -> None:
    """The loss within half a per cent of float32's, also after gradients fell by 100; 0.1% was measured.

    With V rounded to nearest, bfloat16 is then 2% behind after 1000 steps (and 35% after 3000, too many for a test).
    """
    exact = train("float32", False, drop, steps)
    assert train(state_dtype, True, drop, steps) == pytest.approx(exact, rel=0.005)
    if drop < 1.0 and state_dtype == "bfloat16":
        assert train(state_dtype, False, drop, steps) > 1.01 * exact
