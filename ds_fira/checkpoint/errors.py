"""What went wrong in a save or a load on one rank, as a sentence with the reason and the remedy.

The readers and writers of this package raise sentences without a name in front. Whoever holds the optimizer adds its
name, so that users read the one that they chose.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_fira.checkpoint.folder_lock import InUse
from ds_fira.core.algorithms import ALGORITHMS

_PROBE = 1 << 20  # bytes


def load_sentence(error: Exception, name: str, rank: int = 0) -> str:
    """What to tell of an error of loading: one sentence, with the optimizer's name before it.

    Args:
        error: what was raised; a `ValueError` says itself what to do.
        name: of the optimizer.
        rank: that failed.
    """
    if not isinstance(error, ValueError):
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{name}: rank {rank} could not load the checkpoint ({told}); load another tag."
    return str(error) if str(error).partition(":")[0] in ALGORITHMS else f"{name}: {error}"


@contextmanager
def errors_name(name: str) -> Iterator[None]:
    """Put an optimizer's name before the sentence of a `ValueError` that is raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(load_sentence(error, name)) from error


def save_sentence(error: Exception, path: Path | None, folder: Path, tag: str) -> str:
    """Say what stopped a save: the rest of a sentence that begins with the rank.

    Args:
        error: what was raised.
        path: the file that was being written, None where that is not known.
        folder: of all checkpoints.
        tag: of the checkpoint.
    """
    kept = f"the save of {tag!r} was given up and earlier checkpoints are as they were"
    if isinstance(error, InUse):
        return f"could not save {tag!r} because {error}: end one of the two, or give save_checkpoint another folder."
    found = _os_error(error, path)
    if found is None:
        where = f" {path}" if path else f" checkpoint {tag!r}"
        return f"could not save{where}: {type(error).__name__}: {error}; {kept}."
    where = found.filename or path or folder
    return (
        f"could not write {where}: {found.strerror or found}; {kept}: make room or mend the folder and save "
        "again, or give save_checkpoint another folder."
    )


def _os_error(error: Exception, path: Path | None) -> OSError | None:
    """The operating system's error behind one of torch.save, which drops it: the system is asked again."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__context__
    if path is None or not isinstance(error, RuntimeError):
        return None
    probe = path if path.exists() else path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with probe.open("ab") as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as found:
        return OSError(found.errno, found.strerror, str(path))
    return None
