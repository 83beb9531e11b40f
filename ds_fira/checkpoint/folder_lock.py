"""One run a checkpoint folder: a lock file that says who saves there. Needs neither torch nor DeepSpeed.

Two runs in one folder, such as one that was thought dead and its requeue, would remove each other's unfinished saves.
The first save takes `.ds_fira_lock`, and keeps it until its process ends. Another run finds the lock *stale*, and takes
it over, if

- it was written in this process's PID namespace of this boot, and that process is gone: killed, a zombie, or another
  process has its number. This is known at once;
- it was written elsewhere, on another host or in another container, and its content does not change for `PATIENCE`
  seconds of this process's own clock. The owner counts it up every `HEARTBEAT` seconds in a thread.

An owner that did not run for that long finds another's lock when it runs again, and saves no more.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from ds_fira.checkpoint.manifest import write_file
from ds_fira.checkpoint.process_identity import boot, is_gone, is_near, namespace, started
from ds_fira.checkpoint.tag_folder import LOCK

HEARTBEAT = 5.0  # seconds
PATIENCE = 4 * HEARTBEAT
_SETTLE = 0.5  # seconds in which a rival that has judged the same lock stale may still write its own
_TRIES = 100
_LARGEST = 1 << 16  # bytes of a lock
_HEART = "ds_fira folder lock"
_DIGITS = 12  # of the heartbeat's counter, so that the content keeps its length

_held: dict[str, FolderLock] = {}
_guard = threading.Lock()


class InUse(Exception):
    """Another run saves into the folder."""


def hold(folder: Path, user: object = None) -> None:
    """Take the lock of a folder for this process, or find that it has it.

    Args:
        folder: of checkpoints; there already.
        user: anything that `release` will be called with; the lock is kept while one of its users is left.

    Raises:
        InUse: another run has it, or has taken it over from this one; in words that follow "because".
        OSError: the folder cannot be written.
    """
    key = os.path.realpath(folder)
    with _guard:
        lock = _held.get(key)
        if lock is None or lock.process != os.getpid():  # of the process that this one was forked from
            lock = FolderLock(folder)
        lock.take()
        lock.users.add(id(user))
        _held[key] = lock
        if all(thread.name != _HEART for thread in threading.enumerate()):
            threading.Thread(target=_live, name=_HEART, daemon=True).start()


def release(user: object = None) -> None:
    """Give up the locks that nobody but `user` needs."""
    for key, lock in list(_held.items()):
        lock.users.discard(id(user))
        if not lock.users:
            lock.give_up()
            _held.pop(key, None)


def _release_all() -> None:
    for lock in list(_held.values()):
        lock.give_up()


class FolderLock:
    """The lock of one folder, of this process.

    Attributes:
        taken: whether it has ever been this process's.
        lost: who has taken it over, None while nobody has.
        users: for whom it is held.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.process = os.getpid()
        self.taken = False
        self.lost: dict[str, object] | None = None
        self.users: set[int] = set()
        self._beats = 0
        self._content = {
            "run": secrets.token_hex(8),
            "host": socket.gethostname(),
            "boot": boot(),
            "namespace": namespace(),
            "pid": self.process,
            "started": started(self.process),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def take(self) -> None:
        """Have it; see `hold`."""
        for _ in range(_TRIES):
            found = self._read()
            if self.lost is None and self._is_ours(found):
                return
            if self.taken and self.lost is None and found is not None:
                self.lost = _parsed(found)
            if self.lost is not None:
                raise InUse(
                    f"another run ({_described(self.lost)}) has taken over {self.path.parent} while this one did not "
                    "answer"
                )
            if found is not None and not self._is_stale(found):
                raise InUse(f"another run ({_described(_parsed(found))}) saves into {self.path.parent}")
            if self._try() if found is None else self._replace(found):
                self.taken = True
                self._clear_up()
                return
        raise OSError(errno.EBUSY, "the lock cannot be taken", str(self.path))

    def _read(self) -> bytes | None:
        try:
            with self.path.open("rb") as file:
                return file.read(_LARGEST)
        except FileNotFoundError:
            return None

    def _is_ours(self, found: bytes | None) -> bool:
        return found is not None and _parsed(found).get("run") == self._content["run"]

    def _rendered(self) -> bytes:
        return json.dumps({**self._content, "beats": f"{self._beats:0{_DIGITS}}"}).encode()

    def _written_apart(self) -> Path:
        """A new file with our content, for the lock's place."""
        path = self.path.with_name(f"{LOCK}-{self._content['run']}")
        write_file(path, self._rendered())
        return path

    def _try(self) -> bool:
        """Take it if there is none."""
        new = self._written_apart()
        try:
            os.link(new, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with self.path.open("xb") as file:
                    file.write(self._rendered())
            except FileExistsError:
                return False
        finally:
            new.unlink(missing_ok=True)
        return True

    def _clear_up(self) -> None:
        """Remove what takers that were killed have left."""
        for left in self.path.parent.glob(f"{LOCK}-*"):
            with contextlib.suppress(OSError):
                if is_gone(_parsed(left.read_bytes())):
                    left.unlink(missing_ok=True)

    def _is_stale(self, found: bytes) -> bool:
        owner = _parsed(found)
        if is_near(owner):
            return is_gone(owner)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(1.0, HEARTBEAT / 4))
            if self._read() != found:
                return False
        return True

    def _replace(self, stale: bytes) -> bool:
        """Put our lock in the place of a stale one, unless a rival was first."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            with contextlib.suppress(OSError):  # where the file system has no locks, the re-reading below is all
                fcntl.flock(file, fcntl.LOCK_EX)
            if self._read() != stale:
                return False
            new = self._written_apart()
            new.replace(self.path)
            if not is_near(_parsed(stale)):
                time.sleep(_SETTLE)
            return self._is_ours(self._read())
        return False

    def beat(self) -> None:
        """Show that this process runs; what another run has taken over is not touched."""
        if not self.taken or self.lost is not None or self.process != os.getpid():
            return
        with contextlib.suppress(OSError), self.path.open("r+b") as file:
            # Into the file that was read: one that replaces it meanwhile is another file.
            found = file.read(_LARGEST)
            if not self._is_ours(found):
                self.lost = _parsed(found)
                return
            self._beats += 1
            file.seek(0)
            file.write(self._rendered())
            file.flush()
            os.fsync(file.fileno())

    def give_up(self) -> None:
        """Remove it if it is this process's."""
        with contextlib.suppress(OSError):
            if self.process == os.getpid() and self.taken and self._is_ours(self._read()):
                self.path.unlink()


def _parsed(content: bytes) -> dict[str, object]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(owner: dict[str, object]) -> str:
    process, host, since = (str(owner.get(key, "unknown"))[:100] for key in ("pid", "host", "since"))
    return f"process {process}, on {host}, since {since}"


def _live() -> None:
    while True:
        time.sleep(HEARTBEAT)
        for lock in list(_held.values()):
            lock.beat()


atexit.register(_release_all)
