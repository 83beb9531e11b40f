"""Fira around RMSProp and around rules of users: Algorithm 2 of the paper, on whole matrices."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_fira
from tests.distributed.rule_jobs import AdaGrad, FiraAdaGrad, FiraLion, Lion
from tests.distributed.zero_jobs import Net
from tests.reference import tolerances
from tests.reference.fira_rmsprop_reference import fira_rmsprop
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import drive, relative_error, run_optimizer, weight_change_error, with_a_rank

STEPS, GAP, LR = 10, 3, 0.01
SHAPES = [(8, 6)] * 3 + [(6, 12)] * 3 + [(6, 6), (3, 40)]
PARAMS = {"rank": 2, "update_proj_gap": GAP, "lr": 0.003, "alpha": 0.5, "weight_decay": 0.1}
PARAMS |= {"target_modules": ["layers"]}
KINDS = [ds_fira.FiraRMSProp, FiraLion, FiraAdaGrad]
PAGE = Path(__file__).resolve().parents[3] / "docs" / "plug_and_play.md"


def one(kind: type, weight: Tensor, **settings: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    param = nn.Parameter(weight.clone())
    return param, kind(with_a_rank({"params": [param], **settings}), lr=LR)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"rho": 0.9, "eps": 1e-4, "weight_decay": 0.1}, {"refresh_moments": "rotate"}])
def test_rmsprop_follows_a_plain_loop(shape: tuple[int, int], options: dict[str, Any]) -> None:
    weight, gradients = make_weight(shape), make_gradients(shape, STEPS)
    group = {"rank": 4, "update_proj_gap": GAP, "alpha": 0.25, **options}
    found, state = run_optimizer(lambda groups: ds_fira.FiraRMSProp(groups, lr=LR), weight, gradients, **group)
    rotate = group.pop("refresh_moments", "keep") == "rotate"
    expected, square, limited = fira_rmsprop(weight, gradients, lr=LR, rotate=rotate, **group)
    assert 1 <= sum(limited) < STEPS, "the limiter must act in some steps and rest in others"
    assert weight_change_error(weight, found, expected) < tolerances.FLOAT32_VS_REFERENCE
    assert relative_error(state["square_avg"], square) < 2 * tolerances.FLOAT32_STATE
    assert set(state) == {"step", "refresh_step", "basis", "square_avg", "residual_norm"}


def test_algorithm_2_by_hand() -> None:
    """Rho = 0 and eps = 1, so N = R / (|R| + 1); the basis is (1, 0) from the first gradient on."""
    param, optimizer = one(ds_fira.FiraRMSProp, torch.zeros(2, 2), rank=1, rho=0.0, eps=1.0)
    first, second = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # R = (2, 0), N = (2/3, 0), phi = (1/3, 0): nothing outside the subspace has a scale.
    expected = torch.tensor([[2 / 3, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(drive(optimizer, param, [first]), -LR * expected)
    # R = (1, 3), N = (1/2, 3/4), phi = (1/2, 1/4), S = phi * ((0, 2), (0, 4)); no |S| before it to grow from.
    expected += torch.tensor([[1 / 2, 1.0], [3 / 4, 1.0]])
    torch.testing.assert_close(drive(optimizer, param, [second]), -LR * expected)
    # R = (3, 9), N = (3/4, 9/10), phi = (1/4, 1/10), S = ((0, 3/2), (0, 6/5)), limited to 1.01 of sqrt(2).
    shrunk = 1.01 * math.sqrt(2.0) / math.hypot(1.5, 1.2)
    expected += torch.tensor([[3 / 4, 1.5 * shrunk], [9 / 10, 1.2 * shrunk]])
    torch.testing.assert_close(drive(optimizer, param, [3.0 * second]), -LR * expected)


@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 3, 4), ()], ids=str)
def test_what_is_not_projected_is_torchs_rmsprop(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, *gradients = (torch.randn(shape, generator=generator) for _ in range(STEPS))
    param, optimizer = one(ds_fira.FiraRMSProp, weight)
    other = nn.Parameter(weight.clone())
    found = drive(optimizer, param, gradients)
    expected = drive(torch.optim.RMSprop([other], lr=LR, alpha=0.99, eps=1e-8), other, gradients)
    assert weight_change_error(weight, found, expected) < tolerances.FLOAT32_VS_FIRA


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite(kind: type, value: float) -> None:
    """Of a matrix it changes nothing, elsewhere nothing of the element."""
    for group in ({"rank": 2}, {}):
        gradients = make_gradients((6, 9), 2)
        param, optimizer = one(kind, make_weight((6, 9)), weight_decay=0.1, **group)
        drive(optimizer, param, gradients[:1])
        before = {"weight": param.detach().clone()} | {k: v.clone() for k, v in optimizer.state[param].items()}
        gradients[1][2, 3] = value
        drive(optimizer, param, gradients[1:])
        after = {"weight": param.detach(), **optimizer.state[param]}
        for key, tensor in before.items():
            if group:
                assert torch.equal(after[key], tensor), key
            elif tensor.ndim:
                assert torch.isfinite(after[key]).all()
                assert torch.equal(after[key][2, 3], tensor[2, 3]), key
                assert not torch.equal(after[key], tensor), key


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("group", [{"rank": 4, "update_proj_gap": GAP, "refresh_moments": "rotate"}, {}], ids=str)
def test_compressed_states(state_dtype: str, group: dict[str, Any]) -> None:
    if state_dtype == "int8":
        pytest.importorskip("bitsandbytes")
    shape = (60, 80)  # large enough that a parameter that is not projected has compressed states too
    weight, gradients = make_weight(shape), make_gradients(shape, STEPS)
    for kind, bound in ((ds_fira.FiraRMSProp, 0.05), (FiraAdaGrad, 0.1)):

        def make(groups: list[dict[str, Any]], kind: type = kind) -> torch.optim.Optimizer:
            return kind(with_a_rank(*groups), lr=LR)

        exact, _ = run_optimizer(make, weight, gradients, **group)
        found, state = run_optimizer(make, weight, gradients, **group, state_dtype=state_dtype)
        assert 0.0 < (found - exact).norm() < bound * (exact - weight).norm()
        for name, moment in kind.algorithm.states.items():
            expected = {"bfloat16": torch.bfloat16, "int8": torch.uint8 if moment == "second" else torch.int8}
            assert state[name].dtype == expected[state_dtype]


@pytest.mark.parametrize("change", ["rotate", "reset", "keep"])
def test_a_refresh_treats_every_state_by_its_kind(change: str) -> None:
    gradients = make_gradients((12, 20), 2)
    param, optimizer = one(FiraAdaGrad, make_weight((12, 20)), rank=4, update_proj_gap=1, refresh_moments=change)
    drive(optimizer, param, gradients[:1])
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    drive(optimizer, param, gradients[1:])
    state = optimizer.state[param]
    turned = state["basis"].T @ before["basis"]
    low_rank = state["basis"].T @ gradients[1]
    carried = {
        "rotate": (turned**2 @ before["total"], turned @ before["velocity"], 0.0),
        "reset": (torch.zeros(4, 20), torch.zeros(4, 20), 0.0),
        "keep": (before["total"], before["velocity"], 1.0),
    }[change]
    total = carried[0] + low_rank**2
    torch.testing.assert_close(state["total"], total, rtol=1e-4, atol=1e-7)
    velocity = 0.5 * carried[1] + low_rank / (total.sqrt() + 1e-6)
    torch.testing.assert_close(state["velocity"], velocity, rtol=1e-3, atol=1e-4)
    assert state["seen"].unique().tolist() == [carried[2] + 1.0]


@pytest.mark.usefixtures("kernels_allowed")
@pytest.mark.parametrize("kind", [ds_fira.FiraRMSProp, FiraLion])
def test_with_the_kernels(kind: type) -> None:
    """A device decides itself whether a gradient is finite."""
    pytest.importorskip("triton", reason="Triton is not installed")
    weight, gradients = make_weight((20, 12)), make_gradients((20, 12), 5)
    gradients[2][1, 1] = math.nan
    group = {"rank": 4, "update_proj_gap": 2, "matmul_precision": "float32"}
    (found, state), (expected, other) = (
        run_optimizer(
            lambda groups, kernels=choice: kind(with_a_rank(*groups), lr=LR, kernels=kernels),
            weight,
            gradients,
            **group,
        )
        for choice in ("auto", "off")
    )
    assert weight_change_error(weight, found, expected) < 1e-5
    assert int(state["step"]) == int(other["step"]) == 4
    for name in kind.algorithm.states:
        assert relative_error(state[name], other[name]) < 1e-5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rho": 1.5}, "rho = 1.5 is not legal; give a number from 0 up to but not including 1."),
        ({"betas": (0.9, 0.99)}, "betas = .* is a setting of FiraAdam that FiraRMSProp has no use for"),
        ({"roh": 0.9}, "unknown setting 'roh' = 0.9; did you mean 'rho'"),
        ({"rank": 0}, "rank = 0 is not legal; give a whole number"),
    ],
)
def test_settings_are_checked(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"FiraRMSProp: {message}"):
        ds_fira.FiraRMSProp([nn.Parameter(torch.zeros(3, 4))], **{"rank": 2, **setting})


def test_groups_of_a_model() -> None:
    groups = ds_fira.param_groups(Net(SHAPES), rank=2, optimizer="FiraRMSProp", rho=0.8, alpha=0.5)
    assert {group.get("rho") for group in groups} == {0.8}
    assert [group.get("alpha") for group in groups] == [0.5, None, None]
    optimizer = ds_fira.FiraRMSProp(groups)
    assert optimizer.param_groups[0]["eps"] == 1e-8
    with pytest.raises(ValueError, match="NoSuch is no optimizer that this process knows"):
        ds_fira.param_groups(Net(SHAPES), rank=2, optimizer="NoSuch")


def broken(**contents: Any) -> type[ds_fira.Rule]:
    own = {"__module__": __name__, "__qualname__": "Broken", "direction": lambda rule, grad, states, step: grad}
    return type("Broken", (ds_fira.Rule,), {**own, **contents})


BROKEN = [
    ({"direction": ds_fira.Rule.direction}, "Broken has no direction; define direction"),
    ({"states": {"basis": "first"}}, "states names 'basis', which means something else"),
    ({"states": {"a": "third"}}, r"states\['a'\] = 'third' is not legal"),
    ({"alpha": 0.5, "__annotations__": {"alpha": float}}, "Broken.alpha has the name of a setting of Fira"),
    ({"__annotations__": {"beta": float}}, "Broken.beta has no default"),
]


@pytest.mark.parametrize(("contents", "message"), BROKEN, ids=lambda value: str(value)[:20])
def test_a_rule_that_cannot_be_plugged_is_refused(contents: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"plug: .*{message}"):
        ds_fira.plug(broken(**contents))


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (lambda rule, grad, states, step: grad.sum(), r"returned \(\) for a gradient of shape"),
        (lambda rule, grad, states, step: states.update(new=grad) or grad, "left a state 'new'"),
        (lambda rule, grad, states, step: states.update(a=grad[:1]) or grad, "left a state 'a'"),
    ],
)
@pytest.mark.parametrize("group", [{"rank": 2}, {}], ids=str)
def test_a_rule_that_breaks_its_contract_stops(direction: Any, message: str, group: dict[str, Any]) -> None:
    kind = ds_fira.plug(broken(direction=direction, states={"a": "first"}))
    param, optimizer = one(kind, make_weight((6, 9)), **group)
    with pytest.raises(ValueError, match=message):
        drive(optimizer, param, make_gradients((6, 9), 1))


def test_a_name_that_is_taken_and_states_that_changed() -> None:
    with pytest.raises(ValueError, match="name = 'FiraAdam' belongs to another optimizer"):
        ds_fira.plug(Lion, "FiraAdam")
    with pytest.raises(ValueError, match="name = 'FiraLion' belongs to another optimizer"):
        ds_fira.plug(AdaGrad, "FiraLion")
    _, before = one(ds_fira.plug(broken(states={"a": "first"})), torch.zeros(3, 4))
    _, after = one(ds_fira.plug(broken(states={"b": "first"})), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"keeps the states \['b'\], and the checkpoint holds \['a'\]"):
        after.load_state_dict(before.state_dict())


def test_the_example_of_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(block, namespace)
    assert len(blocks) >= 2
    assert namespace["FiraSignum"].algorithm.states == {"momentum": "first"}
    optimizer = namespace["optimizer"]
    assert isinstance(optimizer, namespace["FiraSignum"])
    assert all(torch.isfinite(param).all() for group in optimizer.param_groups for param in group["params"])


@pytest.mark.parametrize("group", [{"rank": 2}, {}], ids=str)
def test_a_rule_may_change_its_gradient(group: dict[str, Any]) -> None:
    """It is given a copy: the step is that of a rule which leaves its gradient alone."""
    weights = []
    for direction in (lambda rule, grad, states, step: grad * 2.0, lambda rule, grad, states, step: grad.mul_(2.0)):
        param, optimizer = one(ds_fira.plug(broken(direction=direction)), make_weight((6, 9)), **group)
        (gradient,) = make_gradients((6, 9), 1)
        param.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(param.grad, gradient)
        weights.append(param.detach().clone())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], make_weight((6, 9)))
