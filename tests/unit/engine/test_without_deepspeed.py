"""The package where DeepSpeed is not installed: its optimizers train by themselves, and the rest says what it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A finder in front of all others refuses DeepSpeed, as it would be if it were not installed.
REFUSED = """
import importlib.abc, sys

class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuses())
"""
ABSENT = """
import importlib.util, sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "deepspeed" else find_spec(name, *args)
"""
TRAINS = """
import tempfile
import torch
import ds_fira

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
groups = ds_fira.param_groups(model, rank=2, update_proj_gap=3, target_modules=["0"])
optimizer = ds_fira.FiraAdam(groups, lr=0.02, record_scaling_factors=1)
x = torch.randn(64, 12)
losses = []
for _ in range(20):
    loss = (model(x) - x[:, :1]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], losses
assert ds_fira.state_bytes(optimizer) == ds_fira.memory_report(optimizer)["optimizer_state_bytes"][0] > 0
found = ds_fira.metrics(optimizer)
assert (found["matrix_steps"], found["refreshes"], found["projected_matrices"]) == (20, 7, 1), found
assert all(len(one["steps"]) == 20 for one in ds_fira.scaling_factors(optimizer).values())
with tempfile.TemporaryDirectory() as folder:
    ds_fira.write_scaling_factors(optimizer, f"{folder}/factors.npz")
    assert ds_fira.read_scaling_factors(f"{folder}/factors.npz").keys() == ds_fira.scaling_factors(optimizer).keys()
again = ds_fira.FiraAdam(ds_fira.param_groups(model, rank=2, update_proj_gap=3, target_modules=["0"]), lr=0.02)
again.load_state_dict(optimizer.state_dict())
with ds_fira.Termination() as termination:
    assert not termination.requested()
for name in ds_fira.__all__:
    try:
        getattr(ds_fira, name)
    except ImportError as error:
        print(error)
assert not [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]
"""


@pytest.mark.parametrize(
    "missing", [pytest.param(REFUSED, marks=pytest.mark.full, id="refused"), pytest.param(ABSENT, id="absent")]
)
def test_a_lone_optimizer_trains_where_deepspeed_is_not_installed(missing: str) -> None:
    """Import, training, reports and state dicts load no module of DeepSpeed; the other names say what they need."""
    done = subprocess.run([sys.executable, "-c", missing + TRAINS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needing = (
        "DeviatingRank",
        "checkpoint_activations",
        "init_distributed",
        "load_released_state",
        "register",
        "shutdown",
    )
    assert done.stdout.splitlines() == [
        f"ds_fira.{name} needs DeepSpeed, which is not installed: pip install deepspeed." for name in needing
    ]


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    """As in every module, with DeepSpeed or without."""
    import ds_fira

    with pytest.raises(AttributeError, match="module 'ds_fira' has no attribute 'FiraSGD'"):
        _ = ds_fira.FiraSGD
