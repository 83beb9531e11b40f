"""A checkpoint of torch's AdamW goes on in FiraAdam: moments, step counts, schedule; and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_fira
from ds_fira.core.subspace import projection_side
from tests.distributed.adam_jobs import adam_config
from tests.distributed.resize_jobs import rows
from tests.distributed.zero_jobs import Net, config
from tests.grids import full_if, half
from tests.ranks import Pools

SHAPES = [(8, 6)] * 5 + [(6, 12)] * 3 + [(3, 40), (40, 7)]
PARAMS = {"rank": 2, "update_proj_gap": 2, "lr": 0.01, "weight_decay": 0.05, "eps": 1e-8}
SAVED, END = 3, 7
TOLERANCE = 1e-5
_references: dict[str, dict[str, Any]] = {}


def reference(**params: Any) -> dict[str, Any]:
    """One process: AdamW on all rows, then FiraAdam with moments that are projected here, on the first gradient."""
    key = repr(params)
    if key in _references:
        return _references[key]
    settings = {**PARAMS, **params}
    torch.manual_seed(0)
    model = Net(SHAPES)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    fira = ds_fira.FiraAdam(model, **settings)
    projected = {id(param) for group in fira.param_groups if group.get("rank") for param in group["params"]}
    losses = []
    for step in range(END):
        for group in (*adam.param_groups, *fira.param_groups):
            group["lr"] = 0.01 * 0.9**step
        loss = model(rows(step))
        loss.backward()
        losses.append(float(loss.detach()))
        if step == SAVED:
            for param in model.parameters():
                fira.state[param].update(taken_over(param, adam.state[param], id(param) in projected))
        (adam if step < SAVED else fira).step()
        model.zero_grad()
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    _references[key] = {"losses": losses, "weights": weights, "lr": 0.01 * 0.9**END}
    return _references[key]


def taken_over(param: Tensor, state: dict[str, Tensor], projected: bool) -> dict[str, Tensor]:
    """The state of FiraAdam before the step whose gradient `param` has."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if not projected:
        return {"step": torch.tensor(SAVED), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    left = projection_side(tuple(param.shape), "std", "released") == "left"
    u, _, vh = torch.linalg.svd(param.grad, full_matrices=False)
    basis = u[:, :2] if left else vh[:2].T
    return {
        "step": torch.tensor(SAVED),
        "refresh_step": torch.tensor(SAVED),
        "basis": basis.contiguous(),
        "residual_norm": torch.tensor(0.0),
        "exp_avg": basis.T @ m if left else m @ basis,
        "exp_avg_sq": basis.square().T @ v if left else v @ basis.square(),
    }


def agree(results: list[dict[str, Any]]) -> dict[str, Any]:
    for other in results[1:]:
        assert other["error"] == results[0]["error"]
        for name, weight in results[0].get("weights", {}).items():
            assert torch.equal(weight, other["weights"][name]), name
    return results[0]


def adam_run(ranks: Pools, size: int, stage: int, dtype: str = "fp32", **arguments: Any) -> dict[str, Any]:
    settings = adam_config(config(stage, dtype, PARAMS, **arguments.pop("extra", {})), weight_decay=0.05)
    module = "tests.distributed.adam_jobs"
    return agree(ranks.run(size, "adam", module=module, ds_config=settings, shapes=SHAPES, **arguments))


def fira_run(ranks: Pools, size: int, stage: int, dtype: str = "fp32", **arguments: Any) -> dict[str, Any]:
    params, extra = {**PARAMS, **arguments.pop("params", {})}, arguments.pop("extra", {})
    module = "tests.distributed.resize_jobs"
    arguments = {"ds_config": config(stage, dtype, params, **extra), "shapes": SHAPES, "scheduler": True, **arguments}
    return agree(ranks.run(size, "run", module=module, **arguments))


def assert_goes_on(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert found["error"] == ""
    assert found["steps"] == SAVED
    assert found["client_state"]["note"] == "kept"
    assert found["losses"] == pytest.approx(expected["losses"][SAVED:], rel=tolerance)
    assert found["lr"] == pytest.approx(dict.fromkeys(found["lr"], expected["lr"]), rel=1e-12)
    for name, weight in expected["weights"].items():
        difference = (found["weights"][name].float() - weight).norm() / weight.norm().clamp(min=1e-30)
        assert difference < tolerance, name


# Stage and ranks of AdamW, then of FiraAdam.
WAYS = [(0, 2, 0, 2), (1, 2, 1, 2), (2, 2, 2, 2), (3, 2, 3, 2), (2, 3, 3, 2), (3, 2, 2, 3), (0, 1, 2, 2)]
OFTEN = WAYS[1], WAYS[3], WAYS[4], WAYS[6]


@pytest.mark.parametrize("way", full_if(lambda way: way not in OFTEN, WAYS), ids=str)
def test_adamws_moments_are_projected_on_the_first_basis(ranks: Pools, tmp_path: Path, way: tuple[int, ...]) -> None:
    stage, size, next_stage, next_size = way
    adam_run(ranks, size, stage, first=0, last=SAVED, save=str(tmp_path))
    found = fira_run(ranks, next_size, next_stage, first=SAVED, last=END, load=str(tmp_path), seed=7)
    assert_goes_on(found, reference())


def reference_back(weights: dict[str, Tensor], lr: float) -> dict[str, Any]:
    """One process: AdamW with new states on all rows, at the place of the schedule."""
    model = Net(SHAPES)
    model.load_state_dict({name: value for name, value in weights.items() if name != "counted"})
    adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    losses = []
    for step in range(SAVED, END):
        adam.param_groups[0]["lr"] = lr * 0.9**step
        loss = model(rows(step))
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "weights": dict(model.named_parameters())}


# Stage and ranks of FiraAdam, then of AdamW; whether the caller asks for the states.
BACK = [(0, 2, 0, 2, True), (1, 2, 1, 2, True), (2, 2, 2, 3, False), (3, 2, 3, 2, True), (3, 2, 1, 1, False)]


@pytest.mark.parametrize("way", full_if(lambda way: way in BACK[1:3], BACK), ids=str)
def test_back_to_adamw(ranks: Pools, tmp_path: Path, way: tuple[int, int, int, int, bool]) -> None:
    """Weights, steps, data and the schedule's place go on; AdamW's states and their own count start at zero."""
    stage, size, next_stage, next_size, states = way
    start = fira_run(ranks, size, stage, first=0, last=SAVED, save=str(tmp_path))["weights"]
    settings = adam_config(config(next_stage, "fp32", PARAMS), lr=0.002, weight_decay=0.05)
    arguments = {"first": SAVED, "last": END, "load": str(tmp_path), "seed": 7}
    options = {} if states else {"load_options": {"load_optimizer_states": False}}
    module = "tests.distributed.adam_jobs"
    found = agree(
        ranks.run(next_size, "adam", module=module, ds_config=settings, shapes=SHAPES, **arguments, **options)
    )
    expected = reference_back(start, 0.002)
    assert found["error"] == ""
    assert found["type"] != "FiraAdam"
    assert (found["steps"], found["counts"]) == (END, [END - SAVED])
    assert found["client_state"]["note"] == "kept"
    assert not {"ds_fira", "lr_scheduler", "optimizer"} & found["client_state"].keys()
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["lr"] == pytest.approx([0.002 * 0.9**END] * len(found["lr"]), rel=1e-12)
    assert torch.equal(found["weights"]["counted"], start["counted"])
    for name, weight in expected["weights"].items():
        difference = (found["weights"][name] - weight).norm() / weight.norm().clamp(min=1e-30)
        assert difference < TOLERANCE, name


def test_adamw_s_own_checkpoint_stays_deepspeeds(ranks: Pools, tmp_path: Path) -> None:
    """Also in a folder that a checkpoint of FiraAdam lay in: it goes on with its moments."""
    fira_run(ranks, 2, 1, first=0, last=SAVED, save=str(tmp_path))
    settings = {"ds_config": adam_config(config(1, "fp32", PARAMS), weight_decay=0.05), "shapes": SHAPES}
    module = "tests.distributed.adam_jobs"
    ranks.run(2, "adam", module=module, **settings, first=0, last=SAVED, save=str(tmp_path))
    found = agree(ranks.run(2, "adam", module=module, **settings, first=SAVED, last=END, load=str(tmp_path)))
    assert (found["error"], found["counts"]) == ("", [END])


BF16_WRAPPER = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
OPTIONS: dict[str, tuple[int, int, int, int, str, dict[str, Any], dict[str, Any]]] = {
    # Ranks and stage of AdamW and of FiraAdam, dtype, what both have, what FiraAdam has.
    "two groups": (2, 2, 2, 2, "fp32", {"groups": True}, {}),
    "round robin": (2, 2, 3, 2, "fp32", {"extra": {"zero_round_robin_gradients": True}}, {}),
    "alignment": (2, 2, 3, 3, "fp32", {"extra": {"zero_parameter_alignment": True}}, {}),
    "bf16": (2, 2, 2, 2, "bf16", {}, {}),
    "bf16 from stage 0": (2, 0, 2, 3, "bf16", {}, {}),
    "fp16": (2, 1, 2, 1, "fp16", {}, {}),
    "BF16_Optimizer": (2, 1, 3, 1, "bf16", {"extra": BF16_WRAPPER}, {}),
    "bf16 states": (2, 2, 2, 2, "fp32", {}, {"params": {"state_dtype": "bfloat16"}}),
    "int8 states": (2, 2, 3, 3, "fp32", {}, {"params": {"state_dtype": "int8"}}),
}


@pytest.mark.parametrize("name", full_if(("bf16", "fp16", "bf16 states", "BF16_Optimizer").__contains__, OPTIONS))
def test_options(ranks: Pools, tmp_path: Path, name: str) -> None:
    size, stage, next_size, next_stage, dtype, both, own = OPTIONS[name]
    extra = {"extra": both["extra"]} if "extra" in both else {}
    next_loss = adam_run(ranks, size, stage, dtype, first=0, last=SAVED, save=str(tmp_path), **both)["next_loss"]
    found = fira_run(ranks, next_size, next_stage, dtype, first=SAVED, last=END, load=str(tmp_path), **extra, **own)
    exact = dtype == "fp32" and "params" not in own
    assert found["losses"][0] == pytest.approx(next_loss, rel=TOLERANCE if dtype == "fp32" else 0.005)
    # At stage 0 in bf16 DeepSpeed makes one of AdamW's steps as the engine is built, without a gradient.
    assert_goes_on(found, reference(), TOLERANCE if exact else 0.15 if stage == 0 else 0.03)


@pytest.mark.parametrize("way", full_if((2, 2).__eq__, [(2, 2), (3, 3)]), ids=str)
def test_moments_that_wait_are_saved(ranks: Pools, tmp_path: Path, way: tuple[int, int]) -> None:
    """Saved before its first step, the run has no basis yet; it goes on on the same ranks, and on others."""
    stage, size = way
    adam_run(ranks, size, stage, first=0, last=SAVED, save=str(tmp_path / "adam"))
    waits = {"first": SAVED, "last": SAVED, "load": str(tmp_path / "adam"), "save": str(tmp_path / "waits")}
    fira_run(ranks, size, stage, **waits)
    for next_size, next_stage in ((size, stage), (5 - size, 5 - stage)):
        after = {"first": SAVED, "last": END, "load": str(tmp_path / "waits"), "seed": 7}
        assert_goes_on(fira_run(ranks, next_size, next_stage, **after), reference())


ROTATING = {"refresh_moments": "rotate", "subspace": "gram"}


@pytest.mark.parametrize(("stage", "proj_type"), half([2, 3], ["std", "reverse_std"]))
def test_every_part_of_a_cut_matrix_projects_its_own(ranks: Pools, tmp_path: Path, stage: int, proj_type: str) -> None:
    """Of either side, in either way, with bases that are sent: as one rank, which holds all, goes on."""
    params = {**ROTATING, "proj_type": proj_type, "update_proj_gap": 200}
    adam_run(ranks, 2, 2, first=0, last=SAVED, save=str(tmp_path))
    after = {"first": SAVED, "last": END, "load": str(tmp_path), "params": params}
    found, expected = fira_run(ranks, 3, stage, **after), fira_run(ranks, 1, 2, **after)
    assert "low_rank" in found["ways"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).norm() / weight.norm().clamp(min=1e-30) < TOLERANCE, name


def test_other_optimizers_are_refused_by_name(ranks: Pools, tmp_path: Path) -> None:
    settings = config(1, "fp32", PARAMS)
    settings = {**settings, "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}}
    settings["zero_allow_untested_optimizer"] = True
    arguments = {"ds_config": settings, "shapes": SHAPES, "first": 0, "last": 1, "save": str(tmp_path)}
    ranks.run(2, "adam", module="tests.distributed.adam_jobs", **arguments)
    found = fira_run(ranks, 2, 1, first=1, last=2, load=str(tmp_path))
    assert found["error"].startswith("FiraAdam: the checkpoint was made by SGD, which keeps momentum_buffer; ")
    assert "load_optimizer_states=False" in found["error"]


def said(ranks: Pools, size: int, ds_config: dict[str, Any], folder: Path) -> list[list[str]]:
    """What each rank warns of in a load, by this package."""
    jobs = "tests.distributed.adam_jobs"
    found = ranks.run(size, "said_of_load", module=jobs, ds_config=ds_config, shapes=SHAPES, load=str(folder))
    return [[text for text in texts if "FiraAdam" in text] for texts in found]


def test_one_rank_says_once_what_happens(ranks: Pools, tmp_path: Path) -> None:
    """From AdamW, back to it, and where a step takes another number of samples."""
    batch = {"train_micro_batch_size_per_gpu": 6}
    ours = {**config(1, "fp32", {**PARAMS, "lr": 0.02}), **batch}
    adam_run(ranks, 2, 1, first=0, last=SAVED, save=str(tmp_path / "adam"))
    first, second = said(ranks, 2, ours, tmp_path / "adam")
    assert second == []
    (text,) = first
    assert text.startswith("FiraAdam: the checkpoint was made by AdamW: weights, step counts and the schedule's place ")
    fira_run(ranks, 2, 1, first=0, last=1, save=str(tmp_path / "fira"), params={"lr": 0.02})
    assert said(ranks, 2, ours, tmp_path / "fira") == [[], []]
    (first, second), back = (
        said(ranks, 2, {**ours, **adam_config(ours)} | batch, tmp_path / "fira"),
        "made by FiraAdam, ",
    )
    assert second == []
    assert back in first[0]
    first, second = said(ranks, 2, ours | {"train_micro_batch_size_per_gpu": 2}, tmp_path / "fira")
    assert second == []
    assert first == [
        "FiraAdam: a step takes 4 samples, and took 12 in the run that saved; schedules and the Trainer's place in the "
        "data count steps, so samples are left out or seen twice: keep micro-batch x accumulation x ranks at 12, or "
        "find the place in the data by samples."
    ]


def test_without_an_engine_the_sentence_names_the_other_adam() -> None:
    model = Net(SHAPES)
    adam = torch.optim.AdamW(model.parameters())
    model(rows(0)).backward()
    adam.step()
    with pytest.raises(ValueError, match=r"^FiraAdam: the state dict was made by another Adam, such as torch.s AdamW"):
        ds_fira.FiraAdam(model, rank=2).load_state_dict(adam.state_dict())


def test_what_is_left_out_is_named(ranks: Pools, tmp_path: Path) -> None:
    """Amsgrad keeps a third state, which FiraAdam has no place for."""
    ours = {**config(1, "fp32", PARAMS), "train_micro_batch_size_per_gpu": 6}
    settings = adam_config(config(1, "fp32", PARAMS), weight_decay=0.05, amsgrad=True)
    arguments = {"ds_config": settings, "shapes": SHAPES, "first": 0, "last": SAVED, "save": str(tmp_path)}
    agree(ranks.run(2, "adam", module="tests.distributed.adam_jobs", **arguments))
    (first, second), others = said(ranks, 2, ours, tmp_path)
    assert (others, first.startswith("FiraAdam: the checkpoint was made by AdamW")) == ([], True)
    assert second.startswith("FiraAdam: max_exp_avg_sq of the checkpoint of AdamW is left out, since FiraAdam has no ")
    assert "(amsgrad)" in second
