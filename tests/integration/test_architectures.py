"""GPT-2, tied heads, Mixtral's experts and GPT-NeoX under ZeRO-2: what is projected, and the same steps as alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ds_fira
from tests import small_models
from tests.distributed.zero_jobs import config
from tests.integration.model_jobs import batches
from tests.ranks import Pools

RANK = 4
STEPS = 5
WORLD_SIZE = 2
# Refreshed at steps 1 and 4.
PARAMS = {"lr": 0.01, "rank": RANK, "update_proj_gap": 3, "alpha": 0.5, "exact_cuts": True}

MLP = ("mlp.gate", "mlp.up", "mlp.down")
LLAMA = [
    {f"model.layers.{i}.{name}_proj.weight" for name in (*(f"self_attn.{x}" for x in "qkvo"), *MLP)} for i in range(3)
]
PROJECTED = {
    "llama": LLAMA[0] | LLAMA[1],
    "llama_tied": LLAMA[0] | LLAMA[1] | LLAMA[2],
    "gpt2": {
        f"transformer.h.{i}.{name}.weight"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
    "gpt_neox": {
        f"gpt_neox.layers.{i}.{name}.weight"
        for i in range(2)
        for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    },
    "mixtral": {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(2) for x in "qkvo"}
    | {f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")},
}
TIED = {"llama_tied", "gpt2"}
HEADS = {"lm_head.weight", "embed_out.weight"}  # GPT-NeoX's second name is of earlier transformers
EMBEDDINGS = {
    "llama": "model.embed_tokens.weight",
    "llama_tied": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "gpt_neox": "gpt_neox.embed_in.weight",
    "mixtral": "model.embed_tokens.weight",
}


@pytest.fixture(scope="module", params=PROJECTED)
def trained(ranks: Pools, request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    """The model's name and what the two ranks found."""
    results = ranks.run(
        WORLD_SIZE,
        "train",
        module="tests.integration.model_jobs",
        kind=request.param,
        ds_config=config(2, "fp32", PARAMS, train_micro_batch_size_per_gpu=4),
        steps=STEPS,
    )
    return request.param, results


def matrices(name: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [shape] if len(shape) == 2 else [shape[1:]] * shape[0]


def test_what_is_projected(trained: tuple[str, list[dict[str, Any]]]) -> None:
    """By name: every linear weight and expert tensor; no head, tied or not, no embedding, no router, norm or bias."""
    kind, results = trained
    groups = results[0]["groups"]
    projected = {name for group in groups if "rank" in group["settings"] for name, _, _ in group["members"]}
    others = {name for group in groups if "rank" not in group["settings"] for name, _, _ in group["members"]}
    assert projected == PROJECTED[kind]
    assert projected | others == set(results[0]["before"])
    assert EMBEDDINGS[kind] in others
    assert len(HEADS & others) == (0 if kind in TIED else 1)
    if kind == "mixtral":
        assert {f"model.layers.{i}.mlp.gate.weight" for i in range(2)} <= others


def test_one_low_rank_state_for_every_matrix(trained: tuple[str, list[dict[str, Any]]]) -> None:
    """An expert is a matrix: over both ranks as many states as matrices, each on one rank, of the rank's size."""
    kind, results = trained
    shapes = {name: tuple(weight.shape) for name, weight in results[0]["before"].items()}
    expected = sum(len(matrices(name, shapes[name])) for name in PROJECTED[kind])
    made = [step for result in results for steps in result["steps_of_matrices"] for step in steps]
    assert len(made) == expected == results[0]["metrics"]["projected_matrices"]
    assert all(step == STEPS for step in made)
    if kind == "mixtral":
        assert expected == 2 * 4 + 2 * 2 * 3
    assert any(layout.split for layout in results[0]["layouts"]) == (kind == "llama_tied")
    for result in results:
        for basis, moments in result["low_rank_shapes"]:
            assert basis[-1] == RANK
            assert RANK in moments[1:]


def test_the_same_steps_as_one_process(trained: tuple[str, list[dict[str, Any]]]) -> None:
    """Against one process that sums the same micro-batches: within 1e-5 of the weight change; and the loss falls.

    The whole batch at once is summed in another order. On a CPU without AVX-512 the rounding of that alone moves
    Mixtral's weights by 2e-5 of their change.
    """
    kind, results = trained
    torch.manual_seed(0)
    model = getattr(small_models, kind)()
    settings = {key: value for key, value in PARAMS.items() if key not in ("rank", "lr", "exact_cuts")}
    optimizer = ds_fira.FiraAdam(ds_fira.param_groups(model, RANK, **settings), lr=PARAMS["lr"])
    of_ranks = [batches(STEPS, rank) for rank in range(WORLD_SIZE)]
    losses = []
    for tokens in zip(*of_ranks, strict=True):
        parts = [small_models.loss_of(model, part) / WORLD_SIZE for part in tokens]
        for part in parts:
            part.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sum(part.detach() for part in parts)))
    mean = [sum(values) / WORLD_SIZE for values in zip(*(result["losses"] for result in results), strict=True)]
    assert mean == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05
    alone = {name: weight.detach() for name, weight in model.named_parameters()}
    before = results[0]["before"]
    change = {name: float(torch.linalg.vector_norm(alone[name] - before[name])) for name in alone}
    assert all(change.values())
    for result in results:
        error = {name: float(torch.linalg.vector_norm(result["after"][name] - alone[name])) for name in alone}
        assert math.hypot(*error.values()) <= 1e-5 * math.hypot(*change.values())
        # A single weight may have gradients of little more than rounding, which Adam magnifies.
        assert all(error[name] <= 1e-4 * change[name] for name in alone), {n: error[n] / change[n] for n in alone}


def test_state_bytes_are_the_formula_s(trained: tuple[str, list[dict[str, Any]]]) -> None:
    """By the paper mr + 2nr + 1 for a matrix, two for any other element; then two counters each, and padding."""
    kind, results = trained
    elements = 0
    numel = {True: 0, False: 0}
    count = 0
    for name, weight in results[0]["before"].items():
        is_projected = name in PROJECTED[kind]
        numel[is_projected] += weight.numel()
        if not is_projected:
            elements += 2 * weight.numel()
            continue
        for shape in matrices(name, tuple(weight.shape)):
            m, n = sorted(shape)
            elements += m * RANK + 2 * n * RANK + 1
            count += 1
    report = results[0]["memory"]
    assert report["paper_formula_bytes"] == 4 * elements
    others = [
        size for result in results for projected, sizes in result["partitions"] if not projected for size in sizes
    ]
    padding = sum(others) - numel[False]
    assert 0 <= padding < 16 * len(others)
    counters = 8 * (2 * count + len(others))
    assert sum(report["optimizer_state_bytes"]) == 4 * elements + counters + 8 * padding
    assert report["adamw_bytes"] == 8 * (numel[True] + numel[False])
