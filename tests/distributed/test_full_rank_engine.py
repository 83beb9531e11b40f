"""A rank that saves nothing inside DeepSpeed engines: what is trained, what a resume goes on with, what objects do."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.full_rank_jobs import PARAMS, SHAPES
from tests.distributed.zero_jobs import config

JOBS = "tests.distributed.full_rank_jobs"
SMALL = [(20, 16)]


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (1, 2), (2, 2), (2, 3)])
def test_a_run_goes_on_as_it_was_saved(ranks, tmp_path, world, stage):
    """Saved with the released behaviour, resumed with the default: to the bit, over a refresh."""
    saved = config(stage, "fp32", {**PARAMS, "project_full_rank": True})
    resumed = config(stage, "fp32", PARAMS)
    results = ranks.run(world, "resume_default", JOBS, saved=saved, resumed=resumed, folder=str(tmp_path))
    for rank, result in enumerate(results):
        assert result["projected"] == (sorted(SHAPES), SMALL, sorted(SHAPES))
        assert result["weights"]
        # At stage 3 the default's groups are of one kind, so states lie in other tensors there.
        assert result["same"] or stage == 3
        said = [text for text in result["warned"] if "checkpoint's True, not from False" in text]
        assert len(said) == (rank == 0)


def test_a_run_saved_by_the_default_stays_unprojected(ranks, tmp_path):
    """Though the new run asks for the released behaviour."""
    saved = config(2, "fp32", PARAMS)
    resumed = config(2, "fp32", {**PARAMS, "project_full_rank": True})
    for result in ranks.run(2, "resume_default", JOBS, saved=saved, resumed=resumed, folder=str(tmp_path)):
        assert result["projected"] == (SMALL, sorted(SHAPES), SMALL)
        assert result["same"]


@pytest.mark.parametrize("project_full_rank", [False, True])
def test_over_stages_and_back(ranks, tmp_path, project_full_rank):
    saved = config(2, "fp32", {**PARAMS, "project_full_rank": project_full_rank})
    resumed = config(3, "fp32", PARAMS)
    for result in ranks.run(2, "resume_elsewhere", JOBS, saved=saved, resumed=resumed, folder=str(tmp_path)):
        assert result["projected"] == (sorted(SHAPES) if project_full_rank else SMALL)
        assert result["weights"]
        assert result["states"]


@pytest.mark.parametrize("scheduled", [None, "user_groups"])
def test_an_object_with_one_group_of_both_kinds(ranks, scheduled):
    """ZeRO's flat tensors are of one kind, so the group is split, with a scheduler too; the step is that of stage 0."""
    alone = ranks.run(2, "train_object", JOBS, stage=0)[0]
    sharded = ranks.run(2, "train_object", JOBS, stage=2, scheduled=scheduled)[0]
    assert alone["groups"] == (2, 2)
    assert sharded["groups"] == (2, 3)
    assert alone["projected"] == sharded["projected"] == SMALL
    assert not sharded["warned"]
    assert sharded["memory"]["paper_formula_bytes"] == alone["memory"]["paper_formula_bytes"]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(sharded["weights"][name], weight, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"scheduled": "parts"}, "build the learning-rate scheduler after deepspeed.initialize"),
        ({"rule": "FiraNormalized"}, "Normalized is not elementwise"),
    ],
    ids=["a scheduler counts the groups", "a rule sees matrices whole"],
)
def test_where_groups_cannot_be_of_one_kind_the_released_behaviour_is_said(ranks, arguments, reason):
    results = ranks.run(2, "train_object", JOBS, stage=2, **arguments)
    assert results[0]["projected"] == sorted(SHAPES)
    assert [len(result["warned"]) for result in results] == [1, 0]
    assert reason in results[0]["warned"][0]
