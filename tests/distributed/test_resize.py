"""Resume on another number of ranks, from one ZeRO stage to another, with other settings: the same run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fira.__main__ import main
from ds_fira.checkpoint.manifest import MANIFEST, MARK
from ds_fira.checkpoint.named_state import KEY
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles
from tests.distributed.zero_jobs import config
from tests.grids import full_if, half
from tests.ranks import Pools

SHAPES = [(8, 6)] * 5 + [(6, 12)] * 3 + [(3, 40), (40, 7)]
PARAMS = {"rank": 2, "update_proj_gap": 2, "lr": 0.01, "weight_decay": 0.05}
SAVED, END = 3, 5  # a refresh at 2, and at 4 after the resume
TOLERANCE = 1e-5
_whole: dict[str, Any] = {}
_saved: dict[Any, tuple[Path, dict[str, Any]]] = {}


def job(ranks: Pools, world_size: int, stage: int, dtype: str = "fp32", **arguments: Any) -> dict[str, Any]:
    params = {**PARAMS, **arguments.pop("params", {})}
    extra = arguments.pop("extra", {})
    arguments = {"shapes": SHAPES, "scheduler": True, **arguments}
    results = ranks.run(
        world_size,
        "run",
        module="tests.distributed.resize_jobs",
        ds_config=config(stage, dtype, params, **extra),
        **arguments,
    )
    for other in results[1:]:
        assert other["error"] == results[0]["error"]
        for name, weight in results[0].get("weights", {}).items():
            assert torch.equal(weight, other["weights"][name]), name
    return results[0]


def saved_run(
    ranks: Pools, folders: Path, world_size: int, stage: int, dtype: str = "fp32", **arguments: Any
) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint behind `SAVED` steps, and the run that wrote it and went on; made once."""
    key = repr((world_size, stage, dtype, arguments))
    if key not in _saved:
        folder = folders / str(len(_saved))
        save = {"save": str(folder), "save_at": SAVED}
        _saved[key] = folder, job(ranks, world_size, stage, dtype, first=0, last=END, **save, **arguments)
    return _saved[key]


def saved(*args: Any, **arguments: Any) -> Path:
    """The folder alone."""
    return saved_run(*args, **arguments)[0]


def whole(ranks: Pools, dtype: str = "fp32", **arguments: Any) -> dict[str, Any]:
    """The uninterrupted run."""
    key = repr((dtype, arguments))
    if key not in _whole:
        _whole[key] = job(ranks, 1, 2, dtype, first=0, last=END, **arguments)
    return _whole[key]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert found["error"] == ""
    assert found["steps"] == SAVED
    assert found["client_state"]["note"] == "kept"
    assert found["losses"] == pytest.approx(expected["losses"][SAVED:], rel=tolerance)
    assert found["lr"] == pytest.approx(expected["lr"], rel=1e-12)
    for name, weight in expected["weights"].items():
        other = found["weights"][name].float()
        difference = (other - weight.float()).norm() / weight.float().norm().clamp(min=1e-30)
        assert difference < tolerance, name


def pairs(values: range) -> list[Any]:
    """Every two of four values: in every run each with the next, and the last with the first."""
    quick = {(a, b): (b - a) % 4 == 1 for a in values for b in values}
    return [pytest.param(*two, marks=() if now else pytest.mark.full) for two, now in quick.items()]


@pytest.mark.parametrize(("before", "after"), pairs(range(1, 5)))
def test_another_number_of_ranks(ranks: Pools, folders: Path, before: int, after: int) -> None:
    folder = saved(ranks, folders, before, 2)
    found = job(ranks, after, 2, first=SAVED, last=END, load=str(folder), seed=7)
    assert_same_run(found, whole(ranks))


@pytest.mark.parametrize(("before", "after"), pairs(range(4)))
def test_another_stage(ranks: Pools, folders: Path, before: int, after: int) -> None:
    folder = saved(ranks, folders, 2, before)
    found = job(ranks, 3, after, first=SAVED, last=END, load=str(folder), seed=7)
    assert_same_run(found, whole(ranks))


