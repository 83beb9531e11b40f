"""Write the manifest of a checkpoint, and compare a checkpoint with it. Needs neither torch nor DeepSpeed.

A manifest is plain JSON: the size and the CRC-32 of every file, how the save was made, and from format 2 on the SHA-256
of the rest of itself. It is taken only if it reads, byte for byte, as it would be written now, so that no changed byte
passes. The files of a checkpoint say that there is a manifest of format 2 (`MARK`): one that was removed, emptied or
replaced by an older one is missed. Format 1, of version 0.1.0, has neither.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

MANIFEST = "ds_fira_manifest.json"
FORMAT = 2
# In the files of a checkpoint that has a manifest of format 2, with the number of the format.
MARK = "ds_fira_manifest_format"
STAGING, REPLACED = ".saving-", ".replaced-"
TOKEN = ".ds_fira_token"  # in a folder of ours that has no manifest
_CHECKSUM = "sha256"
_BLOCK = 1 << 22  # bytes read at a time
_LARGEST = 1 << 28  # bytes of a manifest; a million files need less
_MODEL, _STATES = "model_states.pt", "optim_states.pt"  # how DeepSpeed's files end
_DAMAGED = f"its {MANIFEST} is damaged"
# What reading a file of another's can raise beside OSError: bad text, JSON of any depth or size, cut zip files.
UNREADABLE = (ValueError, RecursionError, MemoryError, OverflowError, zipfile.BadZipFile, struct.error, EOFError)

Record = dict[str, int]  # "size" in bytes and "crc32" of one file


class Manifest(TypedDict, total=False):
    """What a manifest holds; a save adds the ranks and the steps. The names are keys in saved files."""

    format: int
    serial: int  # higher than those of earlier saves
    save_latest: bool
    latest_was: str | None  # what `latest` named when the manifest was written
    save_id: str  # tells this save from others, the same on every storage
    files: dict[str, Record]
    sha256: str  # of the rest


def record_file(path: Path, flush: bool = True) -> Record:
    """The size and the CRC-32 of a file, after flushing it to the disk."""
    size = crc = 0
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"size": size, "crc32": crc}


def render(content: Mapping[str, object]) -> bytes:
    """A manifest as it is written: with the checksum of the rest at its end."""
    rest = json.dumps({key: value for key, value in content.items() if key != _CHECKSUM}, indent=1)
    digest = hashlib.sha256(rest.encode()).hexdigest()
    # As `json.dumps` would write the whole, at half the time: a reader does this for every checkpoint of a folder.
    return f'{rest.removesuffix("}").rstrip()},\n "{_CHECKSUM}": "{digest}"\n}}'.encode()


def read_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint, None where it has none.

    Returns:
        At least `format`, `serial`, `save_latest` and `files`; from format 2 on also `latest_was` (what `latest` named
        when it was written) and `save_id`.

    Raises:
        ValueError: it is not whole, names files outside the checkpoint, or has a format that is not known.
    """
    written = read_start(checkpoint / MANIFEST, _LARGEST + 1, f"its {MANIFEST}")
    if written is None:
        return None
    try:
        content = json.loads(written) if len(written) <= _LARGEST else None
        fault = _find_fault_in(content, written)
    except UNREADABLE:
        fault = _DAMAGED
    if fault is not None:
        raise ValueError(fault)
    return content


