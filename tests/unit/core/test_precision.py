"""What the precision of the products loses: TF32 in the kernels, and what is left of a residual that is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from benchmarks.quality.precision import OPERANDS, emulated, rounded
from ds_fira import FiraAdam
from ds_fira.core import kernels
from ds_fira.core.precision import ROUNDING, negligible_ratio, precision_of
from ds_fira.core.settings import GroupSettings
from tests.unit.core.kernel_cases import DEVICE, SIDES, error, flag, random, random_basis


def gradient_in_the_subspace() -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient of rank 16, of a falling spectrum, and the basis of its columns."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(96, 16, generator=generator)).Q.contiguous()
    inside = torch.randn(16, 200, generator=generator) * torch.arange(1.0, 17.0).unsqueeze(1) ** -0.7
    return basis @ inside, basis


@pytest.mark.parametrize("operands", OPERANDS)
def test_what_products_leave_of_no_residual_is_negligible(operands: str) -> None:
    """Emulated; with operands that are cut too, as torch's own products on a GPU may do."""
    grad, basis = gradient_in_the_subspace()
    p, g = (rounded(tensor, *OPERANDS[operands]) for tensor in (basis, grad))
    low_rank = p.t() @ g
    noise = float((grad - p @ rounded(low_rank, *OPERANDS[operands])).norm() / grad.norm())
    precision = operands.removesuffix(", cut")
    ratio = negligible_ratio(torch.float32, precision)
    assert noise < ratio / 1.3
    assert precision == "float32" or noise > ratio / 20
    # By columns, as a normalized residual takes the difference.
    squares = low_rank.double().square().sum(0) / grad.double().square().sum(0)
    assert float((1.0 - squares).max()) < ROUNDING[precision].squares


def test_gradients_of_low_precision_and_float64_weights() -> None:
    assert negligible_ratio(torch.bfloat16, "tf32") == torch.finfo(torch.bfloat16).eps
    assert negligible_ratio(torch.float64, "bfloat16") == negligible_ratio(torch.float32, "float32")


# Two factors, each off by up to 2^-11 and by 2e-4 in the mean square.
TF32_ROUNDED = 4e-4


@pytest.fixture
def cutting_cores(monkeypatch: pytest.MonkeyPatch, kernels_allowed: None) -> None:
    """Products of the interpreter as Hopper's cores make them in TF32: without the last 13 bits of each factor."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if DEVICE == "cuda":
        return

    def cut(handle: Any) -> Any:
        bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)

    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, left, right, *rest: dot(self, cut(left), cut(right), *rest),
    )


@pytest.mark.usefixtures("cutting_cores")
@pytest.mark.parametrize("side", SIDES)
def test_tf32_is_rounded_on_cores_that_cut(side: str) -> None:
    """Cut, R is 8e-4 off and |R|^2 1.4e-3 too small; the update likewise."""
    grad, basis = random(150, 139), random_basis((), 150 if side == "left" else 139, 20)
    low_rank, _ = kernels.project(grad, basis, side, "tf32")
    exact = basis.double().mT @ grad.double() if side == "left" else grad.double() @ basis.double()
    assert 1e-5 < error(low_rank, exact) <= TF32_ROUNDED
    assert abs(float(low_rank.double().square().sum() / exact.square().sum()) - 1.0) <= 1e-4
    weight = torch.zeros(150, 139, device=DEVICE)
    left, right = (basis, low_rank) if side == "left" else (low_rank, basis.mT)
    options = {"by_row": False, "decay_factor": 1.0, "grad_finite": flag((), True), "precision": "tf32"}
    kernels.apply_update_(weight, grad, left, right, None, **options)
    assert error(-weight, left.double() @ right.double()) <= TF32_ROUNDED


@pytest.mark.usefixtures("cutting_cores")
def test_rounding_to_tf32_leaves_no_nan_finite() -> None:
    """NaN of any bits, those of all ones included, whose sum with a half would wrap to zero; infinity stays so."""
    bits = [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000, 0x7F7FFFFF]
    grad = random(8, 16)
    grad[3, : len(bits)] = torch.tensor(bits, dtype=torch.int32, device=DEVICE).view(torch.float32)
    basis = torch.eye(8, device=DEVICE)[:, 3:4].contiguous()
    low_rank, _ = kernels.project(grad[3:4].contiguous(), basis[3:4].contiguous(), "left", "tf32")
    found = low_rank[0].tolist()
    assert all(map(math.isnan, found[:3]))
    # The largest number of float32 is nearer to infinity than to the largest one of TF32.
    assert found[3:6] == [math.inf, -math.inf, math.inf]
    torch.testing.assert_close(low_rank[0, 6:], grad[3, 6:], rtol=2.0**-11, atol=0.0)


@pytest.mark.usefixtures("kernels_allowed")
@pytest.mark.parametrize("shape", [(24, 40), pytest.param((40, 24), marks=pytest.mark.full)])
def test_rounding_p_and_c_once_gives_the_bits_of_rounding_them_in_every_program(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole steps, one of a gradient in the subspace, whose |S| is summed from the residual."""
    pytest.importorskip("triton")
    from ds_fira.core.kernels.views import Room

    allocate, asked = Room.allocate, []
    ended = []
    for once in (True, False):
        if not once:
            # In memory of float32 P and C stay as they are.
            def kept(room: Room, dtype: torch.dtype, device: torch.device) -> None:
                asked.append(dtype)
                allocate(room, torch.float32 if dtype == torch.bfloat16 else dtype, device)

            monkeypatch.setattr(Room, "allocate", kept)
        param = nn.Parameter(random(*shape, seed=5))
        optimizer = FiraAdam([param], rank=4, lr=0.1, matmul_precision="bfloat16")
        for grad in (random(shape[0], 2) @ random(2, shape[1]), random(*shape)):
            param.grad = grad
            optimizer.step()
        ended.append([param.detach(), *optimizer.state[param].values()])
    assert asked.count(torch.bfloat16) == 2
    for before, after in zip(*ended, strict=True):
        assert torch.equal(before, after)


