"""The manifest: its own checksum, what of it is refused, format 1 of version 0.1.0, and one that was taken away."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fira.checkpoint import atomic_save, manifest, tag_folder
from tests.unit.checkpoint.test_tags import FILES, MODEL, OPTIMIZER, save

DAMAGED = f"its {manifest.MANIFEST} is damaged"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """The folder of a checkpoint."""
    save(tmp_path, "one")
    return tmp_path / "one"


def rewrite(one: Path, change: Any = None, **entries: Any) -> None:
    """Another manifest, without a new checksum."""
    content = json.loads((one / manifest.MANIFEST).read_text())
    content.update(entries)
    if change is not None:
        change(content)
    (one / manifest.MANIFEST).write_text(json.dumps(content, indent=1))


def as_format_1(one: Path, **entries: Any) -> None:
    """The manifest as version 0.1.0 wrote it."""
    content = json.loads((one / manifest.MANIFEST).read_text())
    for key in ("sha256", "latest_was", "save_id"):
        del content[key]
    (one / manifest.MANIFEST).write_text(json.dumps({**content, "format": 1, **entries}, indent=1))


def test_it_is_plain_json(one: Path) -> None:
    """Other programs read it."""
    content = json.loads((one / manifest.MANIFEST).read_text())
    keys = {"format", "serial", "save_latest", "latest_was", "save_id", "world_size", "global_steps", "files", "sha256"}
    assert set(content) == keys
    assert content["format"] == 2


def test_every_changed_byte_is_noticed(one: Path) -> None:
    """At every place, with a changed bit and a random byte; cut anywhere; with anything behind it."""
    whole = (one / manifest.MANIFEST).read_bytes()
    chance = random.Random(0)
    changed = [whole[:i] + bytes([whole[i] ^ 1 << chance.randrange(8)]) + whole[i + 1 :] for i in range(len(whole))]
    changed += [whole[:i] + bytes([chance.randrange(256)]) + whole[i + 1 :] for i in range(len(whole))]
    changed += [whole[:i] for i in range(len(whole))]
    changed += [whole + b"\n", b" " + whole, whole.replace(b"\n", b"\r\n"), whole.replace(b" ", b"  ", 1), whole * 2]
    for content in changed:
        if content == whole:
            continue
        (one / manifest.MANIFEST).write_bytes(content)
        fault = manifest.find_fault(one)
        assert fault is not None, content
        assert fault == DAMAGED or "update ds_fira" in fault  # where the changed byte is the format's
    (one / manifest.MANIFEST).write_bytes(whole)
    assert manifest.find_fault(one) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "2", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\xff"])
def test_what_is_no_manifest(text: str, one: Path) -> None:
    """Whatever reading it raises becomes the same fault."""
    (one / manifest.MANIFEST).write_bytes(text.encode("latin-1"))
    assert manifest.find_fault(one) == manifest.find_damage(one) == DAMAGED
    assert tag_folder.find_complete(one.parent) is None
    assert list(tag_folder.manifests(one.parent)) == []


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "entries",
    [
        {"serial": "7"},
        {"serial": -1},
        {"serial": 10**400},
        {"serial": True},
        {"serial": 1.5},
        {"serial": float("nan")},
        {"files": {}},
        {"files": []},
        {"files": {MODEL: None}},
        {"files": {MODEL: {"size": "500", "crc32": 1}}},
        {"files": {MODEL: {"size": 500}}},
        {"files": {OPTIMIZER: {"size": 900, "crc32": 1}}},
        {"files": {"../" + MODEL: {"size": 500, "crc32": 1}}},
        {"files": {"/" + MODEL: {"size": 500, "crc32": 1}}},
        {"files": {MODEL: {"size": 500, "crc32": 1}, "a//b": {"size": 500, "crc32": 1}}},
        {"save_latest": "yes"},
        {"format": 0},
        {"format": "2"},
        {"format": None},
    ],
    ids=lambda entries: str(entries)[:60],
)
def test_entries_that_cannot_be(entries: dict[str, Any], version: int, one: Path) -> None:
    """Such a manifest is damaged, also where its checksum fits; the checkpoint before it is taken."""
    save(one.parent, "two")
    two = one.with_name("two")
    if version == 1:
        as_format_1(two, **entries)
    else:
        content = json.loads((two / manifest.MANIFEST).read_text()) | entries
        (two / manifest.MANIFEST).write_bytes(manifest.render(content))
    assert manifest.find_fault(two) == DAMAGED
    assert tag_folder.find_complete(one.parent) == "one"
    save(one.parent, "three")
    assert manifest.read_manifest(one.with_name("three"))["serial"] == 2


def test_an_unknown_format_is_refused(one: Path) -> None:
    """With the remedy."""
    rewrite(one, format=99)
    fault = f"its {manifest.MANIFEST} has format 99, and this version of ds_fira knows 2 at most: update ds_fira"
    assert manifest.find_fault(one) == fault


def test_format_1_is_complete_without_a_checksum(one: Path) -> None:
    """As version 0.1.0 wrote it; the files' checksums are compared as ever."""
    as_format_1(one)
    assert manifest.find_fault(one) is None
    assert manifest.find_damage(one) is None
    assert tag_folder.find_complete(one.parent) == "one"
    os.truncate(one / OPTIMIZER, 17)
    assert "has 17 bytes" in manifest.find_fault(one)