BF16_WRAPPER = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
OPTIONS: dict[str, tuple[int, int, int, int, str, dict[str, Any]]] = {
    # ranks and stage before and after, dtype, the rest
    "round robin": (2, 2, 3, 2, "fp32", {"extra": {"zero_round_robin_gradients": True}}),
    "bf16": (2, 2, 3, 1, "bf16", {}),
    "bf16 to stage 0": (3, 2, 2, 0, "bf16", {}),
    "fp16": (2, 1, 3, 2, "fp16", {}),
    "fp16 from stage 0": (2, 0, 3, 2, "fp16", {}),
    "BF16_Optimizer": (2, 1, 3, 1, "bf16", {"extra": BF16_WRAPPER}),
    "from BF16_Optimizer to stage 2": (3, 1, 2, 2, "bf16", {"extra": BF16_WRAPPER}),
    "bf16 states": (2, 2, 3, 2, "fp32", {"params": {"state_dtype": "bfloat16"}}),
    "int8 states": (2, 2, 3, 2, "fp32", {"params": {"state_dtype": "int8"}}),
    "whole steps for cut matrices": (3, 2, 2, 2, "fp32", {"params": {"exact_cuts": True}}),
    "offload": (2, 2, 3, 2, "fp32", {"extra": {"zero_offload_optimizer": {"device": "cpu"}}}),
    "groups of the user's": (2, 2, 3, 2, "fp32", {"groups": True}),
    "a frozen weight": (3, 2, 2, 2, "fp32", {"frozen": "layers.2.weight"}),
    "staggered, rotated, randomized": (
        3,
        2,
        2,
        2,
        "fp32",
        {"params": {"stagger": True, "refresh_moments": "rotate", "subspace": "randomized"}},
    ),
}


# Each dtype, wrapper and stage that these have is before and after a resume in another case.
FULL = {"fp16 from stage 0", "from BF16_Optimizer to stage 2", "bf16", "bf16 states"}


@pytest.mark.parametrize("case", full_if(FULL.__contains__, OPTIONS))
def test_with(ranks: Pools, folders: Path, case: str) -> None:
    before, stage, after, new_stage, dtype, options = OPTIONS[case]
    folder, uninterrupted = saved_run(ranks, folders, before, stage, dtype, **options)
    found = job(ranks, after, new_stage, dtype, first=SAVED, last=END, load=str(folder), seed=7, **options)
    # In low precision a run on other ranks rounds otherwise, resumed or not: what that alone makes is allowed.
    tolerance = TOLERANCE
    if dtype != "fp32" or "state_dtype" in options.get("params", {}):
        tolerance = 0.02
    assert_same_run(found, uninterrupted, tolerance)


def test_low_precision_is_carried_over_to_the_bit(ranks: Pools, folders: Path) -> None:
    # Loaded and saved again without a step between.
    for dtype, params in (("bf16", {}), ("fp32", {"state_dtype": "bfloat16"})):
        first = saved(ranks, folders, 2, 2, dtype, params=params)
        second = folders / f"there-{dtype}"
        third = folders / f"back-{dtype}"
        job(ranks, 3, 2, dtype, first=0, last=0, load=str(first), save=str(second), params=params)
        job(ranks, 2, 2, dtype, first=0, last=0, load=str(second), save=str(third), params=params)
        before, after = canonical(first), canonical(third)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())


DTYPES = [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16"), ("bf16", "fp16")]


@pytest.mark.parametrize("dtypes", full_if(lambda dtypes: dtypes in DTYPES[1::2], DTYPES), ids=str)
def test_another_dtype(ranks: Pools, folders: Path, dtypes: tuple[str, str]) -> None:
    """Master weights and states go into an engine of another dtype and back to the bit, and training goes on there."""
    dtype, other = dtypes
    first = saved(ranks, folders, 2, 2, dtype)
    second, third = folders / f"{dtype}-as-{other}", folders / f"{dtype}-from-{other}"
    job(ranks, 2, 2, other, first=0, last=0, load=str(first), save=str(second))
    job(ranks, 2, 2, dtype, first=0, last=0, load=str(second), save=str(third))
    before, after = canonical(first), canonical(third)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    found = job(ranks, 3, 2, other, first=SAVED, last=END, load=str(first), seed=7)
    # From here on it is a run in another precision: its losses are near the first one's, its weights its own.
    assert (found["error"], found["steps"]) == ("", SAVED)
    assert found["lr"] == pytest.approx(whole(ranks, dtype)["lr"], rel=1e-12)
    assert found["losses"] == pytest.approx(whole(ranks, dtype)["losses"][SAVED:], rel=0.02)


def canonical(folder: Path) -> dict[Any, torch.Tensor]:
    """Every tensor of a checkpoint by what it is."""
    state = CheckpointFiles.find(folder / f"global_step{SAVED}").read()
    found: dict[Any, torch.Tensor] = {}
    for name, parts in state.matrices.items():
        for place, part in parts:
            found[name, "basis", place.basis] = part.basis
            found[name, "norm", place.basis] = part.residual_norm
            found[name, "step", place.basis] = part.step
            for moment in ("exp_avg", "exp_avg_sq"):
                found |= {(name, moment, key, place.kept): value for key, value in part.moments[moment].items()}
    for name, pieces in state.weights.items():
        found |= {
            (name, piece.start, piece.stop): flat[piece.offset :][: piece.stop - piece.start] for piece, flat in pieces
        }
    for name, pieces in state.moments.items():
        for piece, moments in pieces:
            for key, value in {**moments.moments["exp_avg"]}.items():
                found[name, "exp_avg", key, piece.start] = value[piece.offset :][: piece.stop - piece.start]
    return found


CHANGES = {"update_proj_gap": 4, "state_dtype": "bfloat16", "exact_cuts": True, "gamma": 1.5, "max_group_bytes": 200}


@pytest.mark.parametrize(("change", "world_size"), half(CHANGES, [2, 3]))
def test_a_changed_setting_is_taken_over(ranks: Pools, folders: Path, change: str, world_size: int) -> None:
    params = {change: CHANGES[change]}
    folder = saved(ranks, folders, 2, 2)
    found = job(ranks, world_size, 2, first=SAVED, last=END, load=str(folder), seed=7, params=params)
    expected = whole(ranks)
    # The step at 5 is the same whatever the gap: what was learned is there.
    tolerance = 1e-2 if change == "state_dtype" else TOLERANCE
    assert found["losses"][0] == pytest.approx(expected["losses"][SAVED], rel=tolerance)
    if change in ("exact_cuts", "max_group_bytes"):
        assert_same_run(found, expected)
    else:
        assert found["settings"].items() >= params.items()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"params": {"rank": 3}}, "rank = 3 for "),
    "proj_type": ({"params": {"proj_type": "reverse_std"}}, "proj_type = 'reverse_std' for "),
    "not projected": ({"params": {"target_modules": ["layers.0"]}}, "rank = None for "),
    "a matrix of another shape": (
        {"shapes": [*SHAPES[:-1], (40, 8)]},
        "layers.9.weight has shape (40, 8) and had (40, 7)",
    ),
    "a matrix more": ({"shapes": [*SHAPES, (8, 6)]}, "no optimizer state for layers.10.weight"),
    "a matrix less": ({"shapes": SHAPES[:-1]}, "optimizer state for layers.9.weight, which is not trained now"),
    "frozen now": ({"frozen": "layers.1.weight"}, "optimizer state for layers.1.weight, which is not trained now"),
}