@pytest.mark.usefixtures("kernels_allowed")
def test_emulated_products_are_those_of_the_kernels() -> None:
    """Trainings that emulate bfloat16 on a CPU take the step that a GPU does, but for the order of sums."""
    pytest.importorskip("triton")
    changes = {}
    for name in ("kernels", "emulated", "exact"):
        param = nn.Parameter(random(40, 24, seed=5))
        before, choice = param.detach().clone(), "auto" if name == "kernels" else "off"
        optimizer = FiraAdam([param], rank=4, lr=0.1, matmul_precision="bfloat16", kernels=choice)
        with emulated("bfloat16" if name == "emulated" else "float32"):
            for seed in (0, 3):
                param.grad = random(40, 24, seed=seed)
                optimizer.step()
        changes[name] = param.detach() - before
    assert error(changes["emulated"], changes["kernels"]) < 1e-4
    assert error(changes["exact"], changes["kernels"]) > 5e-4


@pytest.mark.usefixtures("kernels_allowed")
def test_rounding_in_tf32_is_no_history_of_the_limiter() -> None:
    """Kernels that round to TF32 leave 3e-4 of |phi * G|; remembered, that would hold the next real residual back."""
    pytest.importorskip("triton")
    grad, _ = gradient_in_the_subspace()
    param = nn.Parameter(torch.zeros(96, 200, device=DEVICE))
    optimizer = FiraAdam([param], rank=16, lr=0.01, matmul_precision="tf32")
    param.grad = grad.to(DEVICE)
    optimizer.step()
    assert float(optimizer.state[param]["residual_norm"]) == 0.0


@pytest.mark.parametrize(
    ("device", "capability", "given", "wanted"),
    [
        ("cpu", None, None, "tf32"),
        ("cuda", (9, 0), None, "bfloat16"),
        ("cuda", (7, 0), None, "tf32"),
        ("cuda", (9, 0), "tf32", "tf32"),
        ("cpu", None, "bfloat16", "bfloat16"),
    ],
)
def test_the_device_chooses_the_precision_that_the_user_leaves_out(
    device: str, capability: tuple[int, int] | None, given: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the stepped tensors: under offload the CPU's. A Volta has no units for bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    precision_of.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        group = {"params": [torch.empty(4, 6, device=device)], "rank": 2, "matmul_precision": given}
    assert GroupSettings.of(group).chosen["matmul_precision"] == wanted
    precision_of.cache_clear()
