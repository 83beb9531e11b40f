"""The optimizer's path for GPUs: kernels, batches of matrices, decisions on the device. In the interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import ds_fira
from ds_fira import FiraAdam
from ds_fira.core import kernels
from ds_fira.core.state import host_key
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.local_matrices import MAX_BATCH, LocalMatrices
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import with_a_rank

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_allowed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS: dict[str, Any] = {"update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1, "matmul_precision": "float32"}


def drive(kind: str, kernel: bool, steps: int = 7, spoil: int | None = None, **settings: Any):
    """Make steps with the same gradients; returns parameters, optimizer, and the optimizer's metrics."""
    if DEVICE.type == "cpu":
        kernels.interpret_on_cpu(kernel)
    settings = {**SETTINGS, **settings}
    if kind == "flat":
        shapes = [(9, 20), (9, 20), (9, 20), (17, 6)]
    else:
        shapes = {"wide": [(9, 20)], "tall": [(17, 6)], "experts": [(9, 20)] * 3, "adamw": [(40, 7)]}[kind]
    weights = [make_weight(shape, seed=i).to(DEVICE) for i, shape in enumerate(shapes)]
    gradients = [make_gradients(shape, steps, seed=i) for i, shape in enumerate(shapes)]
    if kind == "flat":
        start = torch.cat([weight.flatten() for weight in weights])
    else:
        start = torch.stack(weights) if kind == "experts" else weights[0]
    param = Parameter(start.clone())
    # As in ZeRO, the flat buffer takes the parameters' place when the optimizer is there.
    group = {"params": [Parameter(torch.empty(1, 1)) if kind == "flat" else param]}
    groups = with_a_rank(group if kind == "adamw" else {**group, "rank": 4})
    optimizer = FiraAdam(groups, lr=0.01, project_full_rank=True, **settings)
    if kind == "flat":
        optimizer.param_groups[0]["params"] = [param]
        offsets = [sum(w.numel() for w in weights[:i]) for i in range(len(weights))]
        whole = tuple(
            MatrixShard(f"m{i}", shape, offset, 0, shape[0] * shape[1])
            for i, (shape, offset) in enumerate(zip(shapes, offsets, strict=True))
        )
        optimizer.bind(param, LocalMatrices(whole, tuple(range(len(whole)))))
    for step in range(steps):
        parts = [gradient[step].float().to(DEVICE) for gradient in gradients]
        if spoil == step:
            parts[-1] = parts[-1].clone().index_fill_(0, torch.tensor([1], device=DEVICE), float("nan"))
        param.grad = torch.cat([part.flatten() for part in parts]).view_as(param)
        optimizer.step()
    return param.detach(), optimizer, start


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("wide", {}),
        ("tall", {}),
        ("flat", {}),
        ("adamw", {}),
        ("experts", {"formulation": "paper", "scaling": "matrix"}),
        ("wide", {"limiter": "none", "scaling": "none"}),
        ("flat", {"residual": "normalized"}),
        ("tall", {"residual": "normalized", "scaling": "matrix", "state_dtype": "bfloat16"}),
        ("experts", {"residual": "normalized", "scaling": "matrix", "limiter": "growth"}),
        ("flat", {"residual": "normalized", "residual_beta": 0.0, "residual_warmup": 6}),
        ("flat", {"state_dtype": "bfloat16"}),
        ("flat", {"proj_type": "reverse_std", "subspace": "gram", "refresh_moments": "rotate", "stagger": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(map(str, value.values())) or "defaults",
)
def test_kernels_make_the_steps_of_the_torch_functions(kind: str, settings: dict[str, Any]) -> None:
    """Weights, states and metrics, over refreshes and with one gradient that is not finite."""
    expected, theirs, start = drive(kind, kernel=False, spoil=4, **settings)
    found, ours, _ = drive(kind, kernel=True, spoil=4, **settings)
    # Rounding of products of up to 20 terms over 7 steps; a bfloat16 state may round to the other neighbour.
    tolerance = 2e-2 if "state_dtype" in settings else 2e-5
    assert (found - expected).norm() <= tolerance * (expected - start).norm()
    for key, value in theirs.state[theirs.param_groups[0]["params"][0]].items():
        mine = ours.state[ours.param_groups[0]["params"][0]][key]
        if value.dtype == torch.int64:
            assert torch.equal(mine, value), key
        else:
            assert (mine.float() - value.float()).norm() <= tolerance * value.float().norm().clamp(min=1e-6), key
    if kind != "adamw":
        mine, wanted = ours.metrics.totals(), theirs.metrics.totals()
        assert mine.matrix_steps == wanted.matrix_steps
        assert mine.limiter_activations == wanted.limiter_activations
        assert mine.captured_energy_sum == pytest.approx(wanted.captured_energy_sum, rel=1e-5)
        assert mine.residual_square_sum == pytest.approx(wanted.residual_square_sum, rel=tolerance)
        assert wanted.residual_square_sum > 0.0


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors, those kept for the host apart."""

    def __init__(self, host: list[Tensor]) -> None:
        super().__init__()
        self.host = {tensor.untyped_storage().data_ptr() for tensor in host}
        self.count = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.count += args[0].untyped_storage().data_ptr() not in self.host
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten.equal.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "residual"),
    [*((kind, "scaled") for kind in ("wide", "tall", "experts", "flat", "adamw")), ("wide", "normalized")],
)
def test_a_step_between_refreshes_reads_nothing_from_the_device(kind: str, residual: str) -> None:
    """No host synchronization; the torch functions, which do ask, show that the count can see it."""
    for kernel in (True, False):
        _, optimizer, _ = drive(kind, kernel, steps=5, update_proj_gap=100, residual=residual)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        host = [value for key, value in state.items() if host_key(key) or (kind == "adamw" and key == "step")]
        with HostReads(host) as reads:
            optimizer.step()
        assert (reads.count == 0) == kernel, reads.count


def test_a_step_count_that_lags_behind_delays_the_refresh() -> None:
    """Steps with gradients that are not finite do not count, and the host finds out where a refresh may be due."""
    _, optimizer, _ = drive("wide", kernel=True, steps=6, spoil=1, update_proj_gap=4)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    # The refresh after four steps made, one later than after four calls.
    assert (int(state["step"]), int(state["refresh_step"])) == (5, 4)


def test_neighbours_of_one_shape_are_one_batch() -> None:
    """Batches end where the shape changes, where memory has a gap, at a matrix that waits, and at the largest size."""
    shapes = [(2, 3)] * 3 + [(3, 2)] * 2 + [(3, 2)] * (MAX_BATCH + 1)
    whole = tuple(MatrixShard(str(i), shape, 6 * i + (i > 4), 0, 6) for i, shape in enumerate(shapes))
    matrices = LocalMatrices(whole, tuple(range(len(whole))))
    ready = [True] * len(whole)
    assert matrices.runs(ready) == [(0, 3), (3, 5), (5, 5 + MAX_BATCH), (5 + MAX_BATCH, 6 + MAX_BATCH)]
    ready[1] = False
    assert matrices.runs(ready)[:4] == [(0, 1), (1, 2), (2, 3), (3, 5)]


def test_a_model_with_kernels_matches_one_without() -> None:
    """A model's parameters in bfloat16, norms and biases included, both times with the gradients of the first run."""
    found: list[list[Tensor]] = []
    gradients: list[list[Tensor]] = []
    for kernel in (False, True):
        if DEVICE.type == "cpu":
            kernels.interpret_on_cpu(kernel)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 8))
        model = model.to(DEVICE, torch.bfloat16)
        optimizer = FiraAdam(ds_fira.param_groups(model, rank=4), lr=0.01)
        for step in range(4):
            if not kernel:
                optimizer.zero_grad()
                model(torch.ones(5, 12, device=DEVICE, dtype=torch.bfloat16)).float().square().sum().backward()
                gradients.append([param.grad.clone() for param in model.parameters()])
            for param, gradient in zip(model.parameters(), gradients[step], strict=True):
                param.grad = gradient.clone()
            optimizer.step()
        found.append([param.detach().float().cpu() for param in model.parameters()])
    for expected, mine in zip(*found, strict=True):
        # One unit in the last place of bfloat16 where the two round differently.
        torch.testing.assert_close(mine, expected, rtol=2.0**-7, atol=1e-3)
