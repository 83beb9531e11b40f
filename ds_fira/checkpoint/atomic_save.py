"""Make checkpoint folders on disk that survive a crash, and leave everything else that lies in them alone.

Only files, no collectives and no engine: the ranks of a run that own a storage call this. `manifest.py` says whether a
checkpoint is complete, and `tag_folder.py` which of several is loaded. A checkpoint `TAG` in a folder is made in this
order:

1. `.saving-TAG` is filled; every file is flushed to the disk.
2. `.latest-saving` is written, which names `TAG`, then the manifest: the size and the CRC-32 of every file, and a
   checksum of itself. From here on the checkpoint is complete.
3. A folder that is there under the same name moves aside to `.replaced-TAG`; `.saving-TAG` becomes `TAG`.
4. `.latest-saving` becomes `latest`.
5. From `.replaced-TAG` the files of the old checkpoint are removed. What else was there moves into `TAG`.

So at every instant the checkpoint that `latest` names exists and is complete, under one of its three names. The next
save completes what a kill has cut short behind step 2, and removes what it has cut short before. Sizes alone would show
what a kill or a full disk leaves; the CRC-32 is for what copies and disks do: `torch.load` does not see a changed byte.
It costs one read of the file, about 1.6 GB/s a process, usually from the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ds_fira.checkpoint import manifest, own_files
from ds_fira.checkpoint.manifest import REPLACED, STAGING, TOKEN, Record
from ds_fira.checkpoint.tag_folder import (
    LATEST,
    NEW_LATEST,
    beside,
    find_interrupted,
    manifests,
    read_latest,
    staging_tag,
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, or none that is complete can be loaded; every rank raises the same."""


def prepare(folder: Path, tag: str, token: str) -> None:
    """Make the empty staging folder of a tag, after clearing up what killed runs left behind.

    Args:
        folder: of all checkpoints; made where it is missing.
        tag: of the new one.
        token: written into the staging folder, by which other processes see that they share this storage.

    Raises:
        OSError: the disk is full, a folder cannot be written, or one that no save has made is in the way.
    """
    staging = folder / staging_tag(tag)
    staging.parent.mkdir(parents=True, exist_ok=True)
    interrupted = find_interrupted(folder)
    for parent in {folder, staging.parent, (folder / (interrupted or tag)).parent}:
        _clear_up(folder, parent)
    _clear_up_latest(folder)
    for path in (staging, folder / beside(tag, REPLACED)):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "something that no save has made is in the way", str(path))
    # With its token from the first instant on: nothing without one is ever taken for ours.
    new = staging.with_name(own_files.SCRATCH + token)
    new.mkdir()
    (new / TOKEN).write_text(token)
    new.rename(staging)


def _clear_up(folder: Path, parent: Path) -> None:
    """Complete the saves in `parent` that were cut short when complete, and remove the others."""
    for left in sorted(parent.glob(f"{own_files.SCRATCH}*")):
        shutil.rmtree(left, ignore_errors=True)
    for prefix, clear_up in ((STAGING, _clear_up_unfinished), (REPLACED, _clear_up_replaced)):
        for left in filter(own_files.is_ours, sorted(parent.glob(f"{prefix}*"))):
            with contextlib.suppress(OSError):  # what cannot be cleared up is in the way of its own tag only
                clear_up(folder, left, left.with_name(left.name.removeprefix(prefix)))


def _clear_up_replaced(_: Path, left: Path, final: Path) -> None:
    if not os.path.lexists(final) and manifest.own_names(left) and manifest.find_fault(left) is None:
        left.rename(final)
    elif not final.is_symlink():
        own_files.hand_over(left, final)


def _clear_up_unfinished(folder: Path, left: Path, final: Path) -> None:
    tag = final.relative_to(folder).as_posix()
    moves_latest = find_interrupted(folder) == staging_tag(tag)
    if manifest.find_fault(left) is None and (moves_latest or not os.path.lexists(final)):
        publish(folder, tag, moves_latest)
        return
    named = None
    with contextlib.suppress(OSError, ValueError):
        named = (folder / NEW_LATEST).read_text()
    if named == tag:
        (folder / NEW_LATEST).unlink(missing_ok=True)  # before the save it belongs to is gone
    own_files.remove(left)
    if final.is_dir():
        own_files.unclaim(final)


def _clear_up_latest(folder: Path) -> None:
    """Let `latest` name a save that had its name already when it was cut short."""
    interrupted = find_interrupted(folder)
    if interrupted is not None and not manifest.is_leftover(interrupted):
        (folder / NEW_LATEST).replace(folder / LATEST)
    (folder / NEW_LATEST).unlink(missing_ok=True)


def token_of(folder: Path, tag: str) -> str:
    """The token that `prepare` wrote; raises `OSError` where this process does not see it."""
    return (folder / staging_tag(tag) / TOKEN).read_text()


