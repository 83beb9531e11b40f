"""States that are moved between two steps: the next step finds them where they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_fira import FiraAdam


def replaced(state: dict[str, Tensor]) -> None:
    """As users move states to another device: another tensor under the same key."""
    for key, value in state.items():
        state[key] = value.clone()


@pytest.mark.parametrize("shape", [(6, 9), (2, 6, 9)], ids=str)
def test_states_under_their_keys_are_those_that_count(shape: tuple[int, ...]) -> None:
    weights = []
    for moved in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(shape))
        optimizer = FiraAdam([{"params": [param], "rank": 2}], lr=0.1, update_proj_gap=3)
        for step in range(5):
            param.grad = torch.randn(shape)
            optimizer.step()
            if moved and step == 1:
                before = {key: value.clone() for key, value in optimizer.state[param].items()}
                old = dict(optimizer.state[param])
                replaced(optimizer.state[param])
                for value in old.values():
                    value.zero_()  # what is there no longer counts
                assert all(torch.equal(optimizer.state[param][key], value) for key, value in before.items())
        weights.append(param.detach())
    assert torch.equal(*weights)
