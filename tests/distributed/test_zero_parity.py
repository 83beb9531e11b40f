"""Through DeepSpeed, FiraAdam makes to the bit the steps that one process makes with the same gradients.

Split matrices do so with `exact_cuts`; `test_low_rank_exchange` is about the other way.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

import ds_fira
from ds_fira.core.norms import SUMMED_ROWS
from ds_fira.sharding.geometry import matrices_of
from ds_fira.sharding.local_matrices import LocalMatrices
from tests.distributed.zero_jobs import config
from tests.grids import full_if, half, once, widest
from tests.ranks import Pools

# 2 x (8, 6) divide by 2; 3 x (6, 9) leave a remainder; (5, 7) has an odd number of elements; (9, 4) is tall.
SHAPES = [(8, 6), (6, 9), (8, 6), (5, 7), (6, 9), (9, 4), (6, 9)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 2, "alpha": 0.5, "weight_decay": 0.1}
EXACT = {**PARAMS, "exact_cuts": True}
MATRIX_KEYS = ("step", "refresh_step", "basis", "exp_avg", "exp_avg_sq", "residual_norm", "residual_avg_sq")
MATRIX_KEYS += ("exp_avg_scale", "exp_avg_sq_scale")


def replay(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Make the steps of all ranks of a ZeRO run in one process, from the gradients they saw.

    Returns:
        By parameter name: `weight` and `state` of the single process, and `sharded`, the weight the ranks ended with.
    """
    groups, sharded = [], {}
    params: list[list[torch.nn.Parameter]] = []
    for i, group in enumerate(results[0]["groups"]):
        start = torch.cat([result["start"][i][0] for result in results])
        end = torch.cat([result["weights"][i][0] for result in results])
        members = []
        for name, shape, offset in group["members"]:
            numel = torch.Size(shape).numel()
            members.append(torch.nn.Parameter(start[offset : offset + numel].view(shape).clone()))
            sharded[name] = end[offset : offset + numel].view(shape)
        params.append(members)
        groups.append({**group["settings"], "params": members})
    optimizer = ds_fira.FiraAdam(groups)
    # `stagger` goes by the matrices' order in the module, which that of the groups is not.
    members = {
        name: param
        for i, group in enumerate(results[0]["groups"])
        for param, (name, _, _) in zip(params[i], group["members"], strict=True)
        if "rank" in group["settings"]
    }
    first = 0
    for name in (name for name in results[0]["module"] if name in members):
        whole = tuple(matrices_of(name, tuple(members[name].shape)))
        indices = tuple(range(first, first + len(whole)))
        optimizer.bind(members[name], LocalMatrices(whole, indices, batched=members[name].ndim == 3))
        first += len(whole)
    for step in range(len(results[0]["gradients"])):
        seen = [result["gradients"][step] for result in results]
        for i, group in enumerate(results[0]["groups"]):
            if i not in seen[0]:  # the engine skipped the step (fp16 overflow)
                continue
            flat = torch.cat([rank[i][0] for rank in seen])
            for param, (_, shape, offset) in zip(params[i], group["members"], strict=True):
                param.grad = flat[offset : offset + torch.Size(shape).numel()].view(shape).clone()
        if seen[0]:
            optimizer.step()
    return {
        name: {"weight": param.detach(), "state": optimizer.state[param], "sharded": sharded[name]}
        for i, group in enumerate(results[0]["groups"])
        for param, (name, _, _) in zip(params[i], group["members"], strict=True)
    }


