"""FiraAdam in a DeepSpeed engine: registration, stage 0, groups, schedulers, faults, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_fira
from tests.distributed.zero_jobs import config
from tests.ranks import Pools

SHAPES = [(8, 6), (6, 9), (8, 6), (5, 7)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stage_0(ranks: Pools, world_size: int, dtype: str) -> None:
    """Replicated states: all ranks agree to the bit, and with one process; each basis is computed once for all."""
    results = ranks.run(
        world_size, "train", ds_config=config(0, dtype, {**PARAMS, "weight_decay": 0.1}), shapes=SHAPES, steps=7
    )
    first = results[0]
    for other in results[1:]:
        for i, states in enumerate(first["state"]):
            for mine, theirs in zip(states, other["state"][i], strict=True):
                assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert sum(result["decompositions"] for result in results) == first["metrics"]["refreshes"] == 3 * len(SHAPES)

    params = [[torch.nn.Parameter(p.clone()) for p in group] for group in first["start"]]
    groups = [{**g["settings"], "params": p} for g, p in zip(first["groups"], params, strict=True)]
    optimizer = ds_fira.FiraAdam(groups)
    for gradients in first["gradients"]:
        for i, seen in gradients.items():
            for param, grad in zip(params[i], seen, strict=True):
                param.grad = grad
        if gradients:
            optimizer.step()
    for result in results:
        for expected, weights in zip(params, result["weights"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, weights, strict=True))


@pytest.mark.parametrize("way", ["json", "object", "callable"])
def test_weights_do_not_move_before_training(ranks: Pools, way: str) -> None:
    """The wrapper of stage 0 steps with zero gradients as it is built: neither decay nor a step count comes of it."""
    settings = {**PARAMS, "lr": 1.0, "weight_decay": 0.5}
    ds_config = config(0, "bf16", settings)
    if way == "json":
        result = ranks.run(1, "train", ds_config=ds_config, shapes=SHAPES, steps=1)[0]
    else:
        del ds_config["optimizer"]
        result = ranks.run(
            1,
            "train_with_object",
            ds_config=ds_config,
            shapes=SHAPES,
            steps=1,
            settings=settings,
            as_callable=way == "callable",
        )[0]
    torch.manual_seed(0)
    from tests.distributed.zero_jobs import Net

    fresh = [p.detach().bfloat16().float() for p in Net(SHAPES).parameters()]
    start = [p for group in result["start"] for p in group]
    assert sorted(float(p.abs().sum()) for p in start) == sorted(float(p.abs().sum()) for p in fresh)
    assert all(int(state["step"]) == 1 for group in result["state"] for state in group)


def test_user_groups_survive(ranks: Pools) -> None:
    """A user's own lr, weight decay and name go to every group that comes of theirs."""
    results = ranks.run(2, "train_with_groups", ds_config=config(2, "fp32", PARAMS), shapes=SHAPES, steps=2)
    found = {
        (group["settings"].get("name"), group["settings"]["lr"], group["settings"]["weight_decay"], name)
        for group in results[0]["groups"]
        for name, _, _ in group["members"]
    }
    ranked = {name for g in results[0]["groups"] if "rank" in g["settings"] for name, _, _ in g["members"]}
    assert found == {
        ("first", 0.02, 0.3, "layers.0.weight"),
        ("first", 0.02, 0.3, "layers.1.weight"),
        ("first", 0.02, 0.3, "norm.weight"),
        (None, 0.01, 0.0, "layers.2.weight"),
        (None, 0.01, 0.0, "layers.3.weight"),
        (None, 0.01, 0.0, "embedding.weight"),
        (None, 0.01, 0.0, "lm_head.weight"),
        (None, 0.01, 0.0, "norm.bias"),
    }
    assert ranked == {f"layers.{i}.weight" for i in range(4)}


def test_param_groups_as_model_parameters(ranks: Pools) -> None:
    """Groups that say themselves what is projected are split by shape, their rank and weight decay kept."""
    ds_config = config(2, "fp32", {"lr": 0.01, "update_proj_gap": 3})
    results = ranks.run(2, "train_with_param_groups", ds_config=ds_config, shapes=[(8, 6), (6, 9), (8, 6)], steps=2)
    found = [
        (group["settings"].get("rank"), group["settings"]["weight_decay"], [name for name, _, _ in group["members"]])
        for group in results[0]["groups"]
    ]
    assert found == [
        (2, 0.1, ["layers.0.weight", "layers.2.weight"]),
        (2, 0.1, ["layers.1.weight"]),
        (None, 0.1, ["embedding.weight", "lm_head.weight"]),
        (None, 0.0, ["norm.weight", "norm.bias"]),
    ]