@pytest.mark.parametrize(("case", "world_size"), half(REFUSED, [2, 3]))
def test_what_cannot_be_resumed_is_refused_on_every_rank(
    ranks: Pools, folders: Path, case: str, world_size: int
) -> None:
    options, message = REFUSED[case]
    folder = saved(ranks, folders, 2, 2)
    error = job(ranks, world_size, 2, first=SAVED, last=END, load=str(folder), seed=7, **options)["error"]
    assert message in error
    assert "to resume" in error or "build the model as it was" in error or "load_optimizer_states=False" in error


def test_a_missing_file_is_refused_on_every_rank(ranks: Pools, folders: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved(ranks, folders, 3, 2), tmp_path / "copy")
    (copy / f"global_step{SAVED}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    forget_manifest(copy / f"global_step{SAVED}")
    error = job(ranks, 2, 2, first=SAVED, last=END, load=str(copy))["error"]
    assert "lacks the optimizer states of ranks [1] of the 3" in error


def forget_manifest(checkpoint: Path) -> None:
    """As of a run from before there were manifests: its files say nothing of one."""
    (checkpoint / MANIFEST).unlink()
    for path in checkpoint.glob("*.pt"):
        content = torch.load(path, weights_only=False)
        del content["ds_fira"][MARK]
        torch.save(content, path)


def test_the_weights_alone_start_anew(ranks: Pools, folders: Path) -> None:
    folder = saved(ranks, folders, 3, 2)
    options = {"load_optimizer_states": False, "load_lr_scheduler_states": False}
    found = job(ranks, 2, 2, first=SAVED, last=END, load=str(folder), load_options=options, params={"rank": 3})
    assert found["losses"][0] == pytest.approx(whole(ranks)["losses"][SAVED], rel=TOLERANCE)


def test_a_state_dict_is_plain(ranks: Pools, folders: Path, tmp_path: Path) -> None:
    folder = saved(ranks, folders, 3, 2)
    files = CheckpointFiles.find(folder / f"global_step{SAVED}")
    for number in range(3):
        torch.save(files.optimizer_state(number)[1], tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert loaded[KEY]["places"]


def test_the_command_says_what_a_folder_holds(
    ranks: Pools, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(saved(ranks, folders, 3, 2), tmp_path / "copy")
    assert main(["checkpoint", str(copy), "--verify"]) == 0
    told = capsys.readouterr().out
    assert f"global_step{SAVED} (latest): complete, step {SAVED}, 3 ranks at ZeRO stage 2" in told
    assert "rank 2, proj_type std" in told
    assert main(["checkpoint", str(copy), "--tag", f"global_step{SAVED}", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert sum(entry["states"]["matrices"].values()) == len(SHAPES)
    assert f"8 x 6, right, rank 2, step {SAVED}, basis of step 2" in entry["states"]["matrices"]
    assert entry["states"]["finite"]
    (copy / f"global_step{SAVED}" / "mp_rank_00_model_states.pt").write_bytes(b"torn")
    assert main(["checkpoint", str(copy)]) == 1
    assert "not complete" in capsys.readouterr().out
    assert main(["checkpoint", str(tmp_path / "nowhere")]) == 2
