"""GaLoreAdam makes the steps of galore-torch 1.0, alone and under ZeRO, and does none of Fira's work beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_fira
from ds_fira.core import functional as F
from ds_fira.core.algorithms import GALORE_ADAM
from ds_fira.tools.dry_run import plan_run
from ds_fira.tools.estimate import Setup, estimate
from tests.distributed.released_jobs import released_run
from tests.distributed.zero_jobs import Net, config
from tests.ranks import Pools
from tests.reference import tolerances
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import run_optimizer, weight_change_error, with_a_rank
from tests.small_models import llama

STEPS, GAP, LR = 10, 3, 0.01  # refreshes at 0, 3, 6 and 9
SHORT = 7  # refreshes at 0, 3 and 6
# On two ranks some of each shape lie whole and one is cut; (3, 40) and (6, 6) are cut or not with the rest.
SHAPES = [(8, 6)] * 3 + [(6, 12)] * 3 + [(6, 6), (3, 40)]
PARAMS = {"rank": 2, "update_proj_gap": GAP, "lr": LR, "alpha": 0.25, "weight_decay": 0.1, "target_modules": ["layers"]}
GALORE = {"rank": 2, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
TYPE = {"optimizer": {"type": "GaLoreAdam"}}


def galore(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    groups = [{key if key != "alpha" else "scale": value for key, value in group.items()} for group in groups]
    return GaLoreAdamW(groups, lr=LR, no_deprecation_warning=True)


def ours(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return ds_fira.GaLoreAdam(groups, lr=LR)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_and_states_are_those_of_galore_torch(
    shape: tuple[int, int], proj_type: str, weight_decay: float
) -> None:
    weight, gradients = make_weight(shape), make_gradients(shape, STEPS)
    group = {"rank": 4, "update_proj_gap": GAP, "alpha": 0.25, "proj_type": proj_type, "weight_decay": weight_decay}
    theirs, their_state = run_optimizer(galore, weight, gradients, **group)
    found, state = run_optimizer(ours, weight, gradients, **group)
    assert weight_change_error(weight, found, theirs) < tolerances.FLOAT32_VS_FIRA
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key], their_state[key], atol=tolerances.FLOAT32_STATE, rtol=0.0)
    assert set(state) == {"step", "refresh_step", "basis", "exp_avg", "exp_avg_sq"}


def test_a_group_without_a_rank_is_galores_adamw() -> None:
    weight, gradients = make_weight((5, 7)), make_gradients((5, 7), STEPS)
    theirs, _ = run_optimizer(galore, weight, gradients, weight_decay=0.1)
    found, state = run_optimizer(lambda groups: ours(with_a_rank(*groups)), weight, gradients, weight_decay=0.1)
    assert weight_change_error(weight, found, theirs) < tolerances.FLOAT32_VS_FIRA
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("off", [{"residual": "none"}, {"scaling": "none", "residual_scale": 0.0, "limiter": "none"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_fira_adam_without_the_residual_to_the_bit(dtype: torch.dtype, off: dict[str, Any]) -> None:
    """With less work: nothing of the residual, of its norm or of the scaling factors is computed."""
    weight = make_weight((12, 20)).to(dtype)
    gradients = [gradient.to(dtype) for gradient in make_gradients((12, 20), STEPS)]
    group = {"rank": 4, "update_proj_gap": GAP, "alpha": 0.5, "weight_decay": 0.1}
    as_galore, _ = run_optimizer(lambda groups: ds_fira.FiraAdam(groups, lr=LR, **off), weight, gradients, **group)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("scaling_factors", "difference_of_squares", "residual_square", "limit_growth"):
            patch.delattr(F, name)
        found, _ = run_optimizer(ours, weight, gradients, **group)
    assert torch.equal(found, as_galore)


def test_the_gradient_is_not_read_by_the_update() -> None:
    weight, left, right = make_weight((6, 5)), make_weight((6, 2), seed=1), make_weight((2, 5), seed=2)
    expected = 0.9 * weight - left @ right
    options = {"by_row": False, "decay_factor": 0.9, "precision": "float32"}
    for grad in (torch.full((6, 5), torch.nan), torch.full((6, 5), torch.nan, dtype=torch.bfloat16)):
        found = weight.clone()
        F.apply_update_(found, grad, left, right, None, **options)
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("kernels_allowed")
def test_nor_by_its_kernel() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from ds_fira.core import kernels
    from tests.unit.core.kernel_cases import DEVICE, flag, random

    weight, left, right = random(2, 37, 53), random(2, 37, 5, seed=1), random(2, 5, 53, seed=2)
    expected = 0.9 * weight[0] - left[0] @ right[0]
    before, grad = weight.clone(), torch.full((2, 37, 53), torch.nan, device=DEVICE)
    kernels.apply_update_(
        weight,
        grad,
        left,
        right,
        None,
        by_row=True,
        decay_factor=0.9,
        grad_finite=flag((2,), True, False),
        precision="float32",
    )
    torch.testing.assert_close(weight[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(weight[1], before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    param = torch.nn.Parameter(make_weight((6, 9)))
    optimizer = ours([{"params": [param], "rank": 2, "weight_decay": 0.1}])
    param.grad = make_gradients((6, 9), 1)[0]
    optimizer.step()
    before = [param.detach().clone(), *(tensor.clone() for tensor in optimizer.state[param].values())]
    param.grad[2, 3] = value
    optimizer.step()
    after = [param.detach(), *optimizer.state[param].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


REFUSED = [
    ({"gamma": 1.05}, r"gamma = 1.05 is a setting of FiraAdam that GaLoreAdam has no use for; remove it"),
    ({"limiter": "growth"}, "limiter = 'growth' is a setting of FiraAdam"),
    ({"residual": "scaled"}, "residual = 'scaled' is a setting of FiraAdam"),
    ({"residual_scale": 1.0}, "residual_scale = 1.0 is a setting of FiraAdam"),
    ({"scale": 0.25}, "unknown setting 'scale' = 0.25; did you mean 'alpha'"),
    ({"alpha": -1.0}, "alpha = -1.0 is not legal; give a number above 0"),
]


@pytest.mark.parametrize(("setting", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_settings_it_does_not_have_are_refused(setting: dict[str, Any], message: str) -> None:
    param = torch.nn.Parameter(make_weight((6, 9)))
    with pytest.raises(ValueError, match=f"GaLoreAdam: {message}"):
        ds_fira.GaLoreAdam([param], rank=2, **setting)
    if "scale" not in setting:  # torch lets groups have any key
        with pytest.raises(ValueError, match=f"GaLoreAdam param group: {message}"):
            ds_fira.GaLoreAdam([{"params": [param], "rank": 2, **setting}])


def test_groups_and_states_of_the_other_optimizer_are_refused() -> None:
    param = torch.nn.Parameter(make_weight((6, 9)))
    group = {"params": [param], "rank": 2}
    fira, plain = ds_fira.FiraAdam([dict(group)]), ds_fira.GaLoreAdam([dict(group)])
    with pytest.raises(ValueError, match="FiraAdam param group: method = 'GaLoreAdam' belongs to another"):
        ds_fira.FiraAdam(plain.param_groups)
    with pytest.raises(ValueError, match=r"GaLoreAdam param group: gamma = 1\.01 is a setting of FiraAdam"):
        ds_fira.GaLoreAdam(fira.param_groups)
    assert ds_fira.GaLoreAdam(plain.param_groups).param_groups[0]["limiter"] == "none"
    with pytest.raises(ValueError, match="GaLoreAdam: the checkpoint was made by FiraAdam; set optimizer"):
        plain.load_state_dict(fira.state_dict())
    with pytest.raises(ValueError, match="FiraAdam: the checkpoint was made by GaLoreAdam; set optimizer"):
        fira.load_state_dict(plain.state_dict())


def test_in_the_deepspeed_config_too(ranks: Pools) -> None:
    cases = [(config(2, "fp32", {**PARAMS, **setting}, **TYPE), None) for setting, _ in REFUSED]
    cases.append((config(1, "fp32", PARAMS, **TYPE, zero_offload_param={"device": "cpu"}), None))
    (answers,) = ranks.run(1, "try_to_build", cases=cases, shapes=SHAPES)
    for (_, message), (kind, text) in zip(REFUSED, answers, strict=False):
        assert kind == "ValueError"
        assert re.match(f"GaLoreAdam in the DeepSpeed config: {message}", text), text
    assert answers[-1][1].startswith("GaLoreAdam: zero_optimization.offload_param.device = 'cpu' has no effect")


def same_run(found: dict[str, Any], losses: list[float], weights: dict[str, torch.Tensor]) -> None:
    assert found["error"] == ""
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        assert (found["weights"][name] - weight).norm() < 1e-5 * weight.norm().clamp(min=1e-6), name


@pytest.mark.parametrize(
    ("stage", "params"),
    [
        *((0, {}), (1, {}), (3, {}), (2, {"exact_cuts": True}), (2, {"proj_type": "reverse_std"})),
        pytest.param(2, {}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_under_zero_it_is_galore_torch_on_the_whole_batch(
    ranks: Pools, tmp_path: Path, stage: int, params: dict[str, Any]
) -> None:
    """From the JSON type, on two ranks, with cut matrices either way, saved and resumed in between."""
    theirs = {**GALORE, **{key: value for key, value in params.items() if key == "proj_type"}}
    shapes = SHAPES if not params.get("proj_type") else [s for s in SHAPES if s[0] != s[1]]
    _, _, losses, weights = released_run("galore", shapes, SHORT, SHORT, theirs)
    ds_config = config(stage, "fp32", {**PARAMS, **params}, **TYPE)
    options = {"module": "tests.distributed.resize_jobs", "ds_config": ds_config, "shapes": shapes}
    first = ranks.run(2, "run", first=0, last=5, save=str(tmp_path), **options)[0]
    assert first["losses"] == pytest.approx(losses[:5], rel=1e-5)
    if stage == 2:
        assert ("low_rank" in first["ways"]) != ("exact_cuts" in params), first["ways"]
    for found in ranks.run(2, "run", first=5, last=SHORT, load=str(tmp_path), seed=3, **options):
        same_run(found, losses[5:], weights)


def test_a_run_goes_on_on_other_ranks_and_another_stage(ranks: Pools, tmp_path: Path) -> None:
    _, _, losses, weights = released_run("galore", SHAPES, SHORT, SHORT, GALORE)
    options = {"module": "tests.distributed.resize_jobs", "shapes": SHAPES}
    before = config(2, "fp32", PARAMS, **TYPE)
    ranks.run(1, "run", ds_config=before, first=0, last=5, save=str(tmp_path), **options)
    for after in (before, config(0, "fp32", PARAMS, **TYPE)):
        found = ranks.run(2, "run", ds_config=after, first=5, last=SHORT, load=str(tmp_path), seed=3, **options)
        same_run(found[0], losses[5:], weights)
    as_fira = config(2, "fp32", PARAMS)
    for found in ranks.run(2, "run", ds_config=as_fira, first=5, last=SHORT, load=str(tmp_path), **options):
        assert "FiraAdam: the checkpoint was made by GaLoreAdam; set optimizer.type = 'GaLoreAdam'" in found["error"]


def test_a_resumed_run_is_the_same_to_the_bit(ranks: Pools, tmp_path: Path) -> None:
    ds_config = config(2, "bf16", {**PARAMS, "refresh_moments": "rotate", "state_dtype": "bfloat16"}, **TYPE)
    options = {"ds_config": ds_config, "shapes": SHAPES, "steps": 7, "save_at": 4, "folder": str(tmp_path)}
    assert ranks.run(2, "resume", **options) == [True, True]


def test_a_run_of_galore_torch_goes_on(ranks: Pools) -> None:
    options = {"kind": "galore", "shapes": SHAPES, "steps": STEPS, "stop": 5, "settings": GALORE}
    ds_config = config(2, "fp32", PARAMS, **TYPE)
    for found in ranks.run(2, "continued", module="tests.distributed.released_jobs", ds_config=ds_config, **options):
        same_run(found, found["expected_losses"], found["expected"])


def test_memory_is_reported_estimated_and_measured_alike(ranks: Pools) -> None:
    results = ranks.run(2, "train", ds_config=config(2, "fp32", PARAMS, **TYPE), shapes=SHAPES, steps=4)
    planned = plan_run(Net(SHAPES), 2, 2, GALORE_ADAM, **PARAMS)
    held = [planned.state_bytes(rank, torch.float32) for rank in range(2)]
    assert results[0]["memory"]["optimizer_state_bytes"] == held
    sides = [(min(shape), max(shape)) for shape in SHAPES]
    low_rank = sum(2 * m + 2 * 2 * n for m, n in sides)
    rest = sum(param.numel() for name, param in Net(SHAPES).named_parameters() if not name.startswith("layers."))
    assert results[0]["memory"]["paper_formula_bytes"] == 4 * (low_rank + 2 * rest)
    figures = results[0]["metrics"]
    assert figures["projected_matrices"] == len(SHAPES)
    assert figures["matrix_steps"] == 4 * len(SHAPES)
    assert 0.0 < figures["captured_energy"] <= 1.0
    assert figures["residual_norm"] == figures["limiter_activations"] == 0


def test_the_estimate_of_galore_is_its_own() -> None:
    model, setup = llama(), Setup(gpus=2, zero_stage=2)
    found = estimate(model, setup, ["GaLore"], rank=4).methods["GaLore"]
    planned = plan_run(model, 2, 2, GALORE_ADAM, rank=4)
    for rank, memory in enumerate(found.by_rank):
        assert memory.device.optimizer_states == planned.state_bytes(rank, setup.master_dtype)
