"""Saves that were complete when their run was killed, but that `latest` does not name yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_fira.checkpoint import atomic_save, manifest, tag_folder
from tests.unit.checkpoint.test_tags import FILES, MODEL, save


def save_cut_short(folder: Path, tag: str, save_latest: bool = True) -> None:
    """A save that is complete when its run is killed, before any rename."""
    atomic_save.prepare(folder, tag, "token")
    for name, content in FILES.items():
        (folder / tag_folder.staging_tag(tag) / name).write_bytes(content + b"cut short")
    atomic_save.seal(folder, tag, {}, {}, save_latest)


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("tag", ["one", "two", "runs/two"])
def test_a_complete_save_that_was_killed_before_latest_moved(tag: str, renamed: bool, tmp_path: Path) -> None:
    """It is the one to load, at once and behind the next save's clearing up, which also moves `latest`."""
    save(tmp_path, "one")
    save_cut_short(tmp_path, tag)
    if renamed:
        if tag == "one":
            (tmp_path / "one").rename(tmp_path / ".replaced-one")
        (tmp_path / tag_folder.staging_tag(tag)).rename(tmp_path / tag)
    assert tag_folder.read_latest(tmp_path) == "one"
    found = tag_folder.find_complete(tmp_path)
    assert found == (tag if renamed else tag_folder.staging_tag(tag))
    assert tag_folder.in_order(tmp_path, tag, only=True)[0] == found
    atomic_save.prepare(tmp_path, "three", "token")
    assert tag_folder.read_latest(tmp_path) == tag_folder.find_complete(tmp_path) == tag
    assert (tmp_path / tag / MODEL).read_bytes().endswith(b"cut short")
    atomic_save.discard(tmp_path, "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"latest", "one", tag.split("/")[0], "zero_to_fp32.py"}
    )


@pytest.mark.parametrize("how", ["latest by hand", "not as latest"])
def test_a_save_cut_short_does_not_count_against_the_user(how: str, tmp_path: Path) -> None:
    """Whoever edits `latest` is obeyed, and so is `save_latest=False`; going back to what was there is going back."""
    for tag in ("one", "two", "three"):
        save(tmp_path, tag)
    assert tag_folder.find_complete(tmp_path) == "three"
    (tmp_path / "latest").write_text("two")
    assert tag_folder.find_complete(tmp_path) == "two"  # although "three" was saved while `latest` named "two"
    save_cut_short(tmp_path, "four", save_latest=how == "latest by hand")
    if how == "latest by hand":
        assert tag_folder.find_complete(tmp_path) == ".saving-four"
        (tmp_path / "latest").write_text("one")
    expected = "one" if how == "latest by hand" else "two"
    assert tag_folder.find_complete(tmp_path) == expected
    atomic_save.prepare(tmp_path, "five", "token")
    assert tag_folder.find_complete(tmp_path) == tag_folder.read_latest(tmp_path) == expected
    assert manifest.find_fault(tmp_path / "four") is None


def test_an_unfinished_save_over_a_tag_does_not_bring_the_old_one_back(tmp_path: Path) -> None:
    """`.latest-saving` names it, but what it belongs to was not complete."""
    save(tmp_path, "one")
    save(tmp_path, "two")  # while `latest` named "one"
    (tmp_path / "latest").write_text("one")
    save_cut_short(tmp_path, "two")
    (tmp_path / ".saving-two" / manifest.MANIFEST).unlink()
    (tmp_path / ".saving-two" / ".ds_fira_token").write_text("token")
    assert (tmp_path / ".latest-saving").read_text() == "two"
    assert tag_folder.find_complete(tmp_path) == "one"
    atomic_save.prepare(tmp_path, "three", "token")
    assert tag_folder.find_complete(tmp_path) == "one"
