"""Decide which tags a folder of checkpoints may have, and which of its checkpoints is loaded. Only reads.

Needs neither torch nor DeepSpeed. `ds_fira/checkpoint/atomic_save.py` says how checkpoints come about, and under which
names they lie.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ds_fira.checkpoint import manifest

LATEST = "latest"
NEW_LATEST = ".latest-saving"  # becomes `latest` when the checkpoint that it names has its name
LOCK = ".ds_fira_lock"
_RESERVED = (LATEST, NEW_LATEST, LOCK, "zero_to_fp32.py", "zero_to_torch.py")
_LONGEST_NAME, _LONGEST_TAG = 240, 2000  # bytes; file systems allow 255 and 4095, with our prefixes and the folder
_SHOWN = 80  # characters of a tag in a sentence


def matching_files(checkpoint: Path, pattern: str, listed: Collection[str] | None = None) -> list[Path]:
    """The files of a checkpoint whose names match, in order; without what its manifest does not name.

    Args:
        checkpoint: its folder.
        pattern: of names, as a shell's.
        listed: what it names, where that is known; else it is read.
    """
    listed = manifest.listed_files(checkpoint) if listed is None else listed
    return [path for path in sorted(checkpoint.glob(pattern)) if listed is None or path.name in listed]


def manifests(folder: Path) -> list[tuple[str, manifest.Manifest]]:
    """Names and manifests of the checkpoints in a folder that have a whole one, the newest first; follows no links."""
    folders = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    found = [(path.name, content) for path in folders if (content := manifest.whole_manifest(path)) is not None]
    return sorted(found, key=lambda item: (item[1].get("serial", 0), item[0]), reverse=True)


def staging_tag(tag: str) -> str:
    """The tag under which a checkpoint is written: hidden, so that no pattern for checkpoints finds it."""
    return beside(tag, manifest.STAGING)


def beside(tag: str, prefix: str) -> str:
    """The tag with a prefix to its last part."""
    parent, slash, name = tag.rpartition("/")
    return parent + slash + prefix + name


def shown(tag: str) -> str:
    """A tag for a sentence: quoted, and cut where it is long."""
    return repr(tag) if len(tag) <= _SHOWN else f"{tag[:_SHOWN]!r}... ({len(tag)} characters)"


def find_tag_fault(folder: Path, tag: str, saving: bool = False) -> str | None:
    """Why nothing can be loaded or saved under a tag, in words that follow it; None where it can.

    Args:
        folder: of all checkpoints.
        tag: the tag.
        saving: whether something is to be saved under it.
    """
    parts = tag.split("/")
    try:
        too_long = len(tag.encode()) > _LONGEST_TAG or any(len(part.encode()) > _LONGEST_NAME for part in parts)
    except UnicodeEncodeError:
        return "is no text in UTF-8"
    unfinished = saving and any(map(manifest.is_leftover, parts))
    faults = (
        (too_long, "is too long for the name of a folder"),
        (any(ord(char) < 32 or ord(char) == 127 for char in tag), "holds control characters"),
        (".." in parts or os.path.isabs(tag), "leaves the folder"),
        ({"", "."} & set(parts) or tag != tag.strip(), "is no name of a folder"),
        (parts[0] in _RESERVED, "is a name that checkpoints need for a file beside them"),
        (unfinished, f"begins with {manifest.STAGING!r} or {manifest.REPLACED!r}, the marks of unfinished saves"),
    )
    return next((fault for holds, fault in faults if holds), None) or _find_link_fault(folder, tag, saving)


def _find_link_fault(folder: Path, tag: str, saving: bool) -> str | None:
    """What stands in the way on the disk."""
    root, path = os.path.realpath(folder), folder
    for part in tag.split("/"):
        path = path / part
        if path.is_symlink():
            if saving and path == folder / tag:
                return "is a symbolic link, and a save would replace the link and not the folder it leads to"
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                return "leads out of the folder through a symbolic link"
        if saving and os.path.lexists(path) and not path.is_dir():
            return "is there, but is no folder"
    return None


def look_up_latest(folder: Path) -> tuple[str | None, str | None]:
    """What `latest` names, and why that cannot be told; (None, None) where there is no such file."""
    path = folder / LATEST
    try:
        content = manifest.read_start(path, 4 * _LONGEST_TAG, "it")
        if content is None:
            return None, "it is a link that leads nowhere" if path.is_symlink() else None
        text = content.decode().strip()
    except UnicodeDecodeError:
        return None, "it holds no text"
    except ValueError as error:
        return None, str(error)
    if not text:
        return None, "it is empty"
    tag = text.rstrip("/") or text
    fault = find_tag_fault(folder, tag)
    return (tag, None) if fault is None else (None, f"it names {shown(tag)}, which {fault}")


def read_latest(folder: Path) -> str | None:
    """What `latest` names, None where there is no such file or it names nothing that could be loaded."""
    return look_up_latest(folder)[0]


def find_interrupted(folder: Path) -> str | None:
    """Where a complete save lies that was to become `latest` when its run was killed; None without one.

    `latest` has to be what it was when the save was complete: someone who edits it by hand is obeyed.
    """
    try:
        tag = (folder / NEW_LATEST).read_bytes()[: 4 * _LONGEST_TAG].decode()
        if find_tag_fault(folder, tag, saving=True):
            return None
        if os.path.lexists(folder / staging_tag(tag)):
            tag = staging_tag(tag)
        content = manifest.read_manifest(folder / tag)
    except (OSError, ValueError):
        return None
    if content is None or not content.get("save_latest") or "latest_was" not in content:
        return None
    return tag if content["latest_was"] == read_latest(folder) else None


def in_order(folder: Path, wanted: str | None, only: bool = False) -> list[str]:
    """The tags to try, the first complete one of which is to be loaded.

    Args:
        folder: of all checkpoints.
        wanted: what `latest` names, or the tag that was asked for; None without either.
        only: leave it at the wanted one.

    Returns:
        A save that was cut short when it was complete; `wanted` under each of its names; the others that were saved as
        latest, the newest first; where there is a `wanted`, those that DeepSpeed wrote without a manifest; and saves
        that did not end, which are not complete.
    """
    tags = [wanted, beside(wanted, manifest.STAGING), beside(wanted, manifest.REPLACED)] if wanted else []
    tags = tags[:1] + [tag for tag in tags[1:] if (folder / tag).is_dir()]
    interrupted = find_interrupted(folder)
    if interrupted is not None and (interrupted in tags if only else wanted in (None, read_latest(folder))):
        tags = [interrupted, *tags]
    if not only and folder.is_dir():
        tags += _others(folder, wanted is not None)
    return list(dict.fromkeys(tags))


def _others(folder: Path, plain_too: bool) -> list[str]:
    listed = manifests(folder)
    known = {name for name, _ in listed}
    plain = [path for path in folder.iterdir() if path.name not in known and path.is_dir() and any(path.glob("*.pt"))]
    plain = [path for path in plain if plain_too or manifest.is_leftover(path.name)]
    plain.sort(key=lambda path: -path.stat().st_mtime)
    tags = [name for name, content in listed if content.get("save_latest", True)] + [path.name for path in plain]
    return [tag for tag in tags if find_tag_fault(folder, tag) is None]


def find_complete(folder: str | os.PathLike[str]) -> str | None:
    """The tag that `load_checkpoint` takes from a folder unless contents have changed, None where there is none."""
    path = Path(folder)
    wanted, fault = look_up_latest(path)
    tags = in_order(path, "" if fault else wanted)
    return next((tag for tag in tags if manifest.find_fault(path / tag) is None), None)