def test_target_modules_in_json(ranks: Pools) -> None:
    """Only the modules named are projected; the rest is AdamW."""
    params = {**PARAMS, "target_modules": ["layers.1", "layers.3"]}
    results = ranks.run(2, "train", ds_config=config(2, "fp32", params), shapes=SHAPES, steps=2)
    ranked = {name for g in results[0]["groups"] if "rank" in g["settings"] for name, _, _ in g["members"]}
    assert ranked == {"layers.1.weight", "layers.3.weight"}
    assert results[0]["metrics"]["projected_matrices"] == 2


def test_scheduler_reaches_every_group(ranks: Pools) -> None:
    """A DeepSpeed scheduler sets the lr of all groups, however many there are of one the user made."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.4, "warmup_num_steps": 4}}
    ds_config = config(2, "fp32", PARAMS, scheduler=scheduler)
    results = ranks.run(2, "train", ds_config=ds_config, shapes=SHAPES, steps=6)
    assert len(results[0]["lr"]) > 2
    assert results[0]["lr"] == pytest.approx([0.4] * len(results[0]["lr"]))


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, "rank 1"])
@pytest.mark.parametrize("when", [0, 3])
def test_faulty_gradients_pass(ranks: Pools, stage: int, value: float | str, when: int) -> None:
    """One matrix's gradient is NaN, infinite, zero or of rank 1, at the first step or at a refresh: training goes on.

    Stage 0 in fp32 and stage 2 with check_grad_overflow off are where DeepSpeed lets such gradients through.
    """
    dtype = "fp32" if stage == 0 else "bf16"
    extra: dict[str, Any] = {} if stage == 0 else {"bf16": {"check_grad_overflow": False}}
    results = ranks.run(
        3,
        "train",
        ds_config=config(stage, dtype, PARAMS, **extra),
        shapes=SHAPES,
        steps=6,
        faults={when: ("layers.1.weight", value)},
    )
    for result in results:
        assert all(len(gradients) > 0 for gradients in result["gradients"]), "DeepSpeed kept the gradient from us"
        for state in (state for group in result["state"] for state in group):
            assert all(torch.isfinite(tensor).all() for tensor in state.values())
        for name, weight in result["module"].items():
            assert torch.isfinite(weight).all(), name
            assert torch.equal(weight, results[0]["module"][name]), "ranks drifted apart"
    faulty = [
        grad
        for i, gradients in results[0]["gradients"][when].items()
        for grad in gradients
        if "rank" in results[0]["groups"][i]["settings"]
    ]
    if value not in (0.0, "rank 1") and stage == 0:
        assert not all(torch.isfinite(grad).all() for grad in faulty)
    # It trained on after the fault, the faulty matrix too.
    assert results[0]["losses"][-1] < results[0]["losses"][0]
    steps = [int(s["step"].max()) for r in results for g in r["state"] for s in g if "basis" in s and s["step"].numel()]
    assert max(steps) == 6
    assert min(steps) >= 5


def case(change: str | None = None, stage: int = 2, dtype: str = "fp32", extra: dict[str, Any] | None = None, **params):
    """One config to be refused."""
    return config(stage, dtype, {**PARAMS, **params}, **(extra or {})), change


REFUSED = {
    "rnak": (case(rnak=4), "ValueError", ["'rnak' = 4", "'rank'"]),
    "rank": (case(rank=0), "ValueError", ["rank = 0", "at least 1"]),
    "gap": (case(update_proj_gap=0), "ValueError", ["update_proj_gap = 0", "at least 1"]),
    "gamma": (case(gamma=1.0), "ValueError", ["gamma = 1.0", "above 1"]),
    "lr": (case(lr=-0.1), "ValueError", ["lr = -0.1", "at least 0"]),
    "lr auto": (case(lr="auto"), "ValueError", ["lr = 'auto'"]),
    "proj_type": (case(proj_type="full"), "ValueError", ["proj_type = 'full'", "'std'"]),
    "target_modules": (case(target_modules=["no_such"]), "ValueError", ["['no_such']", "match no"]),
    "nvme": (
        case(stage=3, extra={"zero_offload_optimizer": {"device": "nvme", "nvme_path": "nowhere"}}),
        "ValueError",
        ["offload_optimizer.device = 'nvme'", "use 'cpu'"],
    ),
    "nvme parameters": (
        case(stage=3, extra={"zero_offload_param": {"device": "nvme", "nvme_path": "nowhere"}}),
        "ValueError",
        ["offload_param.device = 'nvme'", "use 'cpu'"],
    ),
    "super offload": (
        case(stage=3, extra={"zero_offload_optimizer": {"device": "cpu", "super_offload": True}}),
        "ValueError",
        ["super_offload = True", "set it to false"],
    ),
    "ratio": (
        case(stage=3, extra={"zero_offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
        "ValueError",
        ["offload_optimizer.ratio = 0.5", "set it to 1.0"],
    ),
    "elastic": (case(extra={"zero_elastic_checkpoint": True}), "ValueError", ["elastic_checkpoint = True", "false"]),
    "tensor parallel": (
        case(stage=1, dtype="bf16", extra={"tensor_parallel": {"autotp_size": 2}}),
        "ValueError",
        ["tensor parallelism of size 2", "set it to 1"],
    ),
    "pipeline": (case("pipeline", stage=1), "ValueError", ["PipelineEngine", "PipelineModule"]),
    "sparse": (case("sparse", stage=0), "ValueError", ["embedding.sparse = True", "sparse=False"]),
    "complex": (case("complex", stage=0), "ValueError", ["rotation", "complex64", "view_as_real"]),
}


def test_bad_input_stops_on_every_rank(ranks: Pools) -> None:
    """Before training, on every rank, with the setting, its value and the remedy."""
    answers = ranks.run(2, "try_to_build", cases=[item[0] for item in REFUSED.values()], shapes=SHAPES)
    for answer in answers:
        for (kind, text), (name, (_, expected_kind, parts)) in zip(answer, REFUSED.items(), strict=True):
            assert kind == expected_kind, (name, kind, text)
            assert all(part in text for part in parts), (name, text)


def test_import_order_does_not_matter() -> None:
    """`deepspeed.initialize` held before `import ds_fira` knows FiraAdam too; importing twice changes nothing."""
    code = """
