"""On a CUDA device: the same steps as on the CPU, counters on the host."""

from __future__ import annotations

import pytest
import torch

import ds_fira
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import weight_change_error

# Products in float32, in another order; relative to the change of the weights.
CUDA_VS_CPU = 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("formulation", ["released", "paper"])
def test_steps_as_on_the_cpu(shape: tuple[int, int], formulation: str) -> None:
    """With one basis, whose signs do not matter; moments kept across a refresh would show those of the two solvers."""
    weight, gradients = make_weight(shape), make_gradients(shape, 9)
    ended = {}
    for device in ("cpu", "cuda"):
        param = torch.nn.Parameter(weight.to(device, torch.float32, copy=True))
        optimizer = ds_fira.FiraAdam([param], lr=0.01, rank=4, formulation=formulation, matmul_precision="float32")
        for gradient in gradients:
            param.grad = gradient.to(device, torch.float32)
            optimizer.step()
        ended[device] = param.detach().cpu()
    assert weight_change_error(weight, ended["cuda"], ended["cpu"]) <= CUDA_VS_CPU


@pytest.mark.gpu
def test_counters_stay_on_the_host() -> None:
    """Also after a state dict was loaded, which moves all state to the parameter's device."""
    param = torch.nn.Parameter(torch.randn(8, 6, device="cuda"))
    optimizer = ds_fira.FiraAdam([param], rank=2)
    param.grad = torch.randn(8, 6, device="cuda")
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    devices = {key: value.device.type for key, value in optimizer.state[param].items()}
    assert {key for key, device in devices.items() if device == "cpu"} == {"step", "refresh_step"}
    optimizer.step()
    assert int(optimizer.state[param]["step"]) == 2
