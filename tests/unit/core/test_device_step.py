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
from ds_fira.core.batches import MAX_BATCH, together
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import allocate, host_key, matrix_states
from ds_fira.core.step import MatrixTask
from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.local_matrices import LocalMatrices
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import with_a_rank

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_allowed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS: dict[str, Any] = {"update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1, "matmul_precision": "float32"}


def drive(kind: str, kernel: bool, steps: int = 5, spoil: int | None = None, **settings: Any):
    """Make steps with the same gradients; returns parameters, optimizer, and the optimizer's metrics."""
    settings = {**SETTINGS, "kernels": "auto" if kernel else "off", **settings}
    if kind == "flat":
        # Not at equal distances, so that a table says where they are.
        shapes = [(9, 20), (17, 6), (9, 20), (9, 20)]
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
        pytest.param("tall", {}, marks=pytest.mark.full),
        ("flat", {}),
        ("adamw", {}),
        ("experts", {"formulation": "paper", "scaling": "matrix"}),
        pytest.param("wide", {"limiter": "none", "scaling": "none"}, marks=pytest.mark.full),
        pytest.param("flat", {"residual": "normalized"}, marks=pytest.mark.full),
        ("tall", {"residual": "normalized", "scaling": "matrix", "state_dtype": "bfloat16"}),
        ("experts", {"residual": "normalized", "scaling": "matrix", "limiter": "growth"}),
        pytest.param(
            "wide", {"residual": "normalized", "residual_beta": 0.0, "residual_warmup": 6}, marks=pytest.mark.full
        ),
        pytest.param(
            "flat", {"residual": "normalized", "residual_beta": 0.0, "residual_warmup": 6}, marks=pytest.mark.full
        ),
        pytest.param("flat", {"state_dtype": "bfloat16"}, marks=pytest.mark.full),
        ("experts", {"state_dtype": "int8"}),
        ("tall", {"proj_type": "reverse_std", "subspace": "gram", "refresh_moments": "rotate", "stagger": True}),
        pytest.param(
            "flat",
            {"proj_type": "reverse_std", "subspace": "gram", "refresh_moments": "rotate", "stagger": True},
            marks=pytest.mark.full,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(map(str, value.values())) or "defaults",
)
def test_kernels_make_the_steps_of_the_torch_functions(kind: str, settings: dict[str, Any]) -> None:
    """Weights, states and metrics, over refreshes and with one gradient that is not finite."""
    expected, theirs, start = drive(kind, kernel=False, spoil=2, **settings)
    found, ours, _ = drive(kind, kernel=True, spoil=2, **settings)
    # Rounding of products of up to 20 terms over 5 steps; a bfloat16 state may round to the other neighbour.
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


def reads_of_a_step(kind: str, kernel: bool, **settings: Any) -> int:
    """Numbers that the host reads from the device in a step between refreshes."""
    _, optimizer, _ = drive(kind, kernel, steps=2, update_proj_gap=100, **settings)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    host = [value for key, value in state.items() if host_key(key) or (kind == "adamw" and key == "step")]
    with HostReads(host) as reads:
        optimizer.step()
    return reads.count


@pytest.mark.parametrize(
    ("kind", "residual"),
    [*((kind, "scaled") for kind in ("wide", "tall", "experts", "flat", "adamw")), ("wide", "normalized")],
)
def test_a_step_between_refreshes_reads_nothing_from_the_device(kind: str, residual: str) -> None:
    """No host synchronization; the torch functions, which do ask, show that the count can see it."""
    assert reads_of_a_step(kind, kernel=True, residual=residual) == 0
    assert reads_of_a_step(kind, kernel=False, residual=residual) > 0


@pytest.mark.parametrize("variable", ["0", "1", ""])
def test_the_environment_switches_the_kernels_off_too(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never on what the setting says is off; the torch functions give themselves away by what they read."""
    monkeypatch.setenv("DS_FIRA_KERNELS", variable)
    assert (reads_of_a_step("wide", kernel=True) > 0) == (variable == "0")
    assert reads_of_a_step("wide", kernel=False) > 0


def test_an_illegal_switch_stops_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    param = Parameter(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="FiraAdam: kernels = 'on' is not legal; choose 'auto' or 'off'"):
        FiraAdam([param], rank=2, kernels="on")
    monkeypatch.setenv("DS_FIRA_KERNELS", "off")
    with pytest.raises(ValueError, match="DS_FIRA_KERNELS = 'off' in the environment is not legal; set it to 0"):
        FiraAdam([param], rank=2)


def test_a_step_count_that_lags_behind_delays_the_refresh() -> None:
    """Steps with gradients that are not finite do not count, and the host finds out where a refresh may be due."""
    _, optimizer, _ = drive("wide", kernel=True, steps=6, spoil=1, update_proj_gap=4)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    # The refresh after four steps made, one later than after four calls.
    assert (int(state["step"]), int(state["refresh_step"])) == (5, 4)


def tasks_of(*shapes: tuple[int, int]) -> list[MatrixTask]:
    """Tasks of tensors of their own, each with a basis."""
    settings = GroupSettings(rank=1)
    found = []
    for shape in shapes:
        weight = torch.zeros(shape, device=DEVICE)
        state = allocate(weight, [shape], settings, False)
        (view,) = matrix_states(state, [shape], settings, False, FiraAdam.algorithm)
        view.refresh_step.fill_(0)
        found.append(MatrixTask(weight, torch.zeros_like(weight), view, settings, 1e-4))
    return found


def test_matrices_alike_are_one_batch() -> None:
    """Wherever they lie: of one shape and dtype, all with a basis, as many as go together."""
    shapes = [(2, 3), (3, 2), (2, 3), *[(3, 2)] * MAX_BATCH]
    tasks = tasks_of(*shapes)
    assert together(tasks) == [[0, 2], [1, *range(3, 2 + MAX_BATCH)], [2 + MAX_BATCH]]
    tasks = tasks_of(*shapes)
    tasks[0].state.refresh_step.fill_(-1)
    tasks[5].weight = tasks[5].weight.t().contiguous().t()
    tasks[6].grad = tasks[6].grad.bfloat16()
    assert together(tasks) == [[0], [1, 3, 4, *range(7, 3 + MAX_BATCH)], [2], [5], [6]]
    with kernels.switched("off"):
        assert together(tasks_of(*shapes)) == [[position] for position in range(len(shapes))]


def test_a_model_with_kernels_matches_one_without() -> None:
    """A model's parameters in bfloat16, norms and biases included, both times with the gradients of the first run."""
    found: list[list[Tensor]] = []
    gradients: list[list[Tensor]] = []
    for kernel in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 8))
        model = model.to(DEVICE, torch.bfloat16)
        # Gradients of full rank: a basis of more directions than they have is rounding in the others, whose size Adam
        # makes 1.
        inputs = torch.randn(16, 12, dtype=torch.bfloat16).to(DEVICE)
        choice = "auto" if kernel else "off"
        optimizer = FiraAdam(ds_fira.param_groups(model, rank=4), lr=0.01, matmul_precision="float32", kernels=choice)
        for step in range(4):
            if not kernel:
                optimizer.zero_grad()
                model(inputs).float().square().sum().backward()
                gradients.append([param.grad.clone() for param in model.parameters()])
            for param, gradient in zip(model.parameters(), gradients[step], strict=True):
                param.grad = gradient.clone()
            optimizer.step()
        found.append([param.detach().float().cpu() for param in model.parameters()])
    for expected, mine in zip(*found, strict=True):
        # One unit in the last place of bfloat16 where the two round differently.
        torch.testing.assert_close(mine, expected, rtol=2.0**-7, atol=1e-3)
