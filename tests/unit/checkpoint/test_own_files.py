"""A save touches nothing but files of checkpoints: what else lies in a folder, and tags that lead out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_fira.checkpoint import atomic_save, manifest, tag_folder
from tests.unit.checkpoint.test_tags import FILES, FOREIGN, MODEL, OPTIMIZER, add_foreign, save, where_foreign


def listing(folder: Path) -> list[str]:
    """Everything in a folder, with what files and links hold."""
    return sorted(
        f"{path.relative_to(folder)} {os.readlink(path) if path.is_symlink() else path.read_text()}"
        if path.is_symlink() or path.is_file()
        else str(path.relative_to(folder))
        for path in folder.rglob("*")
    )


@pytest.mark.parametrize("harm", [None, "torn manifest", "no manifest"])
def test_what_a_user_keeps_in_a_tags_folder_survives(harm: str | None, tmp_path: Path) -> None:
    """Files, links and folders stay through several saves, in the state in which they were."""
    save(tmp_path, "same", b"old")
    add_foreign(tmp_path / "same")
    before = {line for line in listing(tmp_path / "same") if line.partition("/")[0].partition(" ")[0] not in FILES}
    if harm == "torn manifest":
        os.truncate(tmp_path / "same" / manifest.MANIFEST, 20)
    elif harm == "no manifest":
        (tmp_path / "same" / manifest.MANIFEST).unlink()
    for mark in (b"one", b"two"):
        save(tmp_path, "same", mark)
        assert (tmp_path / "same" / MODEL).read_bytes().endswith(mark)
        assert manifest.find_fault(tmp_path / "same") is None
        kept = {line for line in before if manifest.MANIFEST not in line}
        assert kept <= set(listing(tmp_path / "same"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_files_of_the_old_checkpoint_alone_are_replaced(tmp_path: Path) -> None:
    """An old shard that the new checkpoint lacks goes; one that no manifest names stays, as DeepSpeed merges."""
    atomic_save.prepare(tmp_path, "same", "token")
    for name in (*FILES, "zero_pp_rank_1_mp_rank_00_optim_states.pt", "offloaded_tensors/rank0/a.swp"):
        path = tmp_path / ".saving-same" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    atomic_save.seal(tmp_path, "same", {}, {}, True)
    atomic_save.publish(tmp_path, "same", True)
    (tmp_path / "same" / "zero_pp_rank_7_mp_rank_00_optim_states.pt").write_text("a stranger's")
    (tmp_path / "same" / "offloaded_tensors" / "mine").write_text("mine")
    save(tmp_path, "same")
    names = {path.relative_to(tmp_path / "same").as_posix() for path in (tmp_path / "same").rglob("*")}
    foreign = {"zero_pp_rank_7_mp_rank_00_optim_states.pt", "offloaded_tensors", "offloaded_tensors/mine"}
    assert names == {*FILES, manifest.MANIFEST, *foreign}
    assert manifest.listed_files(tmp_path / "same") == {*FILES, manifest.MANIFEST}


def test_a_users_hidden_folders_stay(tmp_path: Path) -> None:
    """Names like those of unfinished saves are not enough."""
    for name in (".saving-notes", ".replaced-notes", ".saving-empty"):
        (tmp_path / name).mkdir()
    (tmp_path / ".saving-notes" / "a.txt").write_text("mine")
    (tmp_path / ".replaced-notes" / "model_states.pt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere", "one")
    (tmp_path / ".saving-link").symlink_to("elsewhere/one")
    before = listing(tmp_path)
    save(tmp_path, "one")
    save(tmp_path, "two")
    assert set(before) <= set(listing(tmp_path))
    with pytest.raises(OSError, match="something that no save has made is in the way"):
        save(tmp_path, "notes")
    assert set(before) <= set(listing(tmp_path))


def test_prune_leaves_what_no_manifest_names(tmp_path: Path) -> None:
    """The checkpoint's files go, and the folder only if nothing else is in it; torn ones do not count as kept."""
    for number in range(4):
        save(tmp_path, f"step{number}")
    add_foreign((tmp_path / "step0").rename(tmp_path / "same"))
    (tmp_path / "step3" / OPTIMIZER).unlink()
    assert atomic_save.prune(tmp_path, 1) == ["step1", "same"]
    assert where_foreign(tmp_path) == {name: ["same"] for name in FOREIGN}
    assert sorted(path.name for path in (tmp_path / "same").iterdir()) == sorted({n.split("/")[0] for n in FOREIGN})
    assert not (tmp_path / "step1").exists()
    assert manifest.find_fault(tmp_path / "step2") is None


