"""save_checkpoint and load_checkpoint of a real engine on two ranks: what they write, refuse, skip and take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ds_fira.checkpoint.manifest import MANIFEST
from ds_fira.checkpoint.tag_folder import LOCK
from ds_fira.engine.deepspeed.save_load.agreement import TagsDiffer
from tests.ranks import Pools

MODULE = "tests.distributed.save_jobs"


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "bf16")])
def test_the_same_files_as_deepspeeds(stage: int, dtype: str, ranks: Pools, tmp_path: Path) -> None:
    """One file more in the tag's folder, `latest` and everything else as DeepSpeed has it; its own still load."""
    for seen in ranks.run(2, "save_both_ways", MODULE, folder=str(tmp_path), stage=stage, dtype=dtype):
        ours = [name for name in seen["ours"] if not name.startswith("apart/")]
        assert sorted([*seen["theirs"], f"global_step1/{MANIFEST}"]) == ours
        assert seen["ours returned"] is seen["theirs returned"] is True
        assert seen["ours latest"] == seen["theirs latest"] == b"global_step1"
        assert (seen["client"], seen["steps"], seen["weights"]) == (3, 1, True)
        assert seen["path"].startswith(str(tmp_path / "ours" / "global_step1"))
        assert seen["without manifest"].startswith(str(tmp_path / "theirs" / "global_step1"))
        assert any(name.startswith("apart/") for name in seen["ours"])


def test_torn_checkpoints_are_not_taken(ranks: Pools, tmp_path: Path) -> None:
    """A cut, a changed and a missing checkpoint, and an empty `latest`: the one before is loaded, on all ranks."""
    hows = ["cut", "changed", "gone", "empty latest"]
    reasons = ["has 1000 bytes instead of", "the content of its file .* has changed", "it is missing", "it is empty"]
    answers = ranks.run(2, "load_after_harm", MODULE, folder=str(tmp_path), hows=hows)
    for rank, results in enumerate(answers):
        for how, reason, result in zip(hows, reasons, results, strict=True):
            taken = "second" if how == "empty latest" else "first"
            assert result["error"] is None, how
            assert Path(result["taken"]).parent.name == taken, how
            if rank == 0:
                [warning] = [text for text in result["warnings"] if "FiraAdam" in text]
                assert re.search(f"{reason}.*loading '{taken}' instead", warning), warning
            if how == "empty latest":
                continue
            assert re.match(rf"CheckpointError: FiraAdam: .*second: .*{reason}.*: load another tag", result["named"])
            # The model's own file is whole where it is there at all.
            assert (result["model"] is None) == (how != "gone"), how
            assert "no complete checkpoint to load" in result["none"], how
            assert result == answers[0][hows.index(how)] | {"warnings": result["warnings"]}


def test_no_checkpoint(ranks: Pools, tmp_path: Path) -> None:
    """DeepSpeed's own answer where there is none; a save that did not end is none."""
    for results in ranks.run(2, "load_nothing", MODULE, folder=str(tmp_path)):
        assert results == dict.fromkeys(("missing", "empty", "unfinished"), ((None, None), None))


def test_a_save_that_fails_on_one_rank_fails_on_all(ranks: Pools, tmp_path: Path) -> None:
    """One sentence on every rank, nothing left behind, and the training goes on."""
    answers = ranks.run(2, "fail_to_save", MODULE, folder=str(tmp_path))
    assert answers[0] == answers[1]
    results = answers[0]
    assert re.match(
        r"CheckpointError: FiraAdam: rank 0 could not save \S+model_states.pt: .*lambda", results["client"][1]
    )
    assert "reserved checkpoint key" in results["reserved"][1]
    assert "given up and earlier checkpoints are as they were" in results["client"][1]
    assert "File exists" in results["folder"][1]
    assert "rank 1 could not save checkpoint 'global_step1': MemoryError: no room" in results["state"][1]
    assert results["left"] == [LOCK, "kept", "latest", "zero_to_fp32.py", "zero_to_torch.py"]
    assert Path(results["loaded"]).parent.name == "kept"


def test_a_disk_for_each_node(ranks: Pools, tmp_path: Path) -> None:
    """With use_node_local_storage each node has a manifest and `latest`, and all load the same; without it, refused."""
    first, second = ranks.run(2, "save_on_two_nodes", MODULE, folder=str(tmp_path))
    model, optimizer = "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    assert first["files"] == sorted([MANIFEST, model, optimizer.format(0)])
    assert second["files"] == sorted([MANIFEST, model, optimizer.format(1)])
    assert first["latest"] == second["latest"] == "second"
    # The second node has lost a file of the second one.
    assert [Path(seen["loaded"]).parent.name for seen in (first, second)] == ["first", "first"]
    assert first["apart"][1] == second["apart"][1]
    assert re.search("rank 1 does not see the folder .*use_node_local_storage", first["apart"][1])


def test_other_optimizers_are_left_alone(ranks: Pools, tmp_path: Path) -> None:
    """An engine without FiraAdam saves as DeepSpeed does."""
    for names in ranks.run(2, "save_without_fira", MODULE, folder=str(tmp_path)):
        assert MANIFEST not in names
        assert len(names) == 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_alone_takes_the_weights_over(stage: int, ranks: Pools, tmp_path: Path) -> None:
    """An engine with torch's AdamW loads the module from what FiraAdam's engine saved; `zero_to_fp32` reads it."""
    for seen in ranks.run(2, "load_without_fira", MODULE, folder=str(tmp_path), stage=stage, async_save=stage > 1):
        assert len(seen) == 7 + (stage > 0)
        assert all(seen.values()), seen
        assert not [name for name in seen if name.startswith("False")]


def test_tag_validation_decides_about_different_tags(ranks: Pools, tmp_path: Path) -> None:
    """`Fail` raises what DeepSpeed does and writes nothing; `Warn` and `Ignore` save once, under rank 0's tag."""
    for result in ranks.run(2, "save_under_own_tags", MODULE, folder=str(tmp_path)):
        error, loaded, names = result["Fail"]
        assert issubclass(TagsDiffer, AssertionError)
        assert error.startswith("TagsDiffer: FiraAdam: ")
        assert "is not consistent across all ranks" in error
        assert (loaded, names) == (None, [])
        for mode in ("Warn", "Ignore"):
            error, loaded, names = result[mode]
            assert error is None
            assert Path(loaded).parent == tmp_path / mode / "rank0"
            assert names == ["latest", "rank0", "zero_to_fp32.py", "zero_to_torch.py"]
