"""accelerate (`fsdp_version: 2`) and the Trainer under FSDP2: an optimizer that is sharded after it is made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ds_fira
import ds_fira.hf
from tests.integration.fsdp_jobs import SETTINGS
from tests.ranks import Pools

JOBS = "tests.integration.fsdp_jobs"


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", pytest.param("FULL_STATE_DICT", marks=pytest.mark.full)])
def test_accelerate(ranks: Pools, tmp_path: Path, kind: str) -> None:
    """One process's weights to the bit, with a scheduler, clipping and a resume."""
    results = ranks.run(2, "accelerate_train", JOBS, folder=str(tmp_path / "state"), state_dict_type=kind)
    first = results[0]
    params = {name: torch.nn.Parameter(weight.clone()) for name, weight in first["start"].items()}
    optimizer = ds_fira.FiraAdam(list(params.items()), **SETTINGS)
    for rate, gradients in zip(first["rates"], first["gradients"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, param in params.items():
            param.grad = gradients[name]
        optimizer.step()
    assert len(set(first["rates"])) == 9
    for result in results:
        assert result["kinds"] == {"DTensor"}
        for name, param in params.items():
            assert torch.equal(result["end"][name], param), name
            assert torch.equal(result["again"][name], param), name


def test_trainer(ranks: Pools, tmp_path: Path) -> None:
    """Every matrix is split over both ranks, and a resumed run ends with the same weights."""
    whole = ranks.run(2, "trainer_train", JOBS, folder=str(tmp_path), resume=None)
    again = ranks.run(2, "trainer_train", JOBS, folder=str(tmp_path), resume=str(tmp_path / "checkpoint-2"))
    held = whole[0]["optimizer_state_bytes"]
    assert whole[0]["split"] == 14
    assert max(held) <= 1.1 * sum(held) / 2 < 0.6 * whole[0]["adamw_bytes"]
    for name, weight in whole[0]["end"].items():
        assert torch.equal(weight, again[0]["end"][name]), name


def test_the_trainer_refuses_the_first_version() -> None:
    betas = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0, "learning_rate": 1e-3}
    args = SimpleNamespace(optim="fira_adamw", optim_args="rank=4", fsdp=True, fsdp_config={"version": 1}, **betas)
    with pytest.raises(ValueError, match="does not train under FSDP with fsdp_config version = 1, which"):
        ds_fira.hf._make(SimpleNamespace(args=args, model=torch.nn.Linear(8, 8)))
