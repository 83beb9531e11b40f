"""`vector_lr_scale`: norms and biases step at a share of the learning rate, whatever computes the step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ds_fira
from ds_fira import FiraAdam, FiraRMSProp
from ds_fira.optim.param_groups import build_groups, group_defaults
from ds_fira.optim.settings import check_params
from ds_fira.tools.dry_run import plan_run
from tests.reference import tolerances
from tests.reference.fira_reference import AdamWReference
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import run_reference, weight_change_error, with_a_rank
from tests.small_models import llama

LR, SCALE, DECAY, STEPS = 0.01, 0.1, 0.2, 5
SHAPES = [(7, 5), (9,), (3, 4, 2), ()]


def stepped(kind: type = FiraAdam, **settings: object) -> list[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]]:
    """Of each shape its start, the gradients, and what the optimizer makes of it, all in one group."""
    numbers = [max(1, torch.Size(shape).numel()) for shape in SHAPES]
    starts = [make_weight((1, n), seed=i).view(shape) for i, (n, shape) in enumerate(zip(numbers, SHAPES, strict=True))]
    gradients = [
        [each.view(shape) for each in make_gradients((1, n), STEPS, seed=i)]
        for i, (n, shape) in enumerate(zip(numbers, SHAPES, strict=True))
    ]
    params = [nn.Parameter(start.clone()) for start in starts]
    optimizer = kind(with_a_rank({"params": params}), lr=LR, vector_lr_scale=SCALE, weight_decay=DECAY, **settings)
    for step in range(STEPS):
        for param, own in zip(params, gradients, strict=True):
            param.grad = own[step].to(param.dtype)
        optimizer.step()
    return list(zip(starts, gradients, [param.detach() for param in params], strict=True))


def check_adamw(found: list[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]]) -> None:
    """Against the reference, whose weight decay goes by the rate of the step: so it is given as much more of it."""
    for start, gradients, ours in found:
        scale = SCALE if start.dim() < 2 else 1.0
        reference = AdamWReference(start, lr=scale * LR, weight_decay=DECAY / scale)
        assert weight_change_error(start, ours, run_reference(reference, gradients)) < tolerances.FLOAT32_VS_REFERENCE


def test_vectors_step_at_a_share_of_the_rate_and_decay_by_the_rate() -> None:
    check_adamw(stepped())


@pytest.mark.usefixtures("kernels_allowed")
def test_the_kernel_takes_both_kinds_of_one_group() -> None:
    pytest.importorskip("triton")
    check_adamw(stepped(kernels="auto"))


def test_a_rule_is_stepped_so_too() -> None:
    plain = [nn.Parameter(start.clone()) for start, *_ in stepped(FiraRMSProp)]
    for param, (start, gradients, ours) in zip(plain, stepped(FiraRMSProp), strict=True):
        theirs = torch.optim.RMSprop([param], lr=LR * (SCALE if start.dim() < 2 else 1.0), alpha=0.99, eps=1e-8)
        for gradient in gradients:
            param.grad = gradient.float()
            theirs.step()
            param.detach().mul_(1.0 - LR * DECAY)
        assert weight_change_error(start, ours, param.detach()) < 1e-4


def test_one_is_the_default_and_changes_no_group() -> None:
    checked = check_params({"rank": 4})
    assert {group["vector_lr_scale"] for group in FiraAdam(llama(), rank=4).param_groups} == {1.0}
    for stage in (0, 2, 3):
        model = llama()
        assert len(build_groups(model, model.parameters(), checked, stage, 2)) == len(
            build_groups(model, model.parameters(), {**checked, "vector_lr_scale": 1.0}, stage, 2)
        )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("settings", [{"vector_lr_scale": SCALE}, {"preset": "recommended"}], ids=str)
def test_an_engine_has_norms_in_groups_of_their_own(stage: int, settings: dict[str, object]) -> None:
    """One flat partition is of one kind, the planned one too; what is projected has no vectors."""
    model, checked = llama(), check_params({"rank": 4, **settings})
    optimizer = FiraAdam(build_groups(model, model.parameters(), checked, stage, 2), **group_defaults(checked))
    found = [{param.dim() < 2 for param in group["params"]} for group in optimizer.param_groups]
    if stage == 0:  # nothing is flat, and the groups are those of one process
        assert len(found) == len(FiraAdam(model, rank=4, **settings).param_groups)
    else:
        assert all(len(kinds) == 1 for kinds in found)
        assert {True} in found
    assert {group["vector_lr_scale"] for group in optimizer.param_groups} == {SCALE}
    planned = plan_run(llama(), 2, stage, rank=4, **settings)
    assert [kinds for group in planned.groups if len(kinds := {len(shape) < 2 for shape in group.shapes}) > 1] == []


def test_it_goes_to_every_group_of_a_model() -> None:
    groups = ds_fira.param_groups(llama(), 4, vector_lr_scale=SCALE)
    assert {group["vector_lr_scale"] for group in groups} == {SCALE}
    assert {group["vector_lr_scale"] for group in FiraAdam(groups).param_groups} == {SCALE}


@pytest.mark.parametrize("value", [-0.1, "a tenth", None, float("inf")])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(
        ValueError, match=r"vector_lr_scale = .* is not legal; give a number of at least 0, such as 0.1"
    ):
        FiraAdam(llama(), rank=4, vector_lr_scale=value)