def test_prune_spares_what_latest_leads_to(tmp_path: Path) -> None:
    """By whatever way."""
    for number in range(3):
        save(tmp_path, f"step{number}")
    (tmp_path / "link").symlink_to("step0")
    (tmp_path / "latest").write_text("link")
    assert atomic_save.prune(tmp_path, 1) == ["step1"]
    assert tag_folder.find_complete(tmp_path) == "link"


def test_a_leftover_that_cannot_be_cleared_up_stops_no_other_save(tmp_path: Path) -> None:
    """A complete save cut short, in whose place someone has put a link since."""
    save(tmp_path, "one")
    atomic_save.prepare(tmp_path, "two", "token")
    (tmp_path / ".saving-two" / MODEL).write_text("cut short")
    atomic_save.seal(tmp_path, "two", {}, {}, True)
    (tmp_path / "two").symlink_to("one")
    save(tmp_path, "three")
    assert tag_folder.find_complete(tmp_path) == "three"
    assert os.readlink(tmp_path / "two") == "one"
    assert manifest.find_fault(tmp_path / "one") is None


def test_a_folder_in_the_way_of_a_file_is_refused_in_time(tmp_path: Path) -> None:
    """Nothing is moved where a user's folder has the name of a file of the checkpoint, or a file that of a folder."""
    (tmp_path / "same" / MODEL).mkdir(parents=True)
    (tmp_path / "same" / MODEL / "mine").write_text("mine")
    before = listing(tmp_path / "same")
    with pytest.raises(OSError, match="something that is no file of a checkpoint is in the way"):
        save(tmp_path, "same")
    atomic_save.discard(tmp_path, "same")
    assert listing(tmp_path / "same") == before
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


BAD_TAGS = {
    "": "is no name of a folder",
    ".": "is no name of a folder",
    "a//b": "is no name of a folder",
    " a": "is no name of a folder",
    "..": "leaves the folder",
    "../model": "leaves the folder",
    "a/../../b": "leaves the folder",
    "/etc": "leaves the folder",
    "a\0b": "holds control characters",
    "a\nb": "holds control characters",
    "x" * 300: "is too long",
    "x/" * 2000 + "y": "is too long",
    "\udcff": "is no text in UTF-8",
    "latest": "is a name that checkpoints need",
    ".ds_fira_lock": "is a name that checkpoints need",
    "in": "leads out of the folder through a symbolic link",
    "in/side": "leads out of the folder through a symbolic link",
    "loop": None,  # loading finds that it is missing
}


@pytest.mark.parametrize("tag", BAD_TAGS, ids=lambda tag: repr(tag[:12]))
def test_tags_that_name_no_checkpoint_of_the_folder(tag: str, tmp_path: Path) -> None:
    """Neither given nor in `latest`, where the newest complete checkpoint is taken instead."""
    outside, folder = tmp_path / "outside", tmp_path / "state"
    save(outside, "side")
    save(folder, "good")
    (folder / "in").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    if BAD_TAGS[tag] is not None:
        assert BAD_TAGS[tag] in tag_folder.find_tag_fault(folder, tag)
        assert tag_folder.find_tag_fault(folder, tag, saving=True)
    (folder / "latest").write_bytes(tag.encode(errors="surrogateescape"))
    assert tag_folder.find_complete(folder) == "good"
    assert all(not os.path.isabs(name) and ".." not in name for name in tag_folder.in_order(folder, "good"))


def test_tags_that_only_a_save_refuses(tmp_path: Path) -> None:
    """A link inside the folder can be loaded, but not replaced; so can the leftover of a crash."""
    save(tmp_path, "good")
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "file").write_text("mine")
    for tag, reason in {
        "link": "is a symbolic link",
        "file": "is there, but is no folder",
        "file/a": "is there, but is no folder",
        ".saving-a": "marks of unfinished saves",
        "a/.replaced-b/c": "marks of unfinished saves",
    }.items():
        assert tag_folder.find_tag_fault(tmp_path, tag) is None
        assert reason in tag_folder.find_tag_fault(tmp_path, tag, saving=True)
    assert tag_folder.find_tag_fault(tmp_path, "runs/a", saving=True) is None
    (tmp_path / "latest").write_text("link/\n")  # as a shell completes it
    assert tag_folder.find_complete(tmp_path) == "link"
    with pytest.raises(OSError, match="a symbolic link is in the way"):
        save(tmp_path, "link")
    assert (tmp_path / "link").is_symlink()
    assert manifest.find_fault(tmp_path / "good") is None
