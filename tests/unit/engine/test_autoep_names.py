"""Experts of AutoEP by the numbers that all ranks know, read from DeepSpeed's own layers without a process group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_fira.core.selection import experts_of, find_named_weights, find_projected_weights, first_element, shape_of
from ds_fira.engine.deepspeed.flat_groups import held_matrices
from ds_fira.optim.expert_groups import keys_of, note_experts
from tests.distributed.autoep_net import HIDDEN, INNER, AutoNet, autoep

layers = pytest.importorskip("deepspeed.module_inject.auto_ep_layer", reason="AutoEP came with DeepSpeed 0.19")


def replaced(rank: int, size: int) -> nn.Module:
    """A net of four experts as a rank of `size` gets it from AutoEP."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config

    torch.manual_seed(0)
    net = AutoNet([4])
    found = AutoEP(net, parse_autoep_config(autoep(size)["expert_parallel"]))
    (spec,) = found.ep_parser()
    found.replace_moe_layer(spec, size, rank)
    return net


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_s_experts_have_the_numbers_of_all(rank: int) -> None:
    net, whole = replaced(rank, 2), AutoNet([4])
    note_experts(net, "FiraAdam")
    weight = net.layers[0].experts.w2
    assert keys_of(weight) == {"moe": True, "name": "ep_size_2"}
    assert weight.shape == (2, HIDDEN, INNER)
    assert shape_of(weight) == tuple(whole.layers[0].experts.w2.shape)
    assert experts_of(weight) == range(2 * rank, 2 * rank + 2)
    assert first_element(weight) == 2 * rank * HIDDEN * INNER
    found = held_matrices("w2", weight)
    assert [matrix.name for matrix in found] == [f"w2[{2 * rank}]", f"w2[{2 * rank + 1}]"]
    assert [matrix.offset for matrix in found] == [0, HIDDEN * INNER]
    # Others are as they are.
    assert experts_of(net.out.weight) is None
    assert first_element(net.out.weight) == 0


def test_the_router_is_not_projected() -> None:
    net = replaced(0, 2)
    names = {"embed.weight", "out.weight", *(f"layers.0.experts.w{k}" for k in (1, 2, 3))}
    assert {*find_projected_weights(net).values()} == names
    assert "layers.0.router.gate.weight" not in find_named_weights(net.named_parameters()).values()
    assert {*find_projected_weights(net, ["router"]).values()} == {"layers.0.router.gate.weight"}


def test_experts_out_of_order_are_refused() -> None:
    net = replaced(0, 2)
    net.layers[0].experts.w1.ds_autoep_uc_meta["local_experts"] = [0, 2]
    with pytest.raises(ValueError, match=r"layers.0.experts.w1 holds experts \[0, 2\] of 4, which have to follow"):
        note_experts(net, "FiraAdam")


def test_the_doctor_says_what_it_plans() -> None:
    from ds_fira.engine.deepspeed.rehearsal import Rehearsal

    params = {"rank": 3, "lr": 0.01}
    content = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "FiraAdam", "params": params}}
    found = Rehearsal({**content, **autoep(2)}, AutoNet([4]), 2)
    assert not found.refusals
    assert any("expert_parallel.enabled = True replaces the model's layers" in text for text in found.said)
