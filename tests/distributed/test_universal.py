"""DeepSpeed's universal checkpoints: its converter reads ours unedited, and they go on as the checkpoints they were."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles
from tests.distributed.adam_jobs import adam_config
from tests.distributed.test_resize import END, OPTIONS, PARAMS, SAVED, SHAPES, canonical, job, saved, whole
from tests.distributed.universal_jobs import ALONE, UNIVERSAL, convert, damaged, inject
from tests.distributed.zero_jobs import config
from tests.grids import full_if, once
from tests.programs import run
from tests.ranks import Pools, free_port

TAG = f"global_step{SAVED}"
_converted: dict[str, Path] = {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def both(
    ranks: Pools, folders: Path, size: int, stage: int, dtype: str = "fp32", **arguments: Any
) -> tuple[Path, Path]:
    """The folder of a checkpoint, and another with nothing but the universal one that was made of it."""
    folder = saved(ranks, folders, size, stage, dtype, **arguments)
    key = str(folder)
    if key not in _converted:
        target, done = convert(folder, TAG, folders / f"of {folder.name}")
        assert done.returncode == 0, done.stderr[-2000:]
        _converted[key] = target
    return folder, _converted[key]


def load_universal(ranks: Pools, size: int, stage: int, dtype: str = "fp32", **arguments: Any) -> dict[str, Any]:
    extra = {**arguments.pop("extra", {}), **UNIVERSAL}
    return job(ranks, size, stage, dtype, extra=extra, **{"first": SAVED, "last": END, "seed": 7, **arguments})


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the bit, and all that a caller sees of a load."""
    assert (found["error"], expected["error"]) == ("", "")
    assert found["losses"] == expected["losses"]
    assert (found["lr"], found["steps"]) == (expected["lr"], expected["steps"])
    assert found["client_state"].keys() == expected["client_state"].keys()
    assert found["client_state"]["note"] == "kept"
    assert all(torch.equal(weight, found["weights"][name]) for name, weight in expected["weights"].items())


@pytest.mark.parametrize(("stage", "next_stage", "size"), once([1, 2, 3], [0, 1, 2, 3], [1, 2, 3]))
def test_it_goes_on_as_the_checkpoint_does(ranks: Pools, folders: Path, stage: int, next_stage: int, size: int) -> None:
    """Saved on two ranks: to the bit what an ordinary load gives there, and the uninterrupted run up to rounding."""
    folder, universal = both(ranks, folders, 2, stage)
    found = load_universal(ranks, size, next_stage, load=str(universal))
    assert_equal(found, job(ranks, size, next_stage, first=SAVED, last=END, load=str(folder), seed=7))
    assert found["losses"] == pytest.approx(whole(ranks)["losses"][SAVED:], rel=1e-6)