import os
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
from deepspeed import initialize
import importlib, torch, ds_fira
configure = __import__("deepspeed").DeepSpeedEngine._configure_optimizer
ds_fira.register()
assert __import__("deepspeed").DeepSpeedEngine._configure_optimizer is configure
ds_fira.init_distributed()
config = {"train_batch_size": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2},
          "optimizer": {"type": "FiraAdam", "params": {"lr": 0.1, "rank": 2}}}
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config)
x = torch.randn(3, 4)
losses = []
for _ in range(5):
    loss = engine(x).square().mean()
    engine.backward(loss); engine.step(); losses.append(float(loss.detach()))
assert losses[-1] < losses[0], losses
assert ds_fira.metrics(engine)["projected_matrices"] == 2
ds_fira.shutdown(engine)
print("trained")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout


UNAWARE_SCRIPT = """
import argparse, json, sys, deepspeed, torch
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("--out")
parser.add_argument("--config")
args = parser.parse_args()
deepspeed.init_distributed()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=json.loads(args.config))
for _ in range(3):
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    engine.step()
if engine.global_rank == 0:
    with open(args.out, "w") as file:
        json.dump([type(engine.basic_optimizer).__name__, engine.dp_world_size, "rank" in
                   engine.basic_optimizer.param_groups[0]], file)
import gc
engine.destroy(); del engine; gc.collect()
torch.distributed.barrier(); torch.distributed.destroy_process_group()
"""


def test_unmodified_script_under_the_launcher(tmp_path: Path) -> None:
    """`deepspeed --module ds_fira.run train.py --args` trains a script that never imports ds_fira."""
    import json

    script, out = tmp_path / "train.py", tmp_path / "out.json"
    script.write_text(UNAWARE_SCRIPT)
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        *(str(launcher), "--num_gpus", "2", "--module", "ds_fira.run", str(script), "--out", str(out)),
        *("--config", json.dumps(config(2, "fp32", {"lr": 0.1, "rank": 2}))),
    ]
    # As a user starts it: with the environment's programs on the path, and no compiler needed.
    import os

    environment = {**os.environ, "PATH": f"{launcher.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(out.read_text()) == ["FiraAdam", 2, True]


@pytest.mark.parametrize(
    ("stage", "save_at", "options"),
    [
        *((stage, save_at, {}) for stage in (0, 1, 2, 3) for save_at in (3, 4)),
        (3, 3, {"exact_cuts": True}),
        (3, 4, {"state_dtype": "int8", "subspace": "randomized", "refresh_moments": "rotate"}),
        (2, 4, {"exact_cuts": True}),
        (0, 4, {"state_dtype": "bfloat16"}),
        (2, 4, {"state_dtype": "bfloat16", "subspace": "randomized", "refresh_moments": "rotate"}),
        (2, 3, {"state_dtype": "int8", "subspace": "gram", "stagger": True}),
    ],
)
def test_resume_is_exact(ranks: Pools, tmp_path: Path, stage: int, save_at: int, options: dict[str, Any]) -> None:
    """Saved at a refresh or between two, loaded into a new engine on as many ranks: the same run to the bit."""
    ds_config = config(stage, "bf16", {**PARAMS, **options})
    assert (
        ranks.run(3, "resume", ds_config=ds_config, shapes=SHAPES, steps=7, save_at=save_at, folder=str(tmp_path))
        == [True] * 3
    )
