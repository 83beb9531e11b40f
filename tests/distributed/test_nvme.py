"""Stage 3 with the optimizer on NVMe, in real files: as one process, and a save that any other engine loads.

Without DeepSpeed's async_io operator (libaio's headers and a compiler) these tests are skipped; to compile it:
`python -c "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compatibility.option_jobs import PARAMS
from tests.distributed.nvme_jobs import nvme_config, operator_is_built
from tests.distributed.zero_jobs import config
from tests.ranks import Pools

JOBS = "tests.distributed.nvme_jobs"
PIPELINE = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 8}
ALONE = {"params": True, "device": "cpu"}
pytestmark = pytest.mark.skipif(not operator_is_built(), reason="DeepSpeed's async_io is not compiled here")


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("fp32", PIPELINE),
        pytest.param("bf16", {"params": True}, marks=pytest.mark.full),
        pytest.param("fp32", {}, marks=pytest.mark.full),
        pytest.param("bf16", {**PIPELINE, "params": True}, marks=pytest.mark.full),
    ],
)
def test_it_trains_as_one_process(ranks: Pools, tmp_path: Path, dtype: str, how: dict[str, Any]) -> None:
    """Gradients too, of which DeepSpeed would read those wrongly that do not begin at a block of the disk."""
    for found in ranks.run(2, "parity", JOBS, folder=str(tmp_path), dtype=dtype, **how):
        assert found["wrong"] == ""
        assert found["swapped"] == [1, 3]  # projected weights; the others with both moments
        assert found["held"] == [0, 0]
        assert found["moment"]
        assert found["low_rank"]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.swp")) > 4 * 4 * 2 * 528_000


CPU = config(3, "fp32", PARAMS, zero_offload_optimizer={"device": "cpu", "pin_memory": False})


@pytest.mark.parametrize(
    ("saved", "loaded", "ranks_after"),
    [
        pytest.param({}, {}, 2, id="same"),
        pytest.param({"params": True}, PIPELINE, 2, id="other swapper", marks=pytest.mark.full),
        pytest.param({}, None, 2, id="to memory", marks=pytest.mark.full),
        pytest.param(None, {"params": True}, 2, id="from memory", marks=pytest.mark.full),
        pytest.param(ALONE, ALONE, 2, id="parameters alone", marks=pytest.mark.full),
        pytest.param(PIPELINE, {}, 1, id="one rank"),
    ],
)
def test_a_resumed_run_is_the_same(
    ranks: Pools, tmp_path: Path, saved: dict[str, Any] | None, loaded: dict[str, Any] | None, ranks_after: int
) -> None:
    """To the bit on as many ranks; None is offload to the CPU."""
    configs = [
        CPU if how is None else nvme_config(str(tmp_path / name), "fp32", **how)
        for name, how in (("before", saved), ("after", loaded))
    ]
    folder = str(tmp_path / "checkpoint")
    whole = ranks.run(2, "save", JOBS, ds_config=configs[0], folder=folder)
    resumed = ranks.run(ranks_after, "load", JOBS, ds_config=configs[1], folder=folder)
    for (weights, own), (expected, of_whole) in zip(resumed, whole, strict=False):
        if ranks_after == 2:
            assert len(own) == len(of_whole)
            assert all(map(torch.equal, own, of_whole))
        for name, weight in weights.items():
            assert (weight - expected[name]).norm() <= (1e-5 if ranks_after == 1 else 0) * expected[name].norm()
