"""Replace and remove the files of a checkpoint, and nothing else that lies in its folder.

Ours are the files that a folder's manifest names, the manifest, and the token that is put into a folder while it has
none. Everything else belongs to the user: files, links, folders, empty ones too. It is moved, never copied, and stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

from ds_fira.checkpoint.manifest import MANIFEST, TOKEN, own_names

# How a folder of ours begins that has no token yet, or may lose it at any moment.
SCRATCH = ".ds_fira_new-"


def is_ours(folder: Path) -> bool:
    """Whether a hidden folder is one that a save has made or moved aside."""
    return _is_folder(folder) and (os.path.lexists(folder / TOKEN) or bool(own_names(folder)))


def claim(folder: Path) -> None:
    """Mark a folder that has no whole manifest, so that `is_ours` knows it under the name it gets."""
    if not own_names(folder):
        (folder / TOKEN).write_text("moved aside")


def unclaim(folder: Path) -> None:
    """Remove the mark of `claim`."""
    (folder / TOKEN).unlink(missing_ok=True)


def refuse_collisions(new: Path, old: Path) -> None:
    """Stop before a file of a new checkpoint meets a folder in the old one's place, or the reverse.

    Raises:
        OSError: names it.
    """
    for path, folders, files in os.walk(new):
        there = old / Path(path).relative_to(new)
        blocked = [there / name for name in files if _is_folder(there / name)]
        blocked += [there / name for name in folders if os.path.lexists(there / name) and not _is_folder(there / name)]
        if blocked:
            raise OSError(errno.EEXIST, "something that is no file of a checkpoint is in the way", str(blocked[0]))


def remove(folder: Path) -> None:
    """Remove a folder that is ours: all of it where its save did not end, else what its manifest names."""
    if own_names(folder):
        hand_over(folder, folder)
    else:
        remove_all(folder)


def remove_all(folder: Path) -> None:
    """Remove a folder that is ours with all that is in it, under a name that says so, whatever of it goes first."""
    shutil.rmtree(folder.rename(folder.with_name(SCRATCH + secrets.token_hex(8))), ignore_errors=True)


def hand_over(aside: Path, final: Path) -> None:
    """Remove a checkpoint's own files from a folder, and move everything else to where the folder was.

    Cut short anywhere, it can be called again: what tells that the folder is ours goes last, and stays while there is
    something left that has no place.

    Args:
        aside: the folder.
        final: where its other contents go, as far as their names are free there; made where there are any. A file goes
            that has the name of one of the checkpoint at `final`: DeepSpeed would have written over it.
    """
    own = own_names(aside) | {TOKEN}
    _hand_over(aside, final, "", own, own_names(final))
    if not {entry.name for entry in aside.iterdir()} - {MANIFEST, TOKEN} & own:
        remove_all(aside)


def _hand_over(source: Path, target: Path, prefix: str, own: set[str], new: set[str]) -> None:
    for entry in sorted(source.iterdir()):
        name, there = prefix + entry.name, target / entry.name
        free = not os.path.lexists(there)
        if _is_folder(entry):
            mixed = any(other.startswith(f"{name}/") for other in own)
            if free and not mixed:
                _move(entry, there)
            elif free or _is_folder(there):
                _hand_over(entry, there, f"{name}/", own, new)
                if mixed or entry != there:
                    with contextlib.suppress(OSError):  # something has stayed
                        entry.rmdir()
        elif name in own:
            if name not in (MANIFEST, TOKEN):
                entry.unlink()
        elif free:
            _move(entry, there)
        elif name in new and entry != there:
            entry.unlink()


def _move(entry: Path, there: Path) -> None:
    there.parent.mkdir(parents=True, exist_ok=True)
    entry.rename(there)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
