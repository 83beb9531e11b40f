"""`ds_fira.step_in_backward` over replicas: one process's weights, the same on every rank, resumed to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import backward_jobs
from tests.grids import full_if
from tests.ranks import Pools

JOBS, STEPS = "tests.distributed.backward_jobs", 7


@pytest.mark.parametrize("size", full_if(lambda size: size == 3, (2, 3)))
def test_replicas_make_one_process_s_steps(ranks: Pools, size):
    answers = ranks.run(size, "train", module=JOBS, steps=STEPS)
    weights = answers[0]["weights"]
    for other in answers[1:]:
        assert all(torch.equal(weights[name], other["weights"][name]) for name in weights)
    expected, start = backward_jobs.reference(STEPS, size), backward_jobs.Branches(0).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert torch.equal(weights["never.weight"], start["never.weight"])
    assert not torch.equal(weights["odd.weight"], start["odd.weight"])
    # Every basis is computed on one rank and counted by all: 4 matrices, 3 refreshes.
    assert {answer["metrics"]["refreshes"] for answer in answers} == {12}


def test_a_resume_is_to_the_bit(ranks: Pools):
    arguments = {"module": JOBS, "steps": STEPS, "max_norm": 0.05}
    whole, resumed = (ranks.run(2, "train", saved=saved, **arguments)[0]["weights"] for saved in (None, 4))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_wrapped_model_is_refused(ranks: Pools):
    for sentence in ranks.run(2, "wrapped", module=JOBS):
        assert "step_in_backward with DistributedDataParallel frees no gradient" in sentence
