"""Checkpoint folders without an engine: what is complete, what is taken, what a crash leaves at each step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fira.checkpoint import atomic_save, manifest, tag_folder
from tests.grids import full_if

FILES = {"mp_rank_00_model_states.pt": b"model" * 100, "zero_pp_rank_0_mp_rank_00_optim_states.pt": b"optimizer" * 100}
MODEL, OPTIMIZER = FILES


def save(folder: Path, tag: str, mark: bytes = b"", save_latest: bool = True, steps: int = 1) -> None:
    """Make a checkpoint as the ranks do."""
    atomic_save.prepare(folder, tag, "token")
    staging = folder / tag_folder.staging_tag(tag)
    for name, content in FILES.items():
        (staging / name).write_bytes(content + mark)
    (staging / "zero_to_fp32.py").write_text("script")
    records = {MODEL: manifest.record_file(staging / MODEL)}
    atomic_save.seal(folder, tag, records, {"world_size": 2, "global_steps": steps}, save_latest)
    atomic_save.publish(folder, tag, save_latest)


def test_a_saved_checkpoint_is_complete(tmp_path: Path) -> None:
    """Files, manifest, `latest` and DeepSpeed's script, and nothing else."""
    save(tmp_path, "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one", "zero_to_fp32.py"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted([*FILES, manifest.MANIFEST])
    assert tag_folder.read_latest(tmp_path) == "one"
    assert manifest.find_fault(tmp_path / "one") is None
    assert manifest.find_damage(tmp_path / "one") is None
    content = manifest.read_manifest(tmp_path / "one")
    assert content["world_size"] == 2
    assert content["files"][OPTIMIZER]["size"] == 900
    assert tag_folder.find_complete(tmp_path) == "one"


def change_byte(path: Path) -> None:
    """Change one byte in the middle, as a bad copy does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda one: (one / OPTIMIZER).unlink(), f"its file {OPTIMIZER} is missing"),
        (lambda one: os.truncate(one / OPTIMIZER, 17), f"its file {OPTIMIZER} has 17 bytes instead of 900"),
        (lambda one: os.truncate(one / manifest.MANIFEST, 40), f"its {manifest.MANIFEST} is damaged"),
        (lambda one: (one / manifest.MANIFEST).write_text("[]"), f"its {manifest.MANIFEST} is damaged"),
        (lambda one: one.rename(one.with_name("gone")), "it is missing"),
    ],
    ids=["missing", "cut", "manifest cut", "manifest empty", "no folder"],
)
def test_faults_are_named(harm, fault: str, tmp_path: Path) -> None:
    """What is not whole is not complete, with the reason, and the checkpoint before it is taken."""
    save(tmp_path, "zero")
    save(tmp_path, "one")
    harm(tmp_path / "one")
    assert manifest.find_fault(tmp_path / "one") == fault
    if fault != "it is missing":
        assert tag_folder.find_complete(tmp_path) == "zero"


def test_a_changed_byte_is_found_by_the_process_that_reads_the_file(tmp_path: Path) -> None:
    """Sizes do not show it; each file is read by one process of several."""
    save(tmp_path, "one")
    change_byte(tmp_path / "one" / OPTIMIZER)
    assert manifest.find_fault(tmp_path / "one") is None
    found = [manifest.find_damage(tmp_path / "one", share=share, of=2) for share in range(2)]
    assert found == [None, f"the content of its file {OPTIMIZER} has changed"]


def test_the_optimizers_files_may_be_gone_where_only_the_model_is_loaded(tmp_path: Path) -> None:
    """Deleting them is the usual way to keep a model without its training state."""
    save(tmp_path, "one")
    (tmp_path / "one" / OPTIMIZER).unlink()
    assert manifest.find_fault(tmp_path / "one", model_only=True) is None
    assert manifest.find_damage(tmp_path / "one", model_only=True) is None


def test_the_order_of_what_is_tried(tmp_path: Path) -> None:
    """What `latest` names, then the newest saved as latest, whatever the names; a save apart is not taken."""
    for tag, save_latest in [("step9", True), ("step10", True), ("best", False), ("again", True)]:
        save(tmp_path, tag, save_latest=save_latest)
    assert tag_folder.in_order(tmp_path, "again") == ["again", "step10", "step9"]
    (tmp_path / "latest").write_text("step9")  # by hand, to go back
    assert tag_folder.find_complete(tmp_path) == "step9"
    (tmp_path / "latest").unlink()
    assert tag_folder.find_complete(tmp_path) == "again"
    assert tag_folder.in_order(tmp_path, "best", only=True) == ["best"]
    assert tag_folder.in_order(tmp_path / "nowhere", None) == []


def test_deepspeeds_own_checkpoints(tmp_path: Path) -> None:
    """Without a manifest, a cut zip file and an empty one can still be seen."""
    for tag in ("old", "older"):
        (tmp_path / tag).mkdir()
        torch.save({"a": torch.ones(1000)}, tmp_path / tag / MODEL)
    os.utime(tmp_path / "older", (1, 1))
    (tmp_path / "latest").write_text("old")
    assert tag_folder.find_complete(tmp_path) == "old"
    os.truncate(tmp_path / "old" / MODEL, 2000)
    assert manifest.find_fault(tmp_path / "old") == f"its file {MODEL} is cut short"
    assert tag_folder.find_complete(tmp_path) == "older"
    os.truncate(tmp_path / "older" / MODEL, 0)
    assert tag_folder.find_complete(tmp_path) is None
    (tmp_path / "older" / MODEL).unlink()
    assert manifest.find_fault(tmp_path / "older") == "it holds no *.pt file"


def save_until(folder: Path, operation: int) -> int:
    """Save over "same" in a process that ends at an operation on files; returns 0 where it came to the end."""
    child = os.fork()  # everything is imported already
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(args[0]):
            count += 1
            if count == operation:
                os._exit(9)

    sys.addaudithook(watch)
    save(folder, "same", b"new")
    os._exit(0)


FOREIGN = ("notes.txt", "tokenizer/vocab.json", "tokenizer/empty", "link", "dangling", "empty")


def add_foreign(tag: Path) -> None:
    """What a user may keep beside a checkpoint: files, folders, empty ones, links."""
    (tag / "tokenizer" / "empty").mkdir(parents=True)
    (tag / "empty").mkdir()
    for name in ("notes.txt", "tokenizer/vocab.json"):
        (tag / name).write_text(name)
    (tag / "link").symlink_to("notes.txt")
    (tag / "dangling").symlink_to("nowhere")


def where_foreign(folder: Path) -> dict[str, list[str]]:
    """By what a user has put there, in which folders it lies."""
    hidden = ("same", ".replaced-same")
    return {name: [tag for tag in hidden if os.path.lexists(folder / tag / name)] for name in FOREIGN}


@pytest.mark.parametrize("before", full_if("no checkpoint".__eq__, ["ours", "no checkpoint"]))
def test_killed_at_every_file_operation(before: str, tmp_path: Path) -> None:
    """A save over a folder of its name, cut short anywhere, leaves the old or the new one, and all that is foreign.

    The next save brings everything to its place, and the one that was complete becomes `latest`.
    """
    seen = set()
    for operation in range(1, 200):
        folder = tmp_path / str(operation)
        if before == "ours":
            save(folder, "same", b"old")
        add_foreign(folder / "same")
        status = save_until(folder, operation)
        found = where_foreign(folder)
        assert all(found.values()), (operation, found)
        tag = tag_folder.find_complete(folder)
        if before == "ours" or tag is not None:
            assert manifest.find_damage(folder / tag) is None
            mark = (folder / tag / MODEL).read_bytes()[-3:]
            seen.add((tag, mark))
            assert status == 9 or mark == b"new"
        save(folder, "next")
        names = ["latest", "next", "same", "zero_to_fp32.py"]
        assert sorted(path.name for path in folder.iterdir()) == names, operation
        assert where_foreign(folder) == {name: ["same"] for name in FOREIGN}, operation
        ours = [*FILES, manifest.MANIFEST] if before == "ours" or tag is not None else []
        assert {path.name for path in (folder / "same").iterdir()} == {
            *ours,
            *(name.partition("/")[0] for name in FOREIGN),
        }
        if ours:
            assert manifest.find_damage(folder / "same") is None
            # What was to be loaded before the next save is not lost by it.
            assert (folder / "same" / MODEL).read_bytes()[-3:] == mark
        if status == 0:
            break
    assert status == 0
    assert operation > 20
    # The windows before, between and behind the two renames were met.
    expected = {(".saving-same", b"new"), ("same", b"new")}
    assert expected | ({("same", b"old")} if before == "ours" else set()) <= seen


def test_a_failed_publish_puts_the_old_one_back(tmp_path: Path) -> None:
    """`latest` cannot be replaced: the checkpoint of that name is the old one again."""
    save(tmp_path, "same", b"old")
    atomic_save.prepare(tmp_path, "same", "token")
    (tmp_path / ".saving-same" / MODEL).write_bytes(b"new")
    atomic_save.seal(tmp_path, "same", {}, {}, True)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()  # a file cannot replace it
    with pytest.raises(OSError, match="latest"):
        atomic_save.publish(tmp_path, "same", True)
    atomic_save.discard(tmp_path, "same")
    assert (tmp_path / "same" / MODEL).read_bytes().endswith(b"old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "same", "zero_to_fp32.py"]


def test_a_tag_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """A tag may be a path."""
    save(tmp_path, "runs/a", b"old")
    save(tmp_path, "runs/a", b"new")
    assert tag_folder.find_complete(tmp_path) == "runs/a"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]


def test_prune(tmp_path: Path) -> None:
    """The oldest go, by the order of saving; what was saved apart, and what `latest` names, stays."""
    for number in range(5):
        save(tmp_path, f"step{number}", save_latest=number != 1)
    assert atomic_save.prune(tmp_path, 2) == ["step2", "step0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step1", "step3", "step4", "zero_to_fp32.py"]
    (tmp_path / "latest").write_text("step3")
    assert atomic_save.prune(tmp_path, 1) == []


def test_no_module_of_deepspeed_is_needed() -> None:
    """The files work without torch and DeepSpeed, so that tools may use them: the reading side as one file."""
    reading = f"import runpy; runpy.run_path({manifest.__file__!r})"
    package = "import types; sys.modules['ds_fira'] = types.ModuleType('ds_fira')"
    path = str(Path(atomic_save.__file__).parents[1])
    writing = f"{package}; sys.modules['ds_fira'].__path__ = [{path!r}]; import ds_fira.checkpoint.atomic_save"
    for code in (reading, writing):
        check = "assert not {'torch', 'deepspeed'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", f"import sys; {code}; {check}"], check=True)
