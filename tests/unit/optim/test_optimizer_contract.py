"""FiraAdam as a torch.optim.Optimizer: state, closures, schedulers, checkpoints, parameters that come and go."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ds_fira import FiraAdam
from tests.reference import tolerances
from tests.reference.fira_reference import AdamWReference, FiraReference
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import drive, run_reference, weight_change_error, with_a_rank

LR = 1e-2
STEPS = 13
FIRA_GROUP = {"rank": 3, "update_proj_gap": 4, "alpha": 0.5, "weight_decay": 0.05}
KINDS = {  # shape, dtype, group settings
    "matrix": ((10, 14), torch.float32, FIRA_GROUP),
    "tall": ((14, 10), torch.float32, {**FIRA_GROUP, "formulation": "paper"}),
    "experts": ((2, 8, 6), torch.float32, FIRA_GROUP),
    "bfloat16": ((10, 14), torch.bfloat16, FIRA_GROUP),
    "adamw": ((10, 14), torch.float32, {"weight_decay": 0.05}),
    "adamw_bfloat16": ((7,), torch.bfloat16, {}),
}


def build(kind, weight=None):
    shape, dtype, group = KINDS[kind]
    parameter = nn.Parameter(make_weight(shape, dtype=dtype) if weight is None else weight.clone())
    return parameter, FiraAdam(with_a_rank({"params": [parameter], **group}), lr=LR)


def gradients_for(kind, steps=STEPS):
    shape, dtype, _ = KINDS[kind]
    if len(shape) == 1:
        return [g[0] for g in make_gradients((1, *shape), steps, dtype=dtype)]
    return make_gradients(shape, steps, dtype=dtype)


def fira_pair(shape=(10, 14), **changed):
    """A FiraAdam of one matrix, its parameter, and the reference for it."""
    group = {**FIRA_GROUP, **changed}
    parameter = nn.Parameter(make_weight(shape))
    return FiraAdam([{"params": [parameter], **group}], lr=LR), parameter, FiraReference(parameter, lr=LR, **group)


def assert_follows(parameter, start, expected):
    assert weight_change_error(start, parameter.detach(), expected) <= tolerances.FLOAT32_VS_REFERENCE


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_the_documented_tensors(kind):
    parameter, optimizer = build(kind)
    drive(optimizer, parameter, gradients_for(kind, 2))
    state = optimizer.state[parameter]
    fira = {"step", "refresh_step", "basis", "exp_avg", "exp_avg_sq", "residual_norm"}
    assert set(state) == (fira if "rank" in KINDS[kind][2] else {"step", "exp_avg", "exp_avg_sq"})
    batch = (2,) if kind == "experts" else ()
    for key, value in state.items():
        assert type(value) is torch.Tensor, key
        assert value.dtype == (torch.int64 if "step" in key else torch.float32), key
        assert not value.requires_grad, key
    for key in {"step", "refresh_step", "residual_norm"} & set(state):
        assert state[key].shape == batch, key
    low_rank_elements = {"matrix": 3 * 14, "tall": 3 * 14, "experts": 2 * 3 * 8, "bfloat16": 3 * 14}
    assert state["exp_avg"].numel() == low_rank_elements.get(kind, parameter.numel())


@pytest.mark.parametrize("through", ["state_dict", "torch.save with weights_only"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_continues_to_the_bit(kind, through):
    gradients = gradients_for(kind)
    parameter, optimizer = build(kind)
    drive(optimizer, parameter, gradients[:6])
    saved = optimizer.state_dict()
    if through != "state_dict":
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    resumed, resumed_optimizer = build(kind, weight=parameter.detach())
    resumed_optimizer.load_state_dict(copy.deepcopy(saved))
    for key, value in resumed_optimizer.state[resumed].items():
        original = optimizer.state[parameter][key]
        assert value.dtype == original.dtype, key  # torch would cast float state to a bfloat16 parameter's dtype
        assert torch.equal(value, original), key
    drive(optimizer, parameter, gradients[6:])
    drive(resumed_optimizer, resumed, gradients[6:])
    assert torch.equal(parameter, resumed)
    for key, value in optimizer.state[parameter].items():
        assert torch.equal(value, resumed_optimizer.state[resumed][key]), key


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["matrix", "experts", "adamw"])
def test_a_copy_is_whole_and_independent(kind, copier):
    gradients = gradients_for(kind)
    parameter, optimizer = build(kind)
    drive(optimizer, parameter, gradients[:6])
    twin = copier(optimizer)
    twin_parameter = twin.param_groups[0]["params"][0]
    assert twin_parameter is not parameter
    before = parameter.detach().clone()
    drive(twin, twin_parameter, gradients[6:])
    assert torch.equal(parameter, before)
    drive(optimizer, parameter, gradients[6:])
    assert torch.equal(parameter, twin_parameter)


def test_the_group_settings_travel_in_the_state_dict():
    _, optimizer = build("matrix")
    optimizer.param_groups[0]["weight_decay"] = 0.25  # as a user may change it in the course of a run
    parameter = nn.Parameter(make_weight((10, 14)))
    other = FiraAdam([{"params": [parameter], **FIRA_GROUP, "alpha": 0.125}], lr=0.5)
    with pytest.warns(UserWarning, match=r"alpha = 0\.125 where the checkpoint had .*; lr goes on|lr goes on .*alpha"):
        other.load_state_dict(optimizer.state_dict())
    loaded = other.param_groups[0]
    assert loaded["weight_decay"] == 0.25
    assert loaded["lr"] == LR
    assert loaded["update_proj_gap"] == FIRA_GROUP["update_proj_gap"]
    assert loaded["alpha"] == 0.125


@pytest.mark.parametrize(("name", "value"), [("rank", 2), ("proj_type", "right")])
def test_a_state_of_another_structure_is_refused(name, value):
    _, optimizer = build("matrix")
    other = FiraAdam([{"params": [nn.Parameter(make_weight((10, 14)))], **FIRA_GROUP, name: value}], lr=LR)
    with pytest.raises(ValueError, match=f"{name} = {value!r} for 0, whose state .* to resume"):
        other.load_state_dict(optimizer.state_dict())


def test_another_name_of_the_same_side_is_no_other_structure():
    _, optimizer = build("matrix")
    other = FiraAdam([{"params": [nn.Parameter(make_weight((10, 14)))], **FIRA_GROUP, "proj_type": "left"}], lr=LR)
    with pytest.warns(UserWarning, match="proj_type = 'left' where the checkpoint had 'std'"):
        other.load_state_dict(optimizer.state_dict())


def test_step_runs_the_closure_and_returns_its_loss():
    torch.manual_seed(0)
    model, inputs = nn.Linear(6, 4), torch.randn(5, 6)
    optimizer = FiraAdam([{"params": [model.weight], "rank": 2}, {"params": [model.bias]}], lr=LR)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert optimizer.step() is None
    assert model.weight.requires_grad
    assert model.weight.grad_fn is None
    optimizer.zero_grad()
    assert model.weight.grad is None
    optimizer.step()  # nothing to do is not an error


def test_lambda_lr():
    optimizer, parameter, reference = fira_pair()
    start, gradients = parameter.detach().clone(), make_gradients((10, 14), STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + step) / 5 if step < 5 else 0.9**step)
    for gradient in gradients:
        reference.lr = optimizer.param_groups[0]["lr"]
        drive(optimizer, parameter, [gradient])
        reference.step(gradient)
        scheduler.step()
    assert reference.lr != LR
    assert_follows(parameter, start, reference.weight)


def test_one_cycle_moves_lr_and_betas():
    optimizer, parameter, reference = fira_pair()
    start, gradients, seen = parameter.detach().clone(), make_gradients((10, 14), STEPS), set()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=STEPS + 1, cycle_momentum=True)
    for gradient in gradients:
        reference.lr, reference.betas = (optimizer.param_groups[0][key] for key in ("lr", "betas"))
        seen.add(tuple(reference.betas))
        drive(optimizer, parameter, [gradient])
        reference.step(gradient)
        scheduler.step()
    assert len(seen) > 5, "the scheduler did not move beta1"
    assert_follows(parameter, start, reference.weight)


def test_a_parameter_without_gradient_is_left_alone():
    used, unused = nn.Parameter(make_weight((10, 14))), nn.Parameter(make_weight((10, 14), seed=1))
    plain = nn.Parameter(make_weight((5,), seed=2))
    optimizer = FiraAdam([{"params": [unused, used], **FIRA_GROUP}, {"params": [plain], "weight_decay": 0.1}], lr=LR)
    before = [unused.detach().clone(), plain.detach().clone(), used.detach().clone()]
    drive(optimizer, used, make_gradients((10, 14), 3))
    assert torch.equal(unused, before[0])
    assert torch.equal(plain, before[1])
    assert not optimizer.state.get(unused)
    assert not optimizer.state.get(plain)
    assert not torch.equal(used, before[2])


def test_gradients_that_start_late_begin_their_own_count():
    optimizer, late, reference = fira_pair()
    early = nn.Parameter(make_weight((10, 14), seed=1))
    optimizer.add_param_group({"params": [early], **FIRA_GROUP})
    start, gradients = late.detach().clone(), make_gradients((10, 14), STEPS)
    for index in range(STEPS + 3):
        early.grad = torch.ones_like(early)
        late.grad = gradients[index - 3].clone() if index >= 3 else None
        optimizer.step()
    assert optimizer.state[late]["step"].item() == STEPS
    assert optimizer.state[early]["step"].item() == STEPS + 3
    assert_follows(late, start, run_reference(reference, gradients))


def test_a_group_added_later():
    optimizer, first, _ = fira_pair()
    drive(optimizer, first, make_gradients((10, 14), 3, seed=5))
    first.grad = None
    added, settings = nn.Parameter(make_weight((12, 8), seed=3)), {**FIRA_GROUP, "rank": 2, "formulation": "paper"}
    optimizer.add_param_group({"params": [added], **settings})
    start, gradients = added.detach().clone(), make_gradients((12, 8), STEPS)
    drive(optimizer, added, gradients)
    reference = FiraReference(start, lr=LR, **settings)
    assert_follows(added, start, run_reference(reference, gradients))


def test_every_setting_may_differ_between_groups():
    settings = [
        {"rank": 2, "alpha": 0.25, "lr": 3e-3},
        {"rank": 5, "formulation": "paper", "gamma": 1.1},
        {"rank": 3, "proj_type": "left", "scaling": "matrix", "update_proj_gap": 2, "betas": (0.8, 0.9)},
        {"rank": 3, "limiter": "none", "residual_scale": 2.0, "eps": 1e-4, "weight_decay": 0.2},
    ]
    parameters = [nn.Parameter(make_weight((10, 14), seed=i)) for i in range(len(settings))]
    starts = [p.detach().clone() for p in parameters]
    optimizer = FiraAdam([{"params": [p], **s} for p, s in zip(parameters, settings, strict=True)], lr=LR)
    references = [FiraReference(w, **{"lr": LR, **s}) for w, s in zip(starts, settings, strict=True)]
    streams = [make_gradients((10, 14), STEPS, seed=i) for i in range(len(settings))]
    for gradients in zip(*streams, strict=True):
        for parameter, reference, gradient in zip(parameters, references, gradients, strict=True):
            parameter.grad = gradient.clone()
            reference.step(gradient)
        optimizer.step()
    for parameter, start, reference in zip(parameters, starts, references, strict=True):
        assert_follows(parameter, start, reference.weight)


def test_parameters_of_one_group_do_not_mix():
    shapes = [(10, 14), (10, 14), (14, 10), (6, 6), (2, 10, 14)]
    group = {"rank": 3, "update_proj_gap": 4}
    parameters = [nn.Parameter(make_weight(s, seed=i)) for i, s in enumerate(shapes)]
    together = FiraAdam([{"params": parameters, **group}], lr=LR)
    streams = [make_gradients(s, STEPS, seed=i) for i, s in enumerate(shapes)]
    starts = [p.detach().clone() for p in parameters]
    for gradients in zip(*streams, strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        together.step()
    for parameter, start, gradients in zip(parameters, starts, streams, strict=True):
        alone = nn.Parameter(start.clone())
        drive(FiraAdam([{"params": [alone], **group}], lr=LR), alone, gradients)
        assert_follows(parameter, start, alone.detach())


def test_transposed_weights_and_gradients():
    start = make_weight((10, 14))
    gradients = make_gradients((10, 14), STEPS)
    parameter = nn.Parameter(start.t().contiguous().t())
    assert not parameter.is_contiguous()
    optimizer = FiraAdam([{"params": [parameter], **FIRA_GROUP}], lr=LR)
    for gradient in gradients:
        parameter.grad = gradient.t().contiguous().t()
        optimizer.step()
    assert_follows(parameter, start, run_reference(FiraReference(start, lr=LR, **FIRA_GROUP), gradients))


def test_adamw_against_its_reference_with_schedule():
    parameter = nn.Parameter(make_weight((9,)))
    optimizer = FiraAdam(with_a_rank({"params": [parameter]}), lr=LR, weight_decay=0.1)
    reference = AdamWReference(parameter, weight_decay=0.1)
    start = parameter.detach().clone()
    for index, gradient in enumerate(gradients_for("adamw")):
        reference.lr = optimizer.param_groups[0]["lr"] = LR / (1 + index)
        drive(optimizer, parameter, [gradient[0][:9]])
        reference.step(gradient[0][:9])
    assert_follows(parameter, start, reference.weight)


def test_it_is_an_optimizer_with_hooks():
    optimizer, parameter, _ = fira_pair()
    calls = []
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    drive(optimizer, parameter, make_gradients((10, 14), 2))
    assert calls == [1, 1]
    assert "FiraAdam" in repr(optimizer)
