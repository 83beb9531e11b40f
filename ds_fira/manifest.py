"""What a checkpoint folder holds: its manifest, whether it is complete, and which of several is to be loaded.

Only reads, and needs neither torch nor DeepSpeed. `ds_fira/tags.py` says how checkpoints come about.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "ds_fira_manifest.json"
LATEST = "latest"
STAGING, REPLACED = ".saving-", ".replaced-"
_BLOCK = 1 << 22  # bytes read at a time

Record = dict[str, int]  # "size" in bytes and "crc32" of one file


def beside(tag: str, prefix: str) -> str:
    parent, _, name = tag.rpartition("/")
    return f"{parent}/{prefix}{name}" if parent else prefix + name


def record_file(path: Path, flush: bool = True) -> Record:
    """The size and the CRC-32 of a file, after flushing it to the disk."""
    size = crc = 0
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"size": size, "crc32": crc}


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


def manifests(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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
    tags = [wanted, beside(wanted, STAGING), beside(wanted, REPLACED)] if wanted else []
    tags = tags[:1] + [tag for tag in tags[1:] if (folder / tag).is_dir()]
    if only or not folder.is_dir():
        return tags
    listed = sorted(manifests(folder), key=lambda item: -item[1].get("serial", 0))
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
