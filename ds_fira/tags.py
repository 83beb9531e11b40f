"""Checkpoint folders that survive a crash: how one comes about on disk, and which of several is complete.

Only files, no collectives and no DeepSpeed: `ds_fira/zero_save.py` and `zero_choose.py` call this from ranks that own a
storage. A checkpoint `TAG` in a folder is made in this order:

1. `.saving-TAG` is filled; every file is flushed to the disk.
2. Its manifest is written last: the size and the CRC-32 of every file. From here on it is complete.
3. A checkpoint that is there under the same name moves aside to `.replaced-TAG`; `.saving-TAG` becomes `TAG`.
4. `latest` is replaced by a new file that names `TAG`, and `.replaced-TAG` is removed.

So at every instant the checkpoint that `latest` names exists and is complete, under one of its three names. Sizes alone
would show what a kill or a full disk leaves; the CRC-32 is for what copies and disks do: `torch.load` does not see a
changed byte. It costs one read of the file, about 1.6 GB/s a process, usually from the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_fira.manifest import (
    LATEST,
    MANIFEST,
    REPLACED,
    STAGING,
    Record,
    beside,
    find_complete,
    find_damage,
    find_fault,
    in_order,
    is_leftover,
    manifests,
    read_latest,
    read_manifest,
    record_file,
)

__all__ = [
    "LATEST",
    "MANIFEST",
    "CheckpointError",
    "Record",
    "discard",
    "find_complete",
    "find_damage",
    "find_fault",
    "in_order",
    "is_leftover",
    "prepare",
    "prune",
    "publish",
    "read_latest",
    "read_manifest",
    "record_file",
    "seal",
    "staging_tag",
    "sync_directory",
    "token_of",
]

_TOKEN = ".ds_fira_token"
_NEW_LATEST = ".latest-saving"


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, or none that is complete can be loaded; every rank raises the same."""


def staging_tag(tag: str) -> str:
    """The tag under which a checkpoint is written: hidden, so that no pattern for checkpoints finds it."""
    return beside(tag, STAGING)


def prepare(folder: Path, tag: str, token: str) -> None:
    """Make the empty staging folder of a tag, after clearing up what killed runs left behind.

    Args:
        folder: of all checkpoints; made where it is missing.
        tag: of the new one.
        token: written into the staging folder, by which other processes see that they share this storage.

    Raises:
        OSError: the disk is full, or a folder cannot be written.
    """
    staging = folder / staging_tag(tag)
    staging.parent.mkdir(parents=True, exist_ok=True)
    for parent in {folder, staging.parent}:
        _clear_up(parent)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    (staging / _TOKEN).write_text(token)


def _clear_up(folder: Path) -> None:
    """Remove unfinished saves; one that was cut short between its two renames is put in place instead."""
    for prefix in (STAGING, REPLACED):
        for left in sorted(folder.glob(f"{prefix}*")):
            final = folder / left.name.removeprefix(prefix)
            if not final.exists() and find_fault(left) is None:
                left.rename(final)
            else:
                shutil.rmtree(left, ignore_errors=True)


def token_of(folder: Path, tag: str) -> str:
    """The token that `prepare` wrote; raises `OSError` where this process does not see it."""
    return (folder / staging_tag(tag) / _TOKEN).read_text()


def seal(folder: Path, tag: str, records: Mapping[str, Record], details: Mapping[str, Any], save_latest: bool) -> None:
    """Write the manifest of a filled staging folder, and prepare the new `latest` beside it.

    Args:
        folder: of all checkpoints.
        tag: of the new one.
        records: of the files that processes have flushed, by name; other files are recorded here.
        details: kept in the manifest, such as the number of ranks.
        save_latest: whether `latest` is to name it.

    Raises:
        OSError: the disk is full, or a file of `records` is not there as it was written.
    """
    staging = folder / staging_tag(tag)
    (staging / _TOKEN).unlink()
    for script in staging.glob("*.py"):  # of DeepSpeed, for the folder of all checkpoints
        script.replace(folder / script.name)
    present = {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}
    for name, record in records.items():
        if name not in present or present[name].stat().st_size != record["size"]:
            raise FileNotFoundError(errno.ENOENT, "not found as it was written", str(staging / name))
    files = {name: records.get(name) or record_file(path) for name, path in sorted(present.items())}
    serial = 1 + max((content.get("serial", 0) for _, content in manifests(folder)), default=0)
    content = {"format": 1, "serial": serial, "save_latest": save_latest, **details, "files": files}
    _write(staging / MANIFEST, json.dumps(content, indent=1))
    for path in {staging, *(file.parent for file in present.values())}:
        sync_directory(path)
    if save_latest:
        # Here, where a full disk can still be told without having moved anything.
        _write(folder / _NEW_LATEST, tag)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush the names in a folder to the disk, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def publish(folder: Path, tag: str, save_latest: bool) -> None:
    """Give a sealed staging folder its name, then let `latest` name it.

    Raises:
        OSError: a rename failed; the checkpoint that was there before is there again.
    """
    staging, final, aside = folder / staging_tag(tag), folder / tag, folder / beside(tag, REPLACED)
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in ((final, aside), (staging, final)):
            if source.exists():
                source.rename(target)
                done.append((source, target))
        sync_directory(final.parent)
        if save_latest:
            (folder / _NEW_LATEST).replace(folder / LATEST)
            sync_directory(folder)
    except OSError:
        for source, target in reversed(done):
            with contextlib.suppress(OSError):
                target.rename(source)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def discard(folder: Path, tag: str) -> None:
    """Remove the staging folder of a tag, as far as it can be removed."""
    shutil.rmtree(folder / staging_tag(tag), ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / _NEW_LATEST).unlink()


def prune(folder: str | os.PathLike[str], keep: int) -> list[str]:
    """Delete the oldest complete checkpoints but `keep`, never the one that `latest` names; for one process.

    Returns:
        The deleted tags. Only checkpoints with a manifest that were saved as latest are counted and deleted.
    """
    path = Path(folder)
    listed = [(content.get("serial", 0), name) for name, content in manifests(path) if content.get("save_latest")]
    names = [name for _, name in sorted(listed, reverse=True) if not is_leftover(name)]
    old = [name for name in names[max(keep, 1) :] if name != read_latest(path)]
    for name in old:
        # Hidden first: what a kill leaves of it must not look like a checkpoint.
        (path / name).rename(path / beside(name, REPLACED))
        shutil.rmtree(path / beside(name, REPLACED), ignore_errors=True)
    return old