def owned_states(results: list[dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    """The state of every projected matrix, from the rank that owns it; fails where two ranks hold one."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    projected = [i for i, group in enumerate(results[0]["groups"]) if "rank" in group["settings"]]
    for i, layout in zip(projected, results[0]["layouts"], strict=True):
        for rank, result in enumerate(results):
            state = result["state"][i][0]
            rows: dict[str, int] = defaultdict(int)
            for matrix in (*layout.unsplit[rank], *layout.gathered_by(rank)):
                mark = "" if "step" in state else f".{matrix.shape[0]}x{matrix.shape[1]}"
                assert matrix.name not in found, f"{matrix.name} has state on two ranks"
                keys = [key for key in MATRIX_KEYS if key + mark in state]
                found[matrix.name] = {key: state[key + mark][rows[mark]] for key in keys}
                rows[mark] += 1
    return found


def check(results: list[dict[str, Any]], svd: bool = True) -> None:
    """Weights and low-rank states equal to a single process's, bit for bit; the module's weights follow them."""
    states = owned_states(results)
    alone = replay(results)
    for name, parts in alone.items():
        assert torch.equal(parts["weight"], parts["sharded"]), name
        for result in results:
            assert torch.equal(result["module"][name], parts["sharded"].to(result["module"][name].dtype)), name
        if name in states:
            assert states[name].keys() == parts["state"].keys()
            for key, value in states[name].items():
                assert torch.equal(value, parts["state"][key]), (name, key)
    assert states.keys() == {name for name in alone if name.startswith("layers.")}
    assert all(int(state["step"]) > 0 for state in states.values())
    # Every basis was computed on one rank, and on no other.
    assert not svd or sum(result["decompositions"] for result in results) == results[0]["metrics"]["refreshes"]


@pytest.mark.parametrize(("dtype", "stage", "world_size"), once(["fp32", "bf16", "fp16"], [1, 2], [1, 2, 3, 4]))
def test_any_number_of_ranks(ranks: Pools, world_size: int, stage: int, dtype: str) -> None:
    """Seven matrices on 1 to 4 ranks: whole, split across two and more, and partitions without any of them."""
    results = ranks.run(
        world_size,
        "train",
        ds_config=config(stage, dtype, PARAMS if world_size == 1 else EXACT),
        shapes=SHAPES,
        steps=4,
    )
    check(results)
    # Steps with and without the limiter, or the comparison says little about it.
    assert 0 < results[0]["metrics"]["limiter_activations"] < results[0]["metrics"]["matrix_steps"]


@pytest.mark.parametrize("stage", full_if([1].__contains__, [1, 2]))
def test_nothing_cut(ranks: Pools, stage: int) -> None:
    """Matrices that divide by the ranks need no setting to be equal to the bit."""
    shapes = [(8, 6), (6, 9), (8, 6), (6, 9)]
    results = ranks.run(2, "train", ds_config=config(stage, "bf16", PARAMS), shapes=shapes, steps=4)
    assert not any(layout.split for layout in results[0]["layouts"])
    check(results)


@pytest.mark.parametrize("stage", full_if([1].__contains__, [1, 2]))
def test_steps_skipped_by_the_loss_scaler(ranks: Pools, stage: int) -> None:
    """Overflows at the first steps in fp16: DeepSpeed skips them, nothing of ours moves, and training goes on."""
    fp16 = {"initial_scale_power": 24, "hysteresis": 1}
    results = ranks.run(3, "train", ds_config=config(stage, "fp16", EXACT, fp16=fp16), shapes=SHAPES, steps=14)
    made = [len(gradients) > 0 for gradients in results[0]["gradients"]]
    assert not made[0]
    assert 3 <= sum(made) < len(made)
    check(results)
    steps = {int(state["step"]) for state in owned_states(results).values()}
    assert steps == {sum(made)}


def test_matrices_larger_than_a_block(ranks: Pools) -> None:
    """Sizes at which norms are summed in blocks, at offsets that no allocator would choose."""
    shapes = [(300, 260), (5, 7), (260, 300), (300, 260), (300, 260)]
    assert 2 * SUMMED_ROWS < 260
    results = ranks.run(
        2,
        "train",
        ds_config=config(2, "fp32", {**EXACT, "rank": 16, "lr": 0.001, "project_full_rank": True}),
        shapes=shapes,
        steps=4,
    )
    check(results)


OPTIONS: dict[str, dict[str, Any]] = {
    "round robin": {"zero_round_robin_gradients": True},
    "reduce scatter": {"zero_reduce_scatter": False},
    "all three": {
        "zero_round_robin_gradients": True,
        "zero_reduce_scatter": False,
        "zero_contiguous_gradients": False,
    },
    "overlap": {"zero_overlap_comm": True},
    "alignment": {"zero_parameter_alignment": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"gradient_clipping": 0.05},
    "offload": {"zero_offload_optimizer": {"device": "cpu"}},
}


@pytest.mark.parametrize(("stage", "name"), half([1, 2], OPTIONS))
def test_zero_options(ranks: Pools, stage: int, name: str) -> None:
    """Every option that moves gradients or parameters about, at 2 ranks with split matrices."""
    results = ranks.run(2, "train", ds_config=config(stage, "bf16", EXACT, **OPTIONS[name]), shapes=SHAPES, steps=4)
    assert any(layout.split for layout in results[0]["layouts"])
    check(results)


def test_capped_groups(ranks: Pools) -> None:
    """A cap on a group's bytes makes more groups, the same steps."""
    free = ranks.run(2, "train", ds_config=config(2, "fp32", PARAMS), shapes=SHAPES, steps=1)
    params = {**EXACT, "max_group_bytes": 4 * 9 * 6}
    results = ranks.run(2, "train", ds_config=config(2, "fp32", params), shapes=[*SHAPES, *SHAPES], steps=4)
    assert len(results[0]["groups"]) > len(free[0]["groups"])
    check(results)


def test_bf16_wrapper_of_stage_1(ranks: Pools) -> None:
    """Stage 1 in bf16 with fp32 accumulation has a wrapper of its own, which steps all groups at once."""
    ds_config = config(1, "bf16", EXACT, data_types={"grad_accum_dtype": "fp32"})
    results = ranks.run(3, "train", ds_config=ds_config, shapes=SHAPES, steps=4)
    assert results[0]["wrapper"] == "BF16_Optimizer"
    check(results)


LOW_MASTERS = {
    "bf16": {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    "bf16, offload": {"bf16": {"bf16_master_weights_and_grads": True}, "zero_offload_optimizer": {"device": "cpu"}},
    "fp16, offload": {"fp16": {"fp16_master_weights_and_grads": True}, "zero_offload_optimizer": {"device": "cpu"}},
}


@pytest.mark.parametrize("name", full_if("bf16, offload".__eq__, list(LOW_MASTERS)))
def test_master_weights_of_16_bits(ranks: Pools, name: str) -> None:
    """Master weights and gradients in bf16 or fp16: computed in float32, rounded once, split or not, offloaded too."""
    dtype = name[:4]
    results = ranks.run(3, "train", ds_config=config(2, dtype, EXACT, **LOW_MASTERS[name]), shapes=SHAPES, steps=4)
    assert results[0]["start"][0][0].dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    states = [named for group in results[0]["state"] for state in group for named in state.items()]
    assert {value.dtype for key, value in states if "exp_avg" in key} == {torch.float32}
    check(results)


@pytest.mark.parametrize("world_size", [2, 3])
def test_groups_of_the_user_s_optimizer(ranks: Pools, world_size: int) -> None:
    """An optimizer object keeps its groups, whose matrices of different shapes are split anywhere."""
    ds_config = config(2, "fp32", EXACT)
    del ds_config["optimizer"]
    results = ranks.run(world_size, "train_with_object", ds_config=ds_config, shapes=SHAPES, steps=4, settings=EXACT)
    assert [group["settings"].get("rank") for group in results[0]["groups"]] == [3, None, None]
    check(results)


@pytest.mark.parametrize(
    ("proj_type", "formulation"), half(["std", "reverse_std", "left", "right"], ["released", "paper"])
)
def test_sides(ranks: Pools, proj_type: str, formulation: str) -> None:
    """Both sides of split matrices, at a rank above some smaller sides."""
    params = {**EXACT, "rank": 6, "project_full_rank": True, "proj_type": proj_type, "formulation": formulation}
    check(ranks.run(2, "train", ds_config=config(2, "fp32", params), shapes=SHAPES, steps=4))


@pytest.mark.parametrize(
    "options",
    widest(
        [
            {"subspace": "gram", "refresh_moments": "rotate", "stagger": True},
            {"subspace": "randomized", "refresh_moments": "reset"},
            {"state_dtype": "bfloat16", "refresh_moments": "rotate"},
            {"state_dtype": "int8"},
            {"residual": "normalized", "state_dtype": "int8"},
            {"residual": "normalized", "scaling": "matrix", "limiter": "growth"},
            {"residual": "none"},
        ],
    ),
    ids=lambda options: "+".join(map(str, options.values())),
)
def test_refreshes_and_states(ranks: Pools, options: dict[str, Any]) -> None:
    """Every way to refresh and to keep states, with refreshes, at 2 ranks with split matrices."""
    results = ranks.run(2, "train", ds_config=config(2, "bf16", {**EXACT, **options}), shapes=SHAPES, steps=4)
    check(results, svd=options.get("subspace", "svd") == "svd")


def test_fewer_matrices_than_ranks(ranks: Pools) -> None:
    """One small matrix on four ranks: some partitions hold nothing of it but padding."""
    shapes = [(1, 5)]
    results = ranks.run(
        4, "train", ds_config=config(2, "fp32", {**EXACT, "rank": 1, "project_full_rank": True}), shapes=shapes, steps=4
    )
    held = [len(layout.unsplit[rank]) for layout in results[0]["layouts"] for rank in range(4)]
    sharers = {rank for layout in results[0]["layouts"] for matrix in layout.split for rank, _ in matrix.fragments}
    assert sum(held) == 0
    assert sharers == {0, 1, 2}
    check(results)


def test_experts_cut_between_ranks(ranks: Pools) -> None:
    """A 3-D tensor of experts is one matrix each, wherever the boundaries fall."""
    results = ranks.run(3, "train_experts", ds_config=config(2, "fp32", EXACT), steps=4)
    layout = results[0]["layouts"][0]
    names = {matrix.name for held in layout.unsplit for matrix in held} | {matrix.name for matrix in layout.split}
    assert names == {f"experts.weight[{e}]" for e in range(5)}
    assert layout.split
    alone = replay(results)
    assert torch.equal(alone["experts.weight"]["weight"], alone["experts.weight"]["sharded"])
