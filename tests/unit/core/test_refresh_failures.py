"""A refresh whose solver fails: on the CPU if need be, else the old basis stays; and the products that it makes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_fira import FiraAdam
from ds_fira.core.basis import basis_of, solver_failed
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import allocate, matrix_states
from ds_fira.core.step import MatrixTask
from ds_fira.observe.metrics import StepMetrics
from ds_fira.optim.settings import check_params
from ds_fira.sharding.refresher import Refresher
from tests.reference.gradients import make_gradients, make_weight
from tests.unit.sharding.threads import Threads

SHAPE = (9, 24)
aten = torch.ops.aten
# What torch 2.9 to 2.13 raise, word for word.
CUSOLVER = RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`.")
GPU_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 172.00 MiB.\nGPU 0 has a total of ...")
HOST_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory")
FAILURES = {"cuSOLVER": CUSOLVER, "GPU memory": GPU_MEMORY, "host memory": HOST_MEMORY}


def raising(error: Exception, on: Callable[[], bool] = lambda: True, otherwise: Callable | None = None) -> Callable:
    """A solver that raises."""

    def solve(*args: Any, **kwargs: Any) -> Any:
        if on():
            raise error
        return otherwise(*args, **kwargs)

    return solve


@pytest.mark.parametrize("failure", FAILURES)
def test_the_training_goes_on_with_the_old_basis(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(make_weight(SHAPE))
    optimizer = FiraAdam([param], rank=4, lr=0.01, update_proj_gap=2)
    gradients, bases = make_gradients(SHAPE, 7), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, gradient in enumerate(gradients):
            with monkeypatch.context() as patch:
                if 2 <= step < 6:
                    patch.setattr(torch.linalg, "svd", raising(FAILURES[failure]))
                param.grad = gradient.clone()
                optimizer.step()
            bases.append(optimizer.state[param]["basis"].clone())
    (said,) = [str(warning.message) for warning in caught if "decomposition failed" in str(warning.message)]
    assert str(FAILURES[failure]).splitlines()[0] in said
    assert all(torch.equal(basis, bases[0]) for basis in bases[:6])
    # Due until it is done.
    assert not torch.equal(bases[6], bases[0])


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no")])
def test_a_fault_of_the_program_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(make_weight(SHAPE))
    optimizer = FiraAdam([param], rank=4)
    param.grad = torch.ones(SHAPE)
    monkeypatch.setattr(torch.linalg, "svd", raising(error))
    with pytest.raises(type(error), match=str(error)):
        optimizer.step()


def test_the_end_of_a_device_is_no_failure_of_a_solver() -> None:
    assert solver_failed(torch.linalg.LinAlgError("linalg.eigh: failed to converge"))
    if hasattr(torch, "AcceleratorError"):
        assert not solver_failed(torch.AcceleratorError("CUDA error: an illegal memory access, in cublas"))


class Elsewhere(Tensor):
    """A CPU tensor that says that it is on another device, whose solver has no memory; all else is computed."""

    @staticmethod
    def __new__(cls, value: Tensor) -> Tensor:
        tensor = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device="meta")
        tensor.value = value
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._linalg_svd.default:
            raise GPU_MEMORY
        leaves = func is aten._to_copy.default and str(kwargs.get("device")) == "cpu"
        kwargs.pop("device", None)
        found = func(*torch.utils._pytree.tree_map_only(cls, lambda tensor: tensor.value, args), **kwargs)
        if func is aten.copy_.default:
            return args[0]
        return found if leaves or not isinstance(found, Tensor) else cls(found)


def test_the_cpu_decomposes_what_the_gpu_has_no_memory_for() -> None:
    """The same basis to the bit as of a gradient on the CPU, on the gradient's device; one warning for all matrices."""
    settings = GroupSettings.of(check_params({"rank": 4}))
    weight, (gradient,) = make_weight(SHAPE), make_gradients(SHAPE, 1)
    (state,) = matrix_states(allocate(weight, [SHAPE], settings, False), [SHAPE], settings, False, FiraAdam.algorithm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [basis_of(Elsewhere(gradient), state, settings, None) for _ in range(2)]
    expected = basis_of(gradient, state, settings, None)
    for basis in found:
        assert basis.device.type == "meta"
        assert torch.equal(basis.value, expected)
    (said,) = [str(warning.message) for warning in caught]
    assert "could not be decomposed on meta (CUDA out of memory. Tried to allocate 172.00 MiB.); the CPU does" in said


def test_replicas_decide_alike_where_the_solver_of_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that computes a basis sends with it whether there is one."""
    settings = GroupSettings.of(check_params({"rank": 4}))
    failing = threading.local()
    solver = raising(CUSOLVER, lambda: getattr(failing, "here", False), torch.linalg.svd)
    monkeypatch.setattr(torch.linalg, "svd", solver)
    barrier, box = threading.Barrier(2), [(), ()]
    gradients = make_gradients(SHAPE, 3)

    def run(rank: int) -> list[Tensor]:
        failing.here = rank == 1
        refresher = Refresher(StepMetrics(), "FiraAdam")
        shapes, weight = [SHAPE] * 3, torch.zeros(1)
        states = matrix_states(allocate(weight, shapes, settings, True), shapes, settings, True, FiraAdam.algorithm)
        tasks = [MatrixTask(weight, g.float(), s, settings, 1e-4) for g, s in zip(gradients, states, strict=True)]
        refresher.refresh(tasks, Threads(rank, barrier, box))
        return [state.basis if state.has_basis else torch.zeros(0) for state in states]

    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("ignore")
        first, second = pool.map(run, range(2))
    assert [basis.numel() for basis in first] == [36, 0, 36]
    assert all(map(torch.equal, first, second))


class Switches(TorchDispatchMode):
    """Reads, at every product and decomposition, in what torch would multiply float32 matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_, aten._linalg_svd, aten._linalg_eigh):
            self.seen.append(user_switches())
        return func(*args, **(kwargs or {}))


def user_switches() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize("subspace", ["svd", "gram", "randomized"])
def test_a_refresh_multiplies_in_float32_whatever_the_user_has_set(subspace: str) -> None:
    """Orthonormal to 7e-7 in float32, to 3e-4 in TF32; the user's switches are put back, of the older API too."""
    param = nn.Parameter(make_weight(SHAPE))
    optimizer = FiraAdam([param], rank=4, subspace=subspace, refresh_moments="rotate", update_proj_gap=1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # TF32 on a GPU, bfloat16 on a CPU
    try:
        user = user_switches()
        assert user == ("tf32", "bf16")
        for gradient in make_gradients(SHAPE, 2):
            param.grad = gradient
            with Switches() as switches:
                optimizer._refresher.refresh([task_of(optimizer, param)])
            assert switches.seen
            assert set(switches.seen) == {("ieee", "ieee")}
            assert user_switches() == user
            assert torch.backends.cuda.matmul.allow_tf32
            optimizer.step()
    finally:
        torch.set_float32_matmul_precision(before)


def task_of(optimizer: FiraAdam, param: nn.Parameter) -> MatrixTask:
    """The task of the only matrix of an optimizer."""
    settings = GroupSettings.of(optimizer.param_groups[0])
    state = optimizer._state_of(param, optimizer.param_groups[0])
    (view,) = matrix_states(state, [SHAPE], settings, False, optimizer.algorithm)
    return MatrixTask(param.detach(), param.grad, view, settings, 1e-4)