def seal(
    folder: Path, tag: str, records: Mapping[str, Record], details: Mapping[str, object], save_latest: bool
) -> None:
    """Write the manifest of a filled staging folder, and prepare the new `latest` beside it.

    Args:
        folder: of all checkpoints.
        tag: of the new one.
        records: of the files that processes have flushed, by name; other files are recorded here.
        details: kept in the manifest, such as the number of ranks, and `save_id`, which tells this save from others.
        save_latest: whether `latest` is to name it.

    Raises:
        OSError: the disk is full, a file of `records` is not there as it was written, or a folder of the user's has the
            name of a file of the checkpoint.
    """
    staging = folder / staging_tag(tag)
    for script in staging.glob("*.py"):  # of DeepSpeed, for the folder of all checkpoints
        script.replace(folder / script.name)
    own_files.refuse_collisions(staging, folder / tag)
    others = [content for parent in {folder, staging.parent} for _, content in manifests(parent)]
    serial = 1 + max((content.get("serial", 0) for content in others), default=0)
    if save_latest:
        # Here, where a full disk can still be told without having moved anything, and before the checkpoint is
        # complete: from then on it counts.
        manifest.write_file(folder / NEW_LATEST, tag.encode())
    details = {"save_latest": save_latest, "latest_was": read_latest(folder), "save_id": "", **details}
    manifest.write_manifest(staging, serial, details, records)
    (staging / TOKEN).unlink()


def publish(folder: Path, tag: str, save_latest: bool) -> None:
    """Give a sealed staging folder its name, then let `latest` name it.

    Raises:
        OSError: a rename failed; the checkpoint that was there before is there again.
    """
    staging, final, aside = folder / staging_tag(tag), folder / tag, folder / beside(tag, REPLACED)
    if final.is_symlink():
        raise FileExistsError(errno.EEXIST, "a symbolic link is in the way", str(final))
    done: list[tuple[Path, Path]] = []
    try:
        if final.exists():
            own_files.claim(final)
        for source, target in ((final, aside), (staging, final)):
            if source.exists():
                source.rename(target)
                done.append((source, target))
        manifest.sync_directory(final.parent)
        if save_latest:
            (folder / NEW_LATEST).replace(folder / LATEST)
            manifest.sync_directory(folder)
    except OSError:
        for source, target in reversed(done):
            with contextlib.suppress(OSError):
                target.rename(source)
        with contextlib.suppress(OSError):
            own_files.unclaim(final)
        raise
    with contextlib.suppress(OSError):  # the next save goes on with it
        own_files.unclaim(final)
        if own_files.is_ours(aside):
            own_files.hand_over(aside, final)


def discard(folder: Path, tag: str) -> None:
    """Remove the staging folder of a tag, as far as it can be removed."""
    with contextlib.suppress(OSError):
        (folder / NEW_LATEST).unlink(missing_ok=True)  # before the save it belongs to is gone
        staging = folder / staging_tag(tag)
        if own_files.is_ours(staging):
            own_files.remove_all(staging)


def reseal(folder: str | os.PathLike[str], tag: str) -> None:
    """Write a new manifest for a checkpoint whose files were changed on purpose; for one process.

    Everything that lies in its folder becomes part of it.

    Raises:
        OSError: it cannot be read or written.
    """
    path = Path(folder) / tag
    details = {"save_latest": True, "latest_was": None, "save_id": "", **(manifest.whole_manifest(path) or {})}
    for key in ("format", "files", "sha256"):
        details.pop(key, None)
    manifest.write_manifest(path, details.pop("serial", 0), details, {})


def prune(folder: str | os.PathLike[str], keep: int, every: int | None = None) -> list[str]:
    """Delete the oldest complete checkpoints but `keep`, never the one that `latest` names; for one process.

    What a manifest does not name stays, under the tag.

    Args:
        folder: of all checkpoints.
        keep: how many, at least 1.
        every: optimizer steps, the checkpoints of whose multiples stay beside those; None for none.

    Returns:
        The deleted tags. Only checkpoints with a manifest that were saved as latest are counted and deleted.
    """
    path = Path(folder)
    latest, old, complete = os.path.realpath(path / (read_latest(path) or LATEST)), [], 0
    for name, content in manifests(path):
        if manifest.is_leftover(name) or not content.get("save_latest"):
            continue
        spared = every is not None and content.get("global_steps", 1) % every == 0
        if complete >= max(keep, 1) and not spared and os.path.realpath(path / name) != latest:
            old.append(name)
        complete += manifest.find_fault(path / name) is None
    for name in old:
        # Hidden first: what a kill leaves of it must not look like a checkpoint.
        aside = path / beside(name, REPLACED)
        (path / name).rename(aside)
        own_files.hand_over(aside, path / name)
    return old
