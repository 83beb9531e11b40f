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
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "ds_fira_manifest.json"
LATEST = "latest"
STAGING, REPLACED = ".saving-", ".replaced-"
_TOKEN = ".ds_fira_token"
_NEW_LATEST = ".latest-saving"
_BLOCK = 1 << 22  # bytes read at a time

Record = dict[str, int]  # "size" in bytes and "crc32" of one file


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, or none that is complete can be loaded; every rank raises the same."""


def staging_tag(tag: str) -> str:
    """The tag under which a checkpoint is written: hidden, so that no pattern for checkpoints finds it."""
    return _beside(tag, STAGING)


def _beside(tag: str, prefix: str) -> str:
    parent, _, name = tag.rpartition("/")
    return f"{parent}/{prefix}{name}" if parent else prefix + name


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


def record_file(path: Path, flush: bool = True) -> Record:
    """The size and the CRC-32 of a file, after flushing it to the disk."""
    size = crc = 0
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"size": size, "crc32": crc}


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
    serial = 1 + max((content.get("serial", 0) for _, content in _manifests(folder)), default=0)
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
    staging, final, aside = folder / staging_tag(tag), folder / tag, folder / _beside(tag, REPLACED)
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


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, None where it has none.

    Raises:
        ValueError: it is not whole.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        for record in content["files"].values():
            record["size"], record["crc32"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"its {MANIFEST} is damaged") from None
    return content


def _manifests(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and manifests of the checkpoints in a folder that have a whole one."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    for name in names:
        with contextlib.suppress(ValueError, OSError):
            content = read_manifest(folder / name)
            if content is not None:
                yield name, content


def is_leftover(tag: str) -> bool:
    """Whether a tag is one of the hidden names that a crash leaves."""
    return tag.rpartition("/")[2].startswith((STAGING, REPLACED))


def _needed(name: str, model_only: bool) -> bool:
    return not (model_only and name.endswith("optim_states.pt"))


def find_fault(checkpoint: Path, model_only: bool = False) -> str | None:
    """Why a checkpoint is not complete, None where it is; reads names and sizes, not contents.

    Args:
        checkpoint: its folder.
        model_only: leave out the optimizer's files, which may have been deleted to save room.
    """
    try:
        if not checkpoint.is_dir():
            return "it is missing"
        content = read_manifest(checkpoint)
        if content is None:
            return _fault_without_manifest(checkpoint, model_only)
        for name, record in content["files"].items():
            path = checkpoint / name
            if not _needed(name, model_only):
                continue
            if not path.is_file():
                return f"its file {name} is missing"
            if (size := path.stat().st_size) != record["size"]:
                return f"its file {name} has {size} bytes instead of {record['size']}"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _fault_without_manifest(checkpoint: Path, model_only: bool) -> str | None:
    """What can be said of a checkpoint that DeepSpeed wrote alone: empty and cut zip files."""
    if is_leftover(checkpoint.name):
        return "its save did not end"
    files = [path for path in checkpoint.glob("*.pt") if _needed(path.name, model_only)]
    for path in sorted(files):
        with path.open("rb") as file:
            start = file.read(4)
        # torch.save's older format has no mark of its end.
        if not start or (start == b"PK\x03\x04" and not zipfile.is_zipfile(path)):
            return f"its file {path.name} is cut short"
    return None if files else "it holds no *.pt file"


def find_damage(checkpoint: Path, model_only: bool = False, share: int = 0, of: int = 1) -> str | None:
    """Compare contents with the manifest: this process's `share` of `of` shares; None without a difference."""
    content = read_manifest(checkpoint) or {"files": {}}
    names = [name for name in sorted(content["files"]) if _needed(name, model_only)]
    for name in names[share::of]:
        try:
            crc = record_file(checkpoint / name, flush=False)["crc32"]
        except OSError as error:
            return f"its file {name} cannot be read: {error.strerror or error}"
        if crc != content["files"][name]["crc32"]:
            return f"the content of its file {name} has changed"
    return None


def read_latest(folder: Path) -> str | None:
    """What `latest` names, None where there is no such file."""
    try:
        return (folder / LATEST).read_text().strip()
    except OSError:
        return None


def in_order(folder: Path, wanted: str | None, only: bool = False) -> list[str]:
    """The tags to try, the first complete one of which is to be loaded.

    Args:
        folder: of all checkpoints.
        wanted: what `latest` names, or the tag that was asked for; None without either.
        only: leave it at the wanted one.

    Returns:
        `wanted` under each of its names; the others that were saved as latest, the newest first; where there is a
        `wanted`, those that DeepSpeed wrote without a manifest; and saves that did not end, which are not complete.
    """
    tags = [wanted, _beside(wanted, STAGING), _beside(wanted, REPLACED)] if wanted else []
    tags = tags[:1] + [tag for tag in tags[1:] if (folder / tag).is_dir()]
    if only or not folder.is_dir():
        return tags
    listed = sorted(_manifests(folder), key=lambda item: -item[1].get("serial", 0))
    tags += [name for name, content in listed if content.get("save_latest", True)]
    known = {name for name, _ in listed}
    plain = [path for path in folder.iterdir() if path.name not in known and any(path.glob("*.pt"))]
    plain = [path for path in plain if wanted is not None or is_leftover(path.name)]
    tags += [path.name for path in sorted(plain, key=lambda path: -path.stat().st_mtime)]
    return list(dict.fromkeys(tags))


def find_complete(folder: str | os.PathLike[str]) -> str | None:
    """The tag that `load_checkpoint` takes from a folder unless contents have changed, None where there is none."""
    path = Path(folder)
    return next((tag for tag in in_order(path, read_latest(path)) if find_fault(path / tag) is None), None)


def prune(folder: str | os.PathLike[str], keep: int) -> list[str]:
    """Delete the oldest complete checkpoints but `keep`, never the one that `latest` names; for one process.

    Returns:
        The deleted tags. Only checkpoints with a manifest that were saved as latest are counted and deleted.
    """
    path = Path(folder)
    listed = [(content.get("serial", 0), name) for name, content in _manifests(path) if content.get("save_latest")]
    names = [name for _, name in sorted(listed, reverse=True) if not is_leftover(name)]
    old = [name for name in names[max(keep, 1) :] if name != read_latest(path)]
    for name in old:
        # Hidden first: what a kill leaves of it must not look like a checkpoint.
        (path / name).rename(path / _beside(name, REPLACED))
        shutil.rmtree(path / _beside(name, REPLACED), ignore_errors=True)
    return old
