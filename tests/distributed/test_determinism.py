"""The same seed on as many ranks is the same run, to the bit; and a few hundred steps leave memory as it was."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resume_jobs import same
from tests.distributed.zero_jobs import config
from tests.programs import ROOT, Forked, write_text
from tests.ranks import Pools

SHAPES = [(8, 6), (6, 9), (8, 6), (5, 7)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3}
# Of DeepSpeed's and FiraAdam's options those that could order sums or draw numbers differently.
RUNS: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "stage 0": (0, "bf16", {"state_dtype": "int8", "subspace": "randomized"}, {}),
    "stage 1": (1, "fp16", {"exact_cuts": True, "subspace": "gram"}, {"zero_overlap_comm": True}),
    "stage 2": (2, "bf16", {"state_dtype": "bfloat16", "stagger": True}, {"gradient_accumulation_steps": 2}),
    "stage 2, low-rank": (
        2,
        "fp32",
        {"subspace": "randomized", "refresh_moments": "rotate"},
        {"gradient_clipping": 1.0},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_run_twice_is_the_same_to_the_bit(ranks: Pools, name: str) -> None:
    """Weights, states and losses on both ranks, in processes that have trained something else in between."""
    stage, dtype, params, extra = RUNS[name]
    arguments = {"ds_config": config(stage, dtype, {**PARAMS, **params}, **extra), "shapes": SHAPES, "steps": 5}
    first = ranks.run(2, "train", **arguments)
    ranks.run(2, "train", ds_config=config(2, "fp32", PARAMS), shapes=SHAPES[:2], steps=1)
    second = ranks.run(2, "train", **arguments)
    for one, other in zip(first, second, strict=True):
        for key in ("weights", "state", "module", "losses", "gradients", "bytes_sent", "decompositions"):
            assert same(one[key], other[key]), key


@pytest.mark.timeout(600)  # two runs of the script at a time, for machines that are busy
def test_two_runs_of_the_example_leave_the_same_files(tmp_path: Path) -> None:
    """Two new processes each: weights, ZeRO's states and the exported model are equal byte by byte."""
    write_text(tmp_path)
    options = [
        *("--text", "text.txt", "--vocab-size", "300", "--hidden-size", "32", "--layers", "2", "--heads", "2"),
        *("--seq-length", "32", "--batch-size", "4", "--rank", "8", "--update-proj-gap", "3", "--steps", "8"),
        *("--eval-every", "8", "--save-every", "8", "--cache-dir", "cache"),
    ]
    script = str(ROOT / "examples" / "pretrain_llama.py")
    launches = [Forked(script, [*options, "--output-dir", name], tmp_path, name, ranks=2) for name in ("a", "b")]
    for done in [done for launch in launches for done in launch.wait()]:
        assert done.returncode == 0, done.stderr[-4000:]
    compared = 0
    for path in sorted((tmp_path / "a").rglob("*")):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        if path.name.endswith("optim_states.pt") or path.suffix == ".safetensors":
            assert path.read_bytes() == other.read_bytes(), path
            compared += 1
        elif path.name.endswith("model_states.pt"):
            one, two = (torch.load(file, weights_only=False) for file in (path, other))
            for state in (one, two):
                for part in state["ds_fira"]["ranks"]:
                    assert part["metrics"].pop("refresh_seconds") > 0.0  # wall time
            assert same(one["module"], two["module"])
            assert same(one["ds_fira"], two["ds_fira"])
            assert same(one["lr_scheduler"], two["lr_scheduler"])
            compared += 1
    assert compared == 4, "one file of weights, two of states, one of the exported model"


def test_a_hundred_steps_leave_objects_and_ranks_as_they_were(ranks: Pools) -> None:
    """The short form of `python -m benchmarks.quality.soak`: an object kept in each step would be 20 in each interval.

    What jobs before it have left in these processes may go in one of them, which must hide nothing in the other.
    """
    settings = {"steps": 100, "warm_up": 60, "read_every": 20, "save_every": 60, "check_every": 25}
    for found in ranks.run(2, "soak", "benchmarks.quality.soak", **settings):
        assert found["equal"]
        assert found["refreshes"] == 3 * -(-100 // 20)
        counts = [count for _, _, count in found["readings"]]
        assert max(later - earlier for earlier, later in pairwise(counts)) < 10, found["readings"]


@pytest.mark.full
def test_a_few_hundred_steps_leave_memory_and_ranks_as_they_were(ranks: Pools) -> None:
    """Longer, for the bytes too.

    Resident memory settles within some 200 steps and may still rise once; a leak would be in every interval between
    two readings.
    """
    settings = {"steps": 300, "warm_up": 200, "read_every": 20, "save_every": 60, "check_every": 25}
    for found in ranks.run(2, "soak", "benchmarks.quality.soak", **settings):
        assert found["equal"]
        assert found["refreshes"] == 3 * -(-300 // 20)
        assert found["last_loss"] < 0.1 * found["first_loss"]
        assert abs(found["objects_per_step"]) < 0.5, found["readings"]
        assert found["least_bytes_per_step"] < 2_000, found["readings"]
