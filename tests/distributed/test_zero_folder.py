"""Folders of checkpoints that hold other things or that others use, through a real engine on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

from ds_fira.checkpoint.manifest import MANIFEST
from tests.ranks import Pools

MODULE = "tests.distributed.folder_jobs"


def test_what_else_lies_in_a_folder_stays(ranks: Pools, tmp_path: Path) -> None:
    """A tokenizer beside a checkpoint that is saved again; strangers' shards and models are not loaded."""
    for stage in (2, 3):
        folder = tmp_path / str(stage)
        answers = ranks.run(2, "save_among_strangers", MODULE, folder=str(folder), stage=stage)
        for seen in answers:
            assert seen["loaded"] == [[True, None]] * 3
        assert (folder / "one" / "tokenizer" / "vocab.json").read_text() == "mine"
        assert (folder / "one" / "zero_pp_rank_0_mp_rank_07_model_states.pt").exists()
        assert not list(folder.glob(".*"))


def test_bad_tags_are_refused_on_every_rank(ranks: Pools, tmp_path: Path) -> None:
    """With one sentence, and nothing is touched, neither outside nor inside."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").write_text("mine")
    given = ["../outside", str(tmp_path / "outside"), "out", "", "latest", "x" * 5000, "a\0b", ".saving-a", "in"]
    answers = ranks.run(2, "save_under_bad_tags", MODULE, folder=str(tmp_path / "state"), given=given)
    assert answers[0] == answers[1]
    for tag, (saved, loaded) in zip(given, answers[0]["errors"], strict=True):
        assert saved.startswith("CheckpointError: FiraAdam: rank 0 cannot save under tag "), tag
        assert saved.endswith(f"inside {tmp_path / 'state'}, such as 'global_step1'.")
        if tag not in (".saving-a", "in"):
            assert loaded.startswith("CheckpointError: FiraAdam: nothing can be loaded under tag "), tag
        assert "\n" not in saved
        assert len(saved) < 600
    assert answers[0]["errors"][-1][1] is None  # a link to another checkpoint can be loaded
    assert answers[0]["loaded"] == str(tmp_path / "state" / "good")
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["mine"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir() if path.suffix != ".py") == [
        *("good", "in", "latest", "out")
    ]


def test_a_second_run_in_the_folder_is_refused_on_every_rank(ranks: Pools, tmp_path: Path) -> None:
    """While the first one lives, with who it is; its unfinished save stays, and loading needs no lock."""
    for seen in ranks.run(2, "save_beside_another_run", MODULE, folder=str(tmp_path)):
        pattern = (
            r"CheckpointError: FiraAdam: rank 0 could not save 'two' because another run \(process \d+, on \S+, since "
            r"\S+\) saves into \S+: end one of the two, or give save_checkpoint another folder\.$"
        )
        assert re.match(pattern, seen["refused"]), seen["refused"]
        assert seen["staging"]
        assert seen["loaded"].startswith(str(tmp_path / "one"))
        assert seen["alone again"] is None
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py") == ["latest", "one", "two"]


def test_what_could_not_be_verified_is_said_once(ranks: Pools, tmp_path: Path) -> None:
    """A manifest of version 0.1.0 has no checksum, a checkpoint of DeepSpeed alone has none."""
    first, second = ranks.run(2, "load_without_checksum", MODULE, folder=str(tmp_path))
    assert first["loaded"] == second["loaded"] == ["old", "old", "plain", "plain"]
    said = [text for text in first["warnings"] if "next save writes one of format 2" in text]
    assert len(said) == 2
    assert f"a {MANIFEST} of format 1, which has no checksum of itself" in said[0]
    assert f"no {MANIFEST}, so that nothing of it could be verified" in said[1]
    assert second["warnings"] == []


def test_nodes_have_to_hold_the_same_save(ranks: Pools, tmp_path: Path) -> None:
    """Parts of two saves under one tag are no checkpoint; a node that a crash left behind finds its own."""
    first, second = ranks.run(2, "load_from_two_nodes", MODULE, folder=str(tmp_path))
    assert first["mixed"] == second["mixed"]
    assert "its parts on the nodes are of different saves" in first["mixed"]
    assert [Path(seen["fallen back"]).parent.name for seen in (first, second)] == ["before", "before"]
    assert [Path(seen["behind"]).parent.name for seen in (first, second)] == ["same", ".saving-same"]
