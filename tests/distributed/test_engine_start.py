"""How an engine starts: imports in any order, scripts that know nothing of ds_fira, configs that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.zero_jobs import config
from tests.programs import ROOT, run
from tests.ranks import Pools, free_port

SHAPES = [(8, 6), (6, 9), (8, 6), (5, 7)]


PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3}


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
    "super offload": (
        case(stage=3, extra={"zero_offload_optimizer": {"device": "cpu", "super_offload": True}}),
        "ValueError",
        ["super_offload = True", "set it to false"],
    ),
    "tensor parallel": (
        case(stage=3, dtype="bf16", record_scaling_factors=2, extra={"tensor_parallel": {"autotp_size": 2}}),
        "ValueError",
        ["record_scaling_factors is not supported with tensor_parallel.autotp_size = 2", "set it to 0"],
    ),
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


@pytest.mark.full
def test_import_order_does_not_matter() -> None:
    """`deepspeed.initialize` held before `import ds_fira` knows FiraAdam too; importing twice changes nothing."""
    code = """
import os, sys
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu", MASTER_PORT=sys.argv[1])
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
    done = subprocess.run([sys.executable, "-c", code, str(free_port())], capture_output=True, text=True, timeout=120)
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


def check_unmodified(command: list[str], folder: Path, **variables: str) -> None:
    """A command in front of the script, whose one optimizer is FiraAdam; as a user starts it, without a compiler."""
    script, out = folder / "train.py", folder / "out.json"
    script.write_text(UNAWARE_SCRIPT)
    ds_config = json.dumps(config(2, "fp32", {"lr": 0.1, "rank": 2}))
    done = run([*command, str(script), "--out", str(out), "--config", ds_config], folder, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    name, world_size, projects = json.loads(out.read_text())
    assert (name, projects) == ("FiraAdam", True)
    assert world_size == int(variables.get("WORLD_SIZE", 2))


def test_unmodified_script(tmp_path: Path) -> None:
    """`python -m ds_fira.run train.py --args`, as a launcher calls it, trains a script that never imports ds_fira."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    check_unmodified(["python", "-m", "ds_fira.run"], tmp_path, PYTHONPATH=str(ROOT), **place, **meeting)


@pytest.mark.full
def test_unmodified_script_under_the_launcher(tmp_path: Path) -> None:
    """`deepspeed --module ds_fira.run train.py --args` does so on two ranks."""
    check_unmodified(
        ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "ds_fira.run"], tmp_path
    )


def test_an_engine_without_a_rank_is_refused(ranks: Pools) -> None:
    """At every stage, with the remedy."""
    cases = [(config(stage, "fp32", {"lr": 0.01}), None) for stage in (0, 2)]
    for result in ranks.run(2, "try_to_build", cases=cases, shapes=[(6, 8)]):
        for kind, text in result:
            assert kind == "ValueError"
            assert text.startswith("FiraAdam: rank = None in the DeepSpeed config, and no param group has one")