@pytest.mark.full
def test_the_command_in_a_new_interpreter(ranks: Pools, folders: Path, tmp_path: Path) -> None:
    """With as many workers as DeepSpeed starts by itself."""
    folder = saved(ranks, folders, 2, 2)
    universal, done = convert(folder, TAG, tmp_path, shell=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_universal(ranks, 3, 1, load=str(universal))
    assert_equal(found, job(ranks, 3, 1, first=SAVED, last=END, load=str(folder), seed=7))


@pytest.mark.parametrize("stage", full_if(lambda stage: stage != 3, (1, 2, 3)))
def test_every_state_is_carried_over_to_the_bit(ranks: Pools, folders: Path, tmp_path: Path, stage: int) -> None:
    """Bases, moments, limiters and counts, as an ordinary load on other ranks would save them."""
    folder, universal = both(ranks, folders, 2, stage)
    arguments = {"first": 0, "last": 0, "extra": {}}
    load_universal(ranks, 3, 2, **arguments, load=str(universal), save=str(tmp_path / "universal"))
    job(ranks, 3, 2, **arguments, load=str(folder), save=str(tmp_path / "ordinary"))
    found, expected = canonical(tmp_path / "universal"), canonical(tmp_path / "ordinary")
    assert found.keys() == expected.keys()
    assert {name for name, *kind in expected if kind[0] == "basis"}
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


IN_EVERY_RUN = ("BF16_Optimizer", "int8 states", "sub-groups")
CASES = {
    **{name: case for name, case in OPTIONS.items() if case[1] > 0},
    "sub-groups": (2, 3, 3, 3, "fp32", {"extra": {"zero_sub_group_size": 100}}),
    "stage 3 in bf16": (2, 3, 2, 3, "bf16", {}),
    "GaLoreAdam": (2, 3, 3, 1, "fp32", {"extra": {"optimizer": {"type": "GaLoreAdam"}}}),
    "ApolloAdam": (2, 3, 3, 1, "fp32", {"extra": {"optimizer": {"type": "ApolloAdam"}}}),
}


@pytest.mark.parametrize("case", full_if(lambda case: case not in IN_EVERY_RUN, CASES))
def test_with(ranks: Pools, folders: Path, case: str) -> None:
    """DeepSpeed's own list of what lies where is wrong under round robin, for AdamW too."""
    before, stage, after, new_stage, dtype, options = CASES[case]
    folder, universal = both(ranks, folders, before, stage, dtype, **options)
    found = load_universal(ranks, after, new_stage, dtype, load=str(universal), **options)
    after_load = {"first": SAVED, "last": END, "load": str(folder), "seed": 7, **options}
    assert_equal(found, job(ranks, after, new_stage, dtype, **after_load))


@pytest.mark.parametrize("stage", [2, 3])
def test_the_folder_is_deepspeeds(ranks: Pools, folders: Path, stage: int) -> None:
    """Weights and an Adam's moments are where others look for them; where there are none, nobody gets zeros."""
    folder, universal = both(ranks, folders, 2, stage)
    state = CheckpointFiles.find(folder / TAG).read()
    zero = universal / TAG / "zero"
    assert (universal / "latest_universal").read_text() == TAG
    assert {path.name for path in zero.iterdir() if path.is_dir()} >= state.weights.keys()  # buffers too
    for name, parts in state.weights.items():
        expected = torch.cat([flat[held.offset :][: held.stop - held.start] for held, flat in parts])
        assert torch.equal(read(zero / name / "fp32.pt"), expected)
        if name in state.moments:
            for key in ("exp_avg", "exp_avg_sq"):
                pieces = [
                    m.moments[key][""][held.offset :][: held.stop - held.start] for held, m in state.moments[name]
                ]
                assert torch.equal(read(zero / name / f"{key}.pt"), torch.cat(pieces))
        else:
            found = read(zero / name / "exp_avg.pt")
            assert (found.is_meta, found.numel()) == (True, expected.numel())
        if stage == 2:
            assert torch.load(zero / name / "step.pt", weights_only=True) == SAVED


def read(path: Path) -> torch.Tensor:
    content = torch.load(path, weights_only=True)
    return (content["param"] if isinstance(content, dict) else content).reshape(-1)


# What is harmed, how, at which stage it was saved; what the sentence says.
DAMAGE = {
    "a parameter": (
        "zero/layers.3.weight",
        "gone",
        2,
        "lacks zero/layers.3.weight/fp32.pt; convert the checkpoint again",
    ),
    "a weight's end": (
        "zero/layers.3.weight/fp32.pt",
        "truncated",
        2,
        "zero/layers.3.weight/fp32.pt: it cannot be read",
    ),
    "a weight's bit": ("zero/layers.3.weight/fp32.pt", "flipped", 3, "zero/layers.3.weight/fp32.pt: its content has"),
    "a moment": ("zero/norm.weight/exp_avg_sq.pt", "gone", 3, "lacks zero/norm.weight/exp_avg_sq.pt"),
    "a rank": ("ds_fira_states/0/exp_avg.01", "gone", 2, "lacks the states of ranks [1] of the 2 that saved it"),
    "all ranks": ("ds_fira_states", "gone", 2, "lacks the states of ranks [0, 1] of the 2 that saved it"),
    "the first of stage 3": (
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "gone",
        3,
        "lacks the states of ranks [0] of",
    ),
    "a rank of stage 3": ("zero_pp_rank_1_mp_rank_00_model_states.pt", "gone", 3, "lacks the states of ranks [1] of"),
    "a rank's end": ("ds_fira_states/0/exp_avg.01", "truncated", 2, "ds_fira_states/0/exp_avg.01: it cannot be read"),
    "the rest": ("zero/optimizer_state.pt", "gone", 2, "lacks zero/optimizer_state.pt"),
    "the model": ("mp_rank_00_model_states.pt", "gone", 2, "lacks mp_rank_00_model_states.pt"),
    "all weights": ("zero", "gone", 2, "is no universal checkpoint; make one with python -m deepspeed.checkpoint."),
    "the name": ("../latest_universal", "gone", 2, "latest_universal names one; make one with python -m deepspeed"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_name_on_every_rank(ranks: Pools, folders: Path, tmp_path: Path, case: str) -> None:
    name, how, stage, message = DAMAGE[case]
    universal = both(ranks, folders, 2, stage)[1]
    error = load_universal(ranks, 3, 2, load=str(damaged(universal, tmp_path, name, how)))["error"]
    assert error.startswith("FiraAdam: ")
    assert message in error


def test_files_of_an_earlier_conversion_are_not_taken(ranks: Pools, folders: Path, tmp_path: Path) -> None:
    """Of more ranks they are left alone, of another kind of stage they are refused."""
    folder, universal = both(ranks, folders, 2, 2)
    copy = shutil.copytree(universal, tmp_path / "copy")
    states = copy / TAG / "ds_fira_states" / "0"
    shutil.copy(states / "exp_avg.01", states / "exp_avg.02")
    found = load_universal(ranks, 1, 2, load=str(copy))
    assert_equal(found, job(ranks, 1, 2, first=SAVED, last=END, load=str(folder), seed=7))
    model = copy / TAG / "mp_rank_00_model_states.pt"
    shutil.copy(model, model.with_name(f"zero_pp_rank_0_{model.name}"))
    error = load_universal(ranks, 2, 2, load=str(copy))["error"]
    assert "holds what was made of two checkpoints; convert one into an empty folder" in error


def test_a_checkpoint_that_is_not_converted_is_refused(ranks: Pools, folders: Path) -> None:
    folder, _ = both(ranks, folders, 2, 2)
    error = load_universal(ranks, 2, 2, load=str(folder), load_options={"tag": TAG})["error"]
    assert f"{TAG} is no universal checkpoint; make one with python -m deepspeed.checkpoint.ds_to_universal" in error
    assert "or remove load_universal" in error


@pytest.mark.parametrize(
    ("stage", "next_stage"), [(2, 3), *(pytest.param(*way, marks=pytest.mark.full) for way in ((3, 2), (3, 0)))]
)
def test_the_weights_alone(ranks: Pools, folders: Path, stage: int, next_stage: int) -> None:
    """With another rank of the subspace, which the states would refuse."""
    options = {"load_optimizer_states": False, "load_lr_scheduler_states": False}
    universal = both(ranks, folders, 2, stage)[1]
    arguments = {"load_options": options, "params": {"rank": 3}}
    found = load_universal(ranks, 2, next_stage, load=str(universal), **arguments)
    assert found["error"] == ""
    assert found["losses"][0] == pytest.approx(whole(ranks)["losses"][SAVED], rel=1e-6)
    assert torch.equal(found["weights"]["counted"], torch.zeros(3))


@pytest.mark.parametrize("stage", full_if(lambda stage: stage != 2, (1, 2, 3)))
def test_elastic_checkpoint_saves_what_any_number_of_ranks_loads(ranks: Pools, folders: Path, stage: int) -> None:
    """DeepSpeed's own form would give every rank the first one's bases."""
    folder = saved(ranks, folders, 2, stage)
    elastic = saved(ranks, folders, 2, stage, extra={"zero_elastic_checkpoint": True})
    found, expected = canonical(elastic), canonical(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    arguments = {"first": SAVED, "last": END, "seed": 7, "extra": {"zero_elastic_checkpoint": True}}
    for size in (2, 3):
        assert_equal(
            job(ranks, size, stage, load=str(elastic), **arguments),
            job(ranks, size, stage, load=str(folder), **{**arguments, "extra": {}}),
        )


def adam(ranks: Pools, size: int, stage: int, extra: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    """A run of torch's AdamW."""
    settings = adam_config(config(stage, "fp32", PARAMS, **(extra or {})), weight_decay=0.05)
    module = "tests.distributed.adam_jobs"
    results = ranks.run(size, "adam", module=module, ds_config=settings, shapes=SHAPES, **arguments)
    assert {result["error"] for result in results} == {""}
    return results[0]


@pytest.mark.parametrize(
    ("stage", "next_stage", "size"),
    [(2, 3, 3), *(pytest.param(*way, marks=pytest.mark.full) for way in ((3, 2, 2), (1, 0, 2)))],
)
def test_one_of_adamw_goes_on_in_fira(ranks: Pools, tmp_path: Path, stage: int, next_stage: int, size: int) -> None:
    """As the checkpoint that it was made of does: the moments are projected on the first basis."""
    adam(ranks, 2, stage, first=0, last=SAVED, save=str(tmp_path / "adam"))
    inject(tmp_path / "adam", TAG)
    universal, done = convert(tmp_path / "adam", TAG, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_universal(ranks, size, next_stage, load=str(universal))
    arguments = {"first": SAVED, "last": END, "load": str(tmp_path / "adam"), "seed": 7}
    assert_equal(found, job(ranks, size, next_stage, **arguments))


@pytest.mark.parametrize(("stage", "next_stage"), [(3, 1), pytest.param(2, 3, marks=pytest.mark.full)])
def test_ours_goes_on_in_adamw(ranks: Pools, folders: Path, stage: int, next_stage: int) -> None:
    """As the checkpoint that it was made of does: with AdamW's states at zero."""
    folder, universal = both(ranks, folders, 2, stage)
    after = {"first": SAVED, "last": END, "seed": 7}
    found = adam(ranks, 2, next_stage, UNIVERSAL, load=str(universal), **after)
    expected = adam(ranks, 2, next_stage, load=str(folder), **after)
    assert (found["losses"], found["counts"]) == (expected["losses"], [END - SAVED])
    assert (found["lr"], found["client_state"].keys()) == (expected["lr"], expected["client_state"].keys())
    assert all(torch.equal(weight, found["weights"][name]) for name, weight in expected["weights"].items())


@pytest.mark.full
def test_deepspeed_alone_takes_no_moments_from_where_there_are_none(
    ranks: Pools, folders: Path, tmp_path: Path
) -> None:
    """Without this package its AdamW stops; with zeros in their place it would go on, at a step count of 3."""
    universal = both(ranks, folders, 2, 2)[1]
    done = run(["python", "-c", ALONE, str(universal), str(free_port()), repr(SHAPES)], tmp_path)
    assert done.returncode != 0
    assert "Cannot copy out of meta tensor; no data!" in done.stderr


def test_experts_are_refused_by_the_converter(ranks: Pools, tmp_path: Path) -> None:
    """Other ranks hold others under the same name, which it would take for parts of one."""
    params = {"lr": 0.01, "rank": 3, "update_proj_gap": 3}
    arguments = {"ds_config": config(2, "fp32", params), "layers": [(2, 2)], "steps": (0, 1)}
    ranks.run(2, "run", "tests.distributed.expert_jobs", **arguments, save=str(tmp_path / "moe"))
    (checkpoint,) = [path for path in (tmp_path / "moe").iterdir() if path.is_dir()]
    done = convert(tmp_path / "moe", checkpoint.name, tmp_path)[1]
    assert done.returncode != 0
    assert "the experts of a DeepSpeed MoE layer: each rank saves others under the same name" in done.stderr
