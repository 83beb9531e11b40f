"""ApolloAdam makes the steps of apollo-torch 1.0.3; under ZeRO and FSDP2 those of one process.

`tests/unit/core/test_apollo.py` has the algorithm itself, on every side.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_fira
from ds_fira.core.algorithms import APOLLO_ADAM
from ds_fira.core.drawn_basis import DrawnBasis
from ds_fira.core.settings import GroupSettings
from ds_fira.optim.settings import check_params
from ds_fira.sharding.lowrank.answer_form import low_rank_elements
from ds_fira.tools.dry_run import plan_run
from ds_fira.tools.estimate import Setup, estimate
from tests.distributed import test_from_adam as from_adam
from tests.distributed import test_zero3 as zero3
from tests.distributed.resize_jobs import rows
from tests.distributed.rule_jobs import alone
from tests.distributed.test_fsdp import check
from tests.distributed.test_fsdp import run as run_fsdp
from tests.distributed.test_fsdp_checkpoint import same
from tests.distributed.zero_jobs import Net, config
from tests.ranks import Pools
from tests.reference import tolerances
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import relative_error, run_optimizer, weight_change_error, with_a_rank
from tests.small_models import llama

STEPS, GAP, LR = 22, 7, 0.01  # refreshes at 0, 7, 14 and 21
CPU = torch.device("cpu")
MINI = {"rank": 1, "scaling": "matrix", "alpha": math.sqrt(128.0)}
# On two ranks some of each shape lie whole and one is cut; (3, 40) and (6, 6) are cut or not with the rest.
SHAPES = [(8, 6)] * 3 + [(6, 12)] * 3 + [(6, 6), (3, 40)]
PARAMS = {"rank": 2, "update_proj_gap": 3, "lr": 0.003, "alpha": 0.5, "weight_decay": 0.1, "target_modules": ["layers"]}
TYPE = {"optimizer": {"type": "ApolloAdam"}}
OFFLOAD = {"zero_offload_optimizer": {"device": "cpu"}}
END = 7  # refreshes at 0, 3 and 6


def ours(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return ds_fira.ApolloAdam(groups, lr=LR)


def theirs(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """apollo-torch, whose projector is handed the matrices that ds_fira draws, and nothing else of it changed."""
    from apollo_torch import APOLLOAdamW
    from apollo_torch.random_projector import GradientProjector

    class Given(GradientProjector):
        refreshes = 0

        def get_orthogonal_matrix(self, weights: Tensor, rank: int, type: str, seed: int) -> Tensor:
            rows = weights.shape[0 if type == "left" else 1]
            basis = DrawnBasis(0, rows, rank).draw(self.refreshes * self.update_proj_gap, None, torch.float32, CPU)
            self.refreshes += 1
            return basis if type == "left" else basis.T

    class Apollo(APOLLOAdamW):
        def _initialize_projector(self, group: dict[str, Any], state: dict[str, Any]) -> GradientProjector:
            names = ("rank", "update_proj_gap", "scale", "proj_type")
            return Given(**{name: group[name] for name in names}, seed=state["seed"])

    group = dict(groups[0])
    limited = group.pop("limiter", "growth") == "growth"
    if "rank" in group:
        scaling, alpha = group.pop("scaling", "column"), group.pop("alpha", 1.0)
        kind = {"column": "channel", "matrix": "tensor"}[scaling]
        group |= {"scale_type": kind, "scale": alpha**2, "proj": "random", "proj_type": "std"}
    return Apollo([group], lr=LR, scale_front=group.get("scale", 1.0) != 1.0, disable_nl=not limited)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
@pytest.mark.parametrize("kind", [{"rank": 4}, MINI, {"rank": 4, "scaling": "matrix", "alpha": 0.5}], ids=str)
@pytest.mark.parametrize("limiter", ["growth", "none"])
def test_steps_and_states_are_those_of_apollo_torch(shape: tuple[int, int], kind: dict[str, Any], limiter: str) -> None:
    weight, gradients = make_weight(shape), make_gradients(shape, STEPS)
    group = {**kind, "update_proj_gap": GAP, "limiter": limiter, "weight_decay": 0.1 * (limiter == "growth")}
    expected, their_state = run_optimizer(theirs, weight, gradients, **group)
    found, state = run_optimizer(ours, weight, gradients, **group)
    assert weight_change_error(weight, found, expected) < tolerances.FLOAT32_VS_FIRA
    for key in ("exp_avg", "exp_avg_sq"):
        assert relative_error(state[key], their_state[key]) < tolerances.FLOAT32_STATE
    if limiter == "growth":
        assert float(state["residual_norm"]) * (kind.get("alpha", 1.0)) == pytest.approx(
            float(their_state["scaled_grad"]), rel=1e-5
        )
    assert set(state) == {"step", "refresh_step", "basis", "exp_avg", "exp_avg_sq", "residual_norm"}
    assert state["basis"].shape == (0, kind["rank"])


def test_a_group_without_a_rank_is_apollos_adamw() -> None:
    weight, gradients = make_weight((5, 7)), make_gradients((5, 7), STEPS)
    expected, _ = run_optimizer(theirs, weight, gradients, weight_decay=0.1)
    found, state = run_optimizer(lambda groups: ours(with_a_rank(*groups)), weight, gradients, weight_decay=0.1)
    assert weight_change_error(weight, found, expected) < tolerances.FLOAT32_VS_FIRA
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}


def same_run(found: dict[str, Any], losses: list[float], weights: dict[str, Tensor]) -> None:
    assert found.get("error", "") == ""
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        assert (found["weights"][name] - weight).norm() < 1e-5 * weight.norm().clamp(min=1e-6), name


@pytest.mark.parametrize(
    ("stage", "params", "extra"),
    [
        (0, {}, {}),
        (1, {"exact_cuts": True, "scaling": "matrix"}, {}),
        (2, {}, {}),
        (2, {"proj_type": "reverse_std", "scaling": "matrix", "rank": 1}, OFFLOAD),
        (3, {}, {}),
        pytest.param(3, {"scaling": "matrix", "rank": 1}, {}, marks=pytest.mark.full),
        pytest.param(3, {"limiter": "none", "stagger": True}, {}, marks=pytest.mark.full),
        pytest.param(2, {"limiter": "none"}, {}, marks=pytest.mark.full),
        pytest.param(3, {"exact_cuts": True}, {}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_under_zero_it_is_one_process_with_the_whole_batch(
    ranks: Pools, tmp_path: Path, stage: int, params: dict[str, Any], extra: dict[str, Any]
) -> None:
    """From the JSON type, on two ranks, with cut matrices either way, saved and resumed in the middle of a gap."""
    losses, weights = alone(ds_fira.ApolloAdam, SHAPES, END, {**PARAMS, **params})
    ds_config = config(stage, "fp32", {**PARAMS, **params}, **TYPE, **extra)
    options = {"module": "tests.distributed.resize_jobs", "ds_config": ds_config, "shapes": SHAPES}
    first = ranks.run(2, "run", first=0, last=4, save=str(tmp_path), **options)[0]
    assert first["losses"] == pytest.approx(losses[:4], rel=1e-5)
    if stage > 0:
        assert ("low_rank" in first["ways"]) != ("exact_cuts" in params), first["ways"]
    for found in ranks.run(2, "run", first=4, last=END, load=str(tmp_path), seed=3, **options):
        same_run(found, losses[4:], weights)


def test_a_run_goes_on_on_other_ranks_and_another_stage(ranks: Pools, tmp_path: Path) -> None:
    losses, weights = alone(ds_fira.ApolloAdam, SHAPES, END, PARAMS)
    options = {"module": "tests.distributed.resize_jobs", "shapes": SHAPES}
    folders = [str(tmp_path / name) for name in "ab"]
    configs = [config(stage, "fp32", PARAMS, **TYPE) for stage in (2, 3, 0)]
    ranks.run(1, "run", ds_config=configs[0], first=0, last=2, save=folders[0], **options)
    ranks.run(2, "run", ds_config=configs[1], first=2, last=5, load=folders[0], save=folders[1], seed=3, **options)
    (found,) = ranks.run(1, "run", ds_config=configs[2], first=5, last=END, load=folders[1], seed=3, **options)
    same_run(found, losses[5:], weights)
    other = config(2, "fp32", PARAMS)
    (found,) = ranks.run(1, "run", ds_config=other, first=5, last=END, load=folders[1], **options)
    assert "FiraAdam: the checkpoint was made by ApolloAdam; set optimizer.type = 'ApolloAdam'" in found["error"]


@pytest.mark.parametrize(("before", "after"), [(2, 3), pytest.param(3, 1, marks=pytest.mark.full)])
def test_a_run_of_adamw_goes_on(ranks: Pools, tmp_path: Path, before: int, after: int) -> None:
    """Its moments are projected by the first basis that is drawn, as one process does it."""
    torch.manual_seed(0)
    model = Net(from_adam.SHAPES)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    apollo = ds_fira.ApolloAdam(model, **from_adam.PARAMS)
    numbers = {id(layer.weight): number for number, layer in enumerate(model.layers)}
    losses = []
    for step in range(from_adam.END):
        for group in (*adam.param_groups, *apollo.param_groups):
            group["lr"] = 0.01 * 0.9**step
        loss = model(rows(step))
        loss.backward()
        losses.append(float(loss.detach()))
        if step == from_adam.SAVED:
            for param in model.parameters():
                own = from_adam.taken_over(param, adam.state[param], id(param) in numbers)
                if id(param) in numbers:
                    left = param.shape[0] < param.shape[1]
                    basis = DrawnBasis(numbers[id(param)], min(param.shape), 2).draw(step, None, torch.float32, CPU)
                    m, v = adam.state[param]["exp_avg"], adam.state[param]["exp_avg_sq"]
                    own |= {"basis": torch.zeros(0, 2), "exp_avg": basis.T @ m if left else m @ basis}
                    own["exp_avg_sq"] = basis.square().T @ v if left else v @ basis.square()
                apollo.state[param].update(own)
        (adam if step < from_adam.SAVED else apollo).step()
        model.zero_grad()
    weights = {name: param.detach() for name, param in model.named_parameters()}
    expected = {"losses": losses, "weights": weights, "lr": 0.01 * 0.9**from_adam.END}
    from_adam.adam_run(ranks, 2, before, first=0, last=from_adam.SAVED, save=str(tmp_path))
    job = {"first": from_adam.SAVED, "last": from_adam.END, "load": str(tmp_path), "seed": 3, "extra": TYPE}
    from_adam.assert_goes_on(from_adam.fira_run(ranks, 2, after, **job), expected)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_resumed_run_is_the_same_to_the_bit(ranks: Pools, tmp_path: Path, stage: int) -> None:
    ds_config = config(stage, "bf16", {**PARAMS, "state_dtype": "bfloat16"}, **TYPE)
    options = {"ds_config": ds_config, "shapes": SHAPES, "steps": 6, "save_at": 4, "folder": str(tmp_path)}
    assert ranks.run(2, "resume", **options) == [True, True]


@pytest.mark.parametrize("stage", [2, 3])
def test_memory_is_reported_estimated_and_measured_alike(ranks: Pools, stage: int) -> None:
    job = {"ds_config": config(stage, "fp32", PARAMS, **TYPE), "shapes": SHAPES, "steps": 4}
    results = ranks.run(2, "train", **job, **({"module": zero3.MODULE} if stage == 3 else {}))
    planned = plan_run(Net(SHAPES), 2, stage, APOLLO_ADAM, **PARAMS)
    held = [planned.state_bytes(rank, torch.float32) for rank in range(2)]
    assert results[0]["memory"]["optimizer_state_bytes"] == held
    rest = sum(param.numel() for name, param in Net(SHAPES).named_parameters() if not name.startswith("layers."))
    low_rank = sum(2 * 2 * max(shape) + 1 for shape in SHAPES)
    assert results[0]["memory"]["paper_formula_bytes"] == 4 * (low_rank + 2 * rest)
    figures = results[0]["metrics"]
    assert figures["projected_matrices"] == len(SHAPES)
    assert figures["matrix_steps"] == 4 * len(SHAPES)
    assert figures["refreshes"] == 2 * len(SHAPES)
    if stage == 2:
        assert [result["decompositions"] for result in results] == [0, 0]


def test_a_step_sends_parts_of_r_and_factors_alone(ranks: Pools) -> None:
    """By the plan; a refresh sends R once more, which had been projected before the ranks agreed that one is due."""
    params = {**zero3.PARAMS, "rank": 2}
    # As in a long turn, where FiraAdam's C would wait for the sums.
    limits = {"ds_fira.sharding.lowrank.answer_form.SHORT_TURN_NUMEL": 0}
    job = {"module": zero3.MODULE, "shapes": [(7, 40), (40, 7)], "steps": 5, "limits": limits}
    results = ranks.run(3, "train", ds_config=config(3, "fp32", params, **TYPE), **job)
    settings = GroupSettings.of({**check_params(params, algorithm=APOLLO_ADAM), **APOLLO_ADAM.group_values})
    matrices = [matrix for *_, matrix in zero3.split_matrices(results).values()]
    assert [(matrix.side, matrix.way) for matrix in matrices] == [("left", "low_rank"), ("right", "low_rank")]
    for rank, result in enumerate(results):
        transfers = [(m, t) for m in matrices for t in m.transfers(rank)]
        asked = sum((m.rank + 1) * len(t.entries) for m, t in transfers if t.borrower == rank)
        # A factor is float64, two elements.
        answered = sum(2 * len(t.entries) for _, t in transfers if t.keeper == rank)
        step = 4 * (asked + answered) + 2 * (2 + 3) * 8
        for short in (True, False):
            assert 4 * sum(low_rank_elements(matrix, rank, settings, short=short) for matrix in matrices) == step
        found = [after - before for before, after in zip(result["sent"], result["sent"][1:], strict=False)]
        assert found == [step + 4 * asked, step, step, step + 4 * asked, step]


def test_the_estimate_is_its_own() -> None:
    """Whether it is compared as APOLLO, or stands for what is trained."""
    model, setup = llama(), Setup(gpus=2, zero_stage=2)
    planned = plan_run(model, 2, 2, APOLLO_ADAM, rank=4)
    compared = estimate(model, setup, ["APOLLO", "Fira"], rank=4)
    trained = estimate(model, setup, ["Fira"], optimizer="ApolloAdam", rank=4)
    for method in (compared.methods["APOLLO"], trained.methods["Fira"]):
        for rank, memory in enumerate(method.by_rank):
            assert memory.device.optimizer_states == planned.state_bytes(rank, setup.master_dtype)
    assert any("ApolloAdam, in the partitions of Fira: apollo-torch" in note for note in compared.notes)
    with pytest.raises(ValueError, match="optimizer = 'ApolloAdam' does not go with APOLLO among the methods"):
        estimate(model, setup, ["APOLLO"], optimizer="ApolloAdam", rank=4)


@pytest.mark.parametrize(
    "params", [{}, *(pytest.param(p, marks=pytest.mark.full) for p in ({"scaling": "matrix"}, {"exact_cuts": True}))]
)
def test_under_fsdp2(ranks: Pools, tmp_path: Path, params: dict[str, Any]) -> None:
    """The weights and states of one process; a resumed run is the same to the bit."""
    job = {"params": {**params, "lr": 0.003}, "optimizer": "ApolloAdam"}
    results = run_fsdp(ranks, save=(4, str(tmp_path)), **job)
    check(results, low_rank="exact_cuts" not in params, kind="ApolloAdam")
    before = run_fsdp(ranks, steps=4, **job)[0]
    for again, through in zip(run_fsdp(ranks, load=(4, str(tmp_path)), **job), results, strict=True):
        assert same(again["loaded"], before["states"])
        assert same(again["end"], through["end"])


def test_under_ddp(ranks: Pools) -> None:
    check(run_fsdp(ranks, ddp=True, optimizer="ApolloAdam"), low_rank=False, kind="ApolloAdam", copies=None)
