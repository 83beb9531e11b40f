"""DeepSpeed's MoE layers: experts are cut over the ranks that hold them, and trained as one process trains them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_fira.checkpoint.atomic_save import reseal
from tests.distributed.expert_jobs import STEPS
from tests.distributed.expert_reference import combined, given, reference
from tests.distributed.zero_jobs import config
from tests.grids import full_if
from tests.ranks import Pools

MODULE = "tests.distributed.expert_jobs"
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1}
EXPERT = "deepspeed_experts"


def check(runs: list[dict[str, Any]], params: dict[str, Any], clip: float, stage: int) -> None:
    """All ranks hold what one process has, and ranks that hold the same parameter the same bits."""
    expected = reference(runs, params, clip, stage)
    seen: dict[str, Tensor] = {}
    for run in runs:
        for name, weight in run["after"].items():
            assert (weight - expected[name]).abs().max() < 1e-6, name
            assert torch.equal(weight, seen.setdefault(name, weight)), name
    assert seen.keys() == expected.keys()
    for step in range(STEPS):
        right, found = combined(runs, step, clip, stage), given(runs, step)
        assert found.keys() == right.keys()
        assert all((found[name] - grad).abs().max() < 1e-6 for name, grad in right.items())
    assert runs[0]["listed"] == sorted(expected)


# Ranks, stage, (experts, ep_size) of every layer, further settings, clipping, the ways in which experts are cut.
CASES = {
    "alone in a group": (2, 2, [(4, 2)], {}, 0.3, []),
    "held by all, cut low-rank": (2, 1, [(3, 1)], {}, 0.3, ["low_rank"]),
    "held by all, gathered": (2, 2, [(3, 1)], {"exact_cuts": True}, 0.0, ["gathered"]),
    "both in one model, residual": (2, 2, [(2, 2), (3, 1)], {"use_residual": True}, 0.3, ["low_rank"]),
    "stage 0": (2, 0, [(4, 2), (2, 1)], {}, 0.3, []),
    "stage 0, ep_size 1": (2, 0, [(3, 1)], {}, 0.0, []),
    "an object": (2, 2, [(4, 2)], {"way": "object"}, 0.0, []),
    "four ranks, two groups of two": (4, 2, [(6, 2)], {}, 0.3, ["low_rank"]),
    "four ranks, gathered": (4, 1, [(6, 2)], {"exact_cuts": True}, 0.3, ["gathered"]),
    "four ranks, one group": (4, 2, [(4, 4), (3, 1)], {}, 0.3, ["gathered", "low_rank"]),
    "four ranks at stage 0": (4, 0, [(4, 2), (4, 4)], {}, 0.3, []),
    "four ranks at stage 0, all in one group": (4, 0, [(4, 2), (4, 4)], {"way": "object"}, 0.3, []),
}
IN_EVERY_RUN = ("held by all, gathered", "both in one model, residual", "stage 0")


@pytest.mark.parametrize("name", full_if(lambda name: name not in IN_EVERY_RUN, CASES))
def test_experts_train_as_in_one_process(ranks: Pools, name: str, tmp_path: Path) -> None:
    """Whole, cut on both ways, replicated; with refreshes, clipping and plain parameters beside them."""
    size, stage, layers, extra, clip, ways = CASES[name]
    kwargs = {key: extra[key] for key in ("use_residual", "way") if key in extra}
    params = {**PARAMS, **{key: value for key, value in extra.items() if key not in kwargs}}
    ds_config = config(stage, "fp32", params, gradient_clipping=clip)
    runs = ranks.run(size, "train", MODULE, ds_config=ds_config, layers=layers, **kwargs)
    check(runs, params, clip, stage)
    assert runs[0]["ways"] == ways
    assert runs[0]["metrics"]["matrix_steps"] == STEPS * len(runs[0]["projected"])
    assert runs[0]["metrics"]["refreshes"] == 3 * len(runs[0]["projected"])
    if not kwargs:
        found = ranks.run(size, "diagnose", MODULE, ds_config=ds_config, layers=layers, folder=str(tmp_path))[0]
        assert (found["refusals"], found["held"], found["formula"]) == ((), runs[0]["held"], runs[0]["formula"])
        assert "whose experts lie on ranks of their own" in found["notes"][0]
        assert "Native DeepSpeed MoE is not supported with ZeRO Stage 3" in found["at stage 3"][0]
    gates = [each for each in runs[0]["listed"] if ".gate." in each]
    assert len(gates) == len(layers)
    assert not set(gates) & set(runs[0]["projected"])
    count = sum(2 * experts for experts, _ in layers)
    assert sum(EXPERT in each for each in runs[0]["projected"]) == count
    if stage:
        assert {(ep_size, True) for _, ep_size in layers} <= {
            (int(each.removeprefix("ep_size_")), moe) for each, moe, _ in runs[0]["groups"] if moe
        }


def equal(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether every rank has the same weights to the bit."""
    return all(
        run["weights"].keys() == other["weights"].keys()
        and all(torch.equal(run["weights"][name], other["weights"][name]) for name in run["weights"])
        for run, other in zip(runs, others, strict=True)
    )


