"""torchtitan's containers of optimizers and schedulers with FiraAdam, by the lines of docs/fsdp.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.page_blocks import ROOT, blocks
from tests.ranks import Pools

JOBS = "tests.distributed.titan_jobs"
SHAPES = [(12, 8), (9, 14)]
# With what its optimizers import; each without its dependencies, of which torch is one.
PACKAGES = ("torchtitan==0.3.0", "spmd_types==0.2.3", "torch_checkpointing", "tyro", "einops", "docstring_parser")


@pytest.mark.full
def test_a_run_goes_on_through_its_checkpoints(ranks: Pools, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "lib")]
    subprocess.run([*pip, *PACKAGES, "typeguard", "shtab"], check=True)
    (page,) = (block.text for block in blocks(ROOT / "docs" / "fsdp.md") if "torchtitan" in block.text)
    job = {"library": str(tmp_path / "lib"), "page": page, "shapes": SHAPES}
    saved = str(tmp_path / "checkpoint")
    through = ranks.run(2, "train", JOBS, save=saved, **job)
    again = ranks.run(2, "train", JOBS, load=saved, **job)
    others = ranks.run(3, "train", JOBS, load=saved, **job)
    for result in (*again, *others):
        assert result["kind"] == "FiraAdam"
        assert result["metrics"] == through[0]["metrics"]
        assert result["carried"].keys() == through[0]["carried"].keys()
        for key, value in through[0]["carried"].items():
            found = result["carried"][key]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, key
    assert any(name.endswith(".basis") for _, name in through[0]["carried"])
    for rank, result in enumerate(again):
        assert result["losses"] == through[rank]["losses"][-2:]
        assert all(torch.equal(value, result["weights"][name]) for name, value in through[0]["weights"].items())