def read_start(path: Path, limit: int, what: str) -> bytes | None:
    """The first `limit` bytes of a file, None where there is none.

    Raises:
        ValueError: it is no file or cannot be read; a sentence that begins with `what`.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{what} is no file")
        with path.open("rb") as file:
            return file.read(limit)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror or error}") from None


def _find_fault_in(content: object, written: bytes) -> str | None:
    """Why a manifest is not as it was written, as far as its format can tell."""
    if not isinstance(content, dict) or not is_count(content.get("format")) or content["format"] < 1:
        return _DAMAGED
    if content["format"] > FORMAT:
        return (
            f"its {MANIFEST} has format {content['format']}, and this version of ds_fira knows {FORMAT} at most: "
            "update ds_fira"
        )
    if content["format"] == FORMAT:
        whole = render(content) == written and {_CHECKSUM, "latest_was", "save_id"} <= content.keys()
    else:
        whole = _CHECKSUM not in content
    files = content.get("files")
    whole = (
        whole
        and is_count(content.get("serial", 0))
        and isinstance(content.get("save_latest", True), bool)
        and isinstance(files, dict)
        and any(name.endswith(_MODEL) for name in files)
        and all(_is_inside(name) and _is_record(record) for name, record in files.items())
    )
    return None if whole else _DAMAGED


def is_count(value: object) -> bool:
    """Whether a value from JSON is a number that can count something: no truth value, not negative, not absurd."""
    return type(value) is int and 0 <= value < 1 << 63


def _is_record(record: object) -> bool:
    return isinstance(record, dict) and is_count(record.get("size")) and is_count(record.get("crc32"))


def _is_inside(name: str) -> bool:
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/")) and name != MANIFEST


def write_manifest(folder: Path, serial: int, details: Mapping[str, object], records: Mapping[str, Record]) -> None:
    """Record all files of a folder, and flush it to the disk.

    Args:
        folder: of the checkpoint.
        serial: higher than those of earlier saves.
        details: further entries, with `save_latest`, `latest_was` and `save_id`.
        records: of files that are recorded and flushed already.

    Raises:
        OSError: the disk is full, or a file of `records` is not there as it was written.
    """
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name, record in records.items():
        if name not in present or present[name].stat().st_size != record["size"]:
            raise FileNotFoundError(errno.ENOENT, "not found as it was written", str(folder / name))
    names = sorted(present.keys() - {MANIFEST, TOKEN})
    files = {name: records.get(name) or record_file(present[name]) for name in names}
    write_file(folder / MANIFEST, render({"format": FORMAT, "serial": serial, **details, "files": files}))
    for path in {folder, *(file.parent for file in present.values())}:
        sync_directory(path)


def write_file(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(content)
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


def whole_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint, None where it has none or a damaged one."""
    try:
        return read_manifest(checkpoint)
    except ValueError:
        return None


def own_names(checkpoint: Path) -> set[str]:
    """The files of a folder that its manifest names, and the manifest; none where it has no whole one."""
    content = whole_manifest(checkpoint)
    return set() if content is None else {MANIFEST, *content["files"]}


def listed_files(checkpoint: Path) -> set[str] | None:
    """The files that belong to a checkpoint; None where no manifest says so, and all that are there do."""
    return own_names(checkpoint) or None


def is_leftover(tag: str) -> bool:
    """Whether a tag is one of the hidden names that a crash leaves."""
    return tag.rpartition("/")[2].startswith((STAGING, REPLACED))


def _needed(name: str, model_only: bool) -> bool:
    return not (model_only and name.endswith(_STATES))


def find_fault(checkpoint: Path, model_only: bool = False) -> str | None:
    """Why a checkpoint is not complete, None where it is; reads names and sizes, not contents.

    Args:
        checkpoint: its folder.
        model_only: leave out the optimizer's files, which may have been deleted to save room.
    """
    try:
        if not checkpoint.is_dir():
            return "it is no folder" if os.path.lexists(checkpoint) else "it is missing"
        content = read_manifest(checkpoint)
        if (content is None or content["format"] < FORMAT) and has_mark(checkpoint):
            found = "missing" if content is None else f"replaced by one of format {content['format']}"
            return (
                f"its {MANIFEST}, with which it was saved, is {found} (if you changed its files on purpose, "
                "ds_fira.checkpoint.atomic_save.reseal writes a new one)"
            )
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
        if not path.is_file():
            return f"its file {path.name} is missing"
        with path.open("rb") as file:
            start = file.read(4)
        # torch.save's older format has no mark of its end.
        if not start or (start == b"PK\x03\x04" and not zipfile.is_zipfile(path)):
            return f"its file {path.name} is cut short"
    return None if files else "it holds no *.pt file"


def has_mark(checkpoint: Path) -> bool:
    """Whether some file of a checkpoint says that there is a manifest of format 2; unpickles nothing."""
    return any(
        path.name.endswith((_MODEL, _STATES)) and path.is_file() and _holds(path, MARK.encode())
        for path in sorted(checkpoint.glob("*.pt"))
    )


def _holds(path: Path, text: bytes) -> bool:
    """Whether the structure in a file of `torch.save`, which holds its keys as plain bytes, has a text in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(text in archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    except (OSError, NotImplementedError, zlib.error, *UNREADABLE):
        return False


def find_damage(checkpoint: Path, model_only: bool = False, share: int = 0, of: int = 1) -> str | None:
    """Compare contents with the manifest: this process's `share` of `of` shares; None without a difference."""
    try:
        content = read_manifest(checkpoint) or {"files": {}}
    except ValueError as error:
        return str(error)
    names = [name for name in sorted(content["files"]) if _needed(name, model_only)]
    for name in names[share::of]:
        try:
            found = record_file(checkpoint / name, flush=False)
        except OSError as error:
            return f"its file {name} cannot be read: {error.strerror or error}"
        if found["crc32"] != content["files"][name]["crc32"]:
            return f"the content of its file {name} has changed"
    return None