def difference(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """The largest between the weights of two runs, whoever holds them."""
    first, second = ({name: w for run in each for name, w in run["weights"].items()} for each in (runs, others))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# Ranks, stage, dtype, layers; the layers of the same model on other ranks or in other groups.
RESUMES = {
    "one expert a rank, cut ones": (2, 2, "fp32", [(2, 2), (3, 1)], [(2, 1), (3, 1)]),
    "stage 0": (2, 0, "fp32", [(4, 2)], [(4, 1)]),
    "stage 0 in bf16": (2, 0, "bf16", [(4, 2), (2, 1)], [(4, 1), (2, 1)]),
    "stage 1 in bf16": (2, 1, "bf16", [(4, 2)], [(4, 1)]),
    "four ranks": (4, 2, "fp32", [(6, 2), (4, 4)], [(6, 1), (4, 2)]),
}


@pytest.mark.parametrize("name", full_if(lambda name: name != "one expert a rank, cut ones", RESUMES))
def test_a_resumed_run_is_the_same(ranks: Pools, name: str, tmp_path: Path) -> None:
    """To the bit on the same ranks, also by way of other ranks and another stage; in other groups up to rounding."""
    size, stage, dtype, layers, others = RESUMES[name]

    def run(ranks_now: int, elsewhere: bool, stage_now: int, **kwargs: Any) -> list[Any]:
        # Without clipping, which goes by another norm at stage 0.
        arguments = {"ds_config": config(stage_now, dtype, PARAMS), "layers": others if elsewhere else layers}
        return ranks.run(ranks_now, "run", MODULE, **arguments, **kwargs)

    check_resumes(run, size, (stage, {0: 2, 1: 2, 2: 0}[stage]), tmp_path, 1e-5 if dtype == "fp32" else 2e-2)


def check_resumes(run: Callable[..., list[Any]], size: int, stages: tuple[int, int], path: Path, most: float) -> None:
    """A run goes on to the bit on the same ranks, and by way of half of them; on all, in other groups, nearly so.

    Args:
        run: trains on a number of ranks, in the first or in other groups, at a stage.
        size: ranks.
        stages: in the first groups and in the others.
        path: for checkpoints.
        most: by how much weights may differ where the groups do.
    """
    at, (stage, elsewhere) = 4, stages
    saved, moved = str(path / "saved"), str(path / "moved")
    whole = run(size, False, stage, steps=(0, at), save=saved)
    resumed = run(size, False, stage, steps=(at, at), load=saved)
    assert equal(resumed, whole)
    assert [each["losses"] for each in resumed] == [each["losses"][at:] for each in whole]
    assert resumed[0]["metrics"]["matrix_steps"] == whole[0]["metrics"]["matrix_steps"]
    there = run(size // 2, True, elsewhere, steps=(at, at), load=saved, save=moved)
    assert "message" not in there[0], there[0]
    regrouped = run(size, True, elsewhere, steps=(at, at), load=saved)
    assert difference(regrouped, whole) < most
    back = run(size, False, stage, steps=(at, at), load=moved)
    assert "message" not in back[0], back[0]
    assert equal(back, whole)


def test_a_lost_or_changed_expert_is_found_before_training(ranks: Pools, tmp_path: Path) -> None:
    """On every rank, by its file: one that the manifest names, or that it does not know."""
    ds_config, layers = config(2, "fp32", PARAMS), [(4, 2)]
    ranks.run(2, "run", MODULE, ds_config=ds_config, layers=layers, steps=(0, 1), save=str(tmp_path))
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    file = folder / "layer_0_expert_3_mp_rank_00_model_states.pt"
    content = file.read_bytes()

    def messages() -> set[str]:
        found = ranks.run(2, "run", MODULE, ds_config=ds_config, layers=layers, steps=(1, 1), load=str(tmp_path))
        return {each.get("message", "") for each in found}

    file.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    (changed,) = messages()
    assert file.name in changed
    file.unlink()
    (lost,) = messages()
    assert file.name in lost
    reseal(tmp_path, folder.name)  # as if it had never been there
    (lost,) = messages()
    assert f"{folder} lacks {file.name}, the weights of an expert; load another tag." in lost
    file.write_bytes(content)
    reseal(tmp_path, folder.name)
    assert messages() == {""}


def test_frozen_experts_go_on_in_adamw(ranks: Pools, tmp_path: Path) -> None:
    """Each rank's own, by the numbers that all ranks know them by."""
    ours, given = config(1, "fp32", PARAMS), {"layers": [(4, 2)], "steps": (STEPS, STEPS)}
    trained = ranks.run(2, "run", MODULE, ds_config=ours, save=str(tmp_path), frozen=0.5, **given)
    plain = {**ours, "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
    found = ranks.run(2, "run", MODULE, ds_config=plain, load=str(tmp_path), frozen=7.0, **given)
    for before, after in zip(trained, found, strict=True):
        assert "message" not in after, after["message"]
        assert all(torch.equal(weight, after["loaded"][name]) for name, weight in before["weights"].items())
    experts = {float(weight.flatten()[0]) for run in found for name, weight in run["loaded"].items() if ".up." in name}
    assert {0.5, 1.5} <= experts


@pytest.mark.parametrize("stage", full_if((2).__eq__, [0, 2]))
def test_what_is_told_of_experts_is_of_all(ranks: Pools, stage: int) -> None:
    """Recorded factors by the numbers of experts; a flipped bit of one is named on every rank, and its rank."""
    params = {**PARAMS, "record_scaling_factors": 2, "check_sync_every": 1}
    found = ranks.run(2, "tell", MODULE, ds_config=config(stage, "fp32", params), layers=[(2, 1), (2, 2)])
    experts = "layers.{}.deepspeed_moe.experts.deepspeed_experts.{}.{}.weight"
    names = {experts.format(layer, e, key) for layer in range(2) for e in range(2) for key in ("up", "down")}
    names |= {"embed.weight", "out.weight"}
    for each in found:
        assert set(each["factors"]) == names
        assert {len(steps) for steps in each["factors"].values()} == {STEPS // 2}
        assert f"no longer hold the same weights, {experts.format(0, 1, 'up')}" in each["message"]
        assert each["message"] == found[0]["message"]
        assert "layers.1" not in each["message"]


def test_what_would_train_wrongly_is_refused(ranks: Pools) -> None:
    """On every rank: what DeepSpeed would mix up, and groups that cannot be split any more."""
    for setting, frozen, groups in ranks.run(2, "refusals", MODULE, ds_config=config(2, "fp32", PARAMS)):
        assert "zero_optimization.contiguous_gradients = False is not supported with ep_size > 1" in setting
        assert "zero_optimization.stage = 2 is not supported with frozen experts and ep_size > 1" in frozen
        assert "MoE" in groups, groups
