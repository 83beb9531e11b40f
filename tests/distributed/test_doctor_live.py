"""`ds-fira doctor` says beforehand what live engines do: groups, split matrices, bytes, and refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory.estimate import MODEL, ds_config
from ds_fira.tools.doctor import examine
from tests.distributed.zero_jobs import Net
from tests.ranks import Pools

SHAPES = [(8, 6), (8, 6)]
CONFIG = ds_config("Fira", {"zero_stage": 2, "dtype": "bf16"}, {})


def written(folder: Path, content: dict[str, Any], name: str = "ds_config.json") -> Path:
    """A file in a folder."""
    path = folder / name
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("stage", "params"),
    [(2, {}), (3, {"residual": "normalized", "state_dtype": "int8"}), (1, {"exact_cuts": True})],
    ids=str,
)
def test_groups_splits_and_bytes_are_those_of_an_engine(
    ranks: Pools, tmp_path: Path, stage: int, params: dict[str, Any]
) -> None:
    """Equal on two ranks, to the byte."""
    content = copy.deepcopy(CONFIG)
    content["zero_optimization"]["stage"] = stage
    content["optimizer"]["params"] |= params
    model = written(tmp_path, MODEL, "config.json")
    found = examine(written(tmp_path, content), str(model), gpus=2)
    assert not found.refusals
    for live in ranks.run(
        2, "laid_out", module="tests.distributed.doctor_jobs", ds_config=content, config_file=str(model)
    ):
        members = [[name for name, _ in listed] for listed in live["groups"]]
        assert [list(group.names) for group in found.groups] == members
        shapes = [dict(Counter(shape for _, shape in listed)) for listed in live["groups"]]
        assert [group.shapes for group in found.groups] == shapes
        assert [dataclasses.astuple(matrix) for matrix in found.split] == live["split"]
        assert list(found.state_bytes) == live["state_bytes"]
    assert found.split


REFUSED: dict[str, dict[str, Any]] = {
    "a setting": {"optimizer": {"type": "FiraAdam", "params": {"rank": 2, "gama": 2.5}}},
    "no rank": {"optimizer": {"type": "FiraAdam", "params": {}}},
    "a target that is nowhere": {"optimizer": {"type": "FiraAdam", "params": {"rank": 2, "target_modules": ["x"]}}},
    "ZeRO++": {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}},
    "the batch": {"train_batch_size": 7, "gradient_accumulation_steps": 1},
    "stage 0 with another dtype of sums": {
        "zero_optimization": {"stage": 0},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "auto": {"bf16": {"enabled": "auto"}},
}


def test_refusals_are_those_of_an_engine(ranks: Pools, tmp_path: Path) -> None:
    """The sentence of a real start, or DeepSpeed's."""
    contents = [{**CONFIG, **change} for change in REFUSED.values()]
    cases = [(content, None) for content in contents]
    (live, *_) = ranks.run(2, "try_to_build", "tests.distributed.zero_jobs", cases=cases, shapes=SHAPES)
    for case, content, (_, text) in zip(REFUSED, contents, live, strict=True):
        first = examine(written(tmp_path, content), Net(SHAPES), gpus=2).refusals[0]
        assert first.removeprefix("DeepSpeed: ") in " ".join(text.split()), case
