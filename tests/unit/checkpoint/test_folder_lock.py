"""One run a checkpoint folder: real processes that hold its lock, end, are killed, freeze, or run elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_fira.checkpoint import folder_lock
from ds_fira.checkpoint.folder_lock import InUse
from ds_fira.checkpoint.tag_folder import LOCK

PACKAGE = Path(folder_lock.__file__).parents[1]
# The package itself would import torch.
START = f"""
import sys, time, types
from pathlib import Path
package = sys.modules["ds_fira"] = types.ModuleType("ds_fira")
package.__path__ = [{str(PACKAGE)!r}]
from ds_fira.checkpoint import folder_lock, process_identity
folder_lock.HEARTBEAT, folder_lock.PATIENCE = 0.1, 1.0
if sys.argv[2] == "elsewhere":
    folder_lock.boot = process_identity.boot = lambda: "another machine"
def attempt():
    began = time.monotonic()
    try:
        folder_lock.hold(Path(sys.argv[1]))
    except folder_lock.InUse as error:
        print("refused:", error, flush=True)
    else:
        print(f"held after {{time.monotonic() - began:.2f}}", flush=True)
attempt()
for line in sys.stdin:
    attempt()
"""


class Other:
    """A process that takes the lock of a folder when it starts, and says how that went; again when asked."""

    def __init__(self, folder: Path, where: str = "here") -> None:
        command = [sys.executable, "-c", START, str(folder), where]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> str:
        """What it said last."""
        return self.process.stdout.readline().strip()

    def ask(self) -> str:
        """Let it take the lock again, as before every save."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start another process."""
    started: list[Other] = []

    def other(where: str = "here") -> Other:
        started.append(Other(tmp_path, where))
        return started[-1]

    yield other
    for one in started:
        one.process.kill()
        one.process.communicate()


def owner(folder: Path) -> dict[str, Any]:
    """What the lock says."""
    return json.loads((folder / LOCK).read_text())


def test_the_second_comer_is_told_who_is_there(start: Any, tmp_path: Path) -> None:
    """Process, host and time; nothing is left when the first one has ended, and then it may come in."""
    first = start()
    assert first.answer().startswith("held after 0.")
    assert first.ask().startswith("held after 0.")
    with pytest.raises(InUse, match=rf"another run \(process {first.process.pid}, on \S+, since 20\S+\) saves into"):
        folder_lock.hold(tmp_path, "me")
    assert owner(tmp_path)["pid"] == first.process.pid
    first.process.communicate()
    assert list(tmp_path.iterdir()) == []
    folder_lock.hold(tmp_path, "me")
    folder_lock.hold(tmp_path, "and me")
    assert owner(tmp_path)["pid"] == os.getpid()
    assert start().answer().startswith(f"refused: another run (process {os.getpid()},")
    folder_lock.release("me")
    assert (tmp_path / LOCK).exists()
    folder_lock.release("and me")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_is_followed_at_once(reaped: bool, start: Any, tmp_path: Path) -> None:
    """By kill -9, which leaves the lock; also where nobody has waited for the process yet."""
    first = start()
    first.answer()
    first.process.kill()
    if reaped:
        first.process.wait()
    while not reaped and Path(f"/proc/{first.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    assert owner(tmp_path)["pid"] == first.process.pid
    second = start()
    assert float(second.answer().removeprefix("held after ")) < 0.9  # less than its patience
    assert owner(tmp_path)["pid"] == second.process.pid
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_another_process_with_the_same_number_is_another(tmp_path: Path) -> None:
    """Its start tells them apart."""
    folder_lock.hold(tmp_path, "me")
    content = owner(tmp_path)
    folder_lock.release("me")
    (tmp_path / LOCK).write_text(json.dumps({**content, "run": "another", "started": "1"}))
    folder_lock.hold(tmp_path, "me")
    assert owner(tmp_path)["run"] != "another"
    folder_lock.release("me")


def test_an_owner_elsewhere_is_followed_when_it_is_silent(start: Any, tmp_path: Path) -> None:
    """On another host only the heartbeat tells; one that was frozen meanwhile saves no more, and takes nothing back."""
    first = start()
    first.answer()
    assert "refused" in start("elsewhere").answer()
    first.process.send_signal(signal.SIGSTOP)
    second = start("elsewhere")
    answer = second.answer()
    assert 1.0 <= float(answer.removeprefix("held after ")) < 6.0
    first.process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    expected = f"refused: another run (process {second.process.pid}, on "
    for _ in range(2):
        answer = first.ask()
        assert answer.startswith(expected)
        assert "has taken over" in answer
        assert owner(tmp_path)["pid"] == second.process.pid
    second.process.communicate()
    assert "has taken over" in first.ask()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_of_many_that_come_at_once_one_gets_it(where: str, start: Any, tmp_path: Path) -> None:
    """When all have judged the same lock stale."""
    (tmp_path / LOCK).write_text("{}")
    content: dict[str, Any] = {}
    if where == "here":
        (tmp_path / "apart").mkdir()
        folder_lock.hold(tmp_path / "apart", "me")
        content = owner(tmp_path / "apart") | {"run": "gone", "started": "1"}
        folder_lock.release("me")
        (tmp_path / LOCK).write_text(json.dumps(content))
        (tmp_path / "apart").rmdir()
    answers = [other.answer() for other in [start() for _ in range(5)]]
    assert sum(answer.startswith("held") for answer in answers) == 1, answers
    assert sum(answer.startswith("refused") for answer in answers) == 4, answers


def test_no_lock_at_all_is_taken_once(start: Any, tmp_path: Path) -> None:
    """By one of several."""
    answers = [other.answer() for other in [start() for _ in range(5)]]
    assert sum(answer.startswith("held") for answer in answers) == 1, answers
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_child_does_not_give_up_its_parents_lock(tmp_path: Path) -> None:
    """A forked loader of data ends while the training goes on; saving itself, it would be another run."""
    folder_lock.hold(tmp_path, "me")
    child = os.fork()
    if not child:
        folder_lock.release("me")
        folder_lock._release_all()
        try:
            folder_lock.hold(tmp_path, "child")
        except InUse:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert owner(tmp_path)["pid"] == os.getpid()
    folder_lock.release("me")


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    """Someone deletes old checkpoints with their folder; a lock that was deleted is made again."""
    folder = tmp_path / "state"
    folder.mkdir()
    folder_lock.hold(folder, "me")
    (folder / LOCK).unlink()
    folder_lock.hold(folder, "me")
    assert owner(folder)["pid"] == os.getpid()
    (folder / LOCK).unlink()
    folder.rmdir()
    folder_lock._held[os.path.realpath(folder)].beat()
    folder_lock.release("me")
    assert any(thread.name == "ds_fira folder lock" and thread.daemon for thread in threading.enumerate())


def test_a_lock_that_is_no_file(tmp_path: Path) -> None:
    """It is an error of the system, with the path, and no endless loop."""
    (tmp_path / LOCK).symlink_to("nowhere")
    with pytest.raises(OSError, match=LOCK):
        folder_lock.hold(tmp_path, "me")
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    with pytest.raises(OSError, match=LOCK):
        folder_lock.hold(tmp_path, "me")