@pytest.mark.parametrize("how", ["removed", "older", "a folder", "a link that leads nowhere"])
def test_a_manifest_that_was_taken_away_is_missed(how: str, one: Path) -> None:
    """The files say that there is one of format 2; `reseal` is for who changed them on purpose."""
    torch.save({"module": {}, "ds_fira": {manifest.MARK: manifest.FORMAT}}, one / MODEL)
    atomic_save.reseal(one.parent, "one")
    assert manifest.find_fault(one) is None
    assert manifest.find_damage(one) is None
    if how == "older":
        as_format_1(one)
    else:
        (one / manifest.MANIFEST).unlink()
    if how == "a folder":
        (one / manifest.MANIFEST).mkdir()
    elif how == "a link that leads nowhere":
        (one / manifest.MANIFEST).symlink_to("nowhere")
    fault = manifest.find_fault(one)
    assert manifest.MANIFEST in fault
    assert {"removed": "is missing", "older": "replaced by one of format 1"}.get(how, "is ") in fault
    assert tag_folder.find_complete(one.parent) is None
    torch.save({"module": {}}, one / MODEL)
    if how == "removed":  # as DeepSpeed alone writes it
        for name in FILES:
            torch.save({}, one / name)
        assert manifest.find_fault(one) is None


def test_files_replaced_by_something_else(one: Path) -> None:
    """By a folder, by links that lead nowhere or round."""
    content = (one / MODEL).read_bytes()
    (one / MODEL).unlink()
    for harm in (
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.name),
    ):
        harm(one / MODEL)
        assert manifest.find_fault(one) == f"its file {MODEL} is missing"
        (one / MODEL).unlink() if (one / MODEL).is_symlink() else (one / MODEL).rmdir()
    (one.parent / "elsewhere").write_bytes(content)
    (one / MODEL).symlink_to("../elsewhere")
    assert manifest.find_fault(one) is manifest.find_damage(one) is None


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda path: path.write_text(""), "it is empty"),
        (lambda path: path.write_bytes(b"on\xe5"), "it holds no text"),
        (lambda path: path.write_bytes(bytes(range(256))), "it holds no text"),
        (lambda path: path.write_text("x" * 5000), "(5000 characters), which is too long for the name of a folder"),
        (lambda path: path.write_text("../one"), "it names '../one', which leaves the folder"),
        (lambda path: path.mkdir(), "it is no file"),
        (lambda path: path.symlink_to("latest"), "it cannot be read: Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "it is a link that leads nowhere"),
    ],
)
def test_latest_that_names_nothing(harm: Any, fault: str, one: Path) -> None:
    """It is told why, and the newest complete checkpoint is taken."""
    save(one.parent, "two")
    (one.parent / "latest").unlink()
    harm(one.parent / "latest")
    name, found = tag_folder.look_up_latest(one.parent)
    assert name is None
    assert found.endswith(fault)
    assert len(found) < 300
    assert tag_folder.read_latest(one.parent) is None
    assert tag_folder.find_complete(one.parent) == "two"
