"""One thing in a thread: its answer, its error, and the end of a process that waits for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from ds_fira.runtime.background import Background, end_all
from tests.programs import run_code


def test_an_answer_and_an_error() -> None:
    go = threading.Event()
    running = Background(lambda: go.wait() and 7)
    assert not running.done
    go.set()
    assert running.result() == 7
    assert running.done
    failing = Background(lambda: 1 // 0)
    assert failing.wait() >= 0
    with pytest.raises(ZeroDivisionError):
        failing.result()


def test_the_end_waits_and_hurries(capsys: pytest.CaptureFixture[str]) -> None:
    """An error that nobody has asked for is printed."""
    hurried = threading.Event()

    def fail() -> None:
        assert hurried.wait(60)
        time.sleep(0.05)
        raise OSError("the disk is gone")

    running = Background(fail, hurried.set)
    end_all(hurry=True)
    assert running.done
    assert "the disk is gone" in capsys.readouterr().err


def test_the_end_of_a_program_waits(tmp_path: Path) -> None:
    code = (
        "import time\nfrom ds_fira.runtime.background import Background\n"
        "Background(lambda: (time.sleep(0.5), print('done', flush=True)))\nprint('main ends', flush=True)"
    )
    assert run_code(code, [], tmp_path).stdout.split("\n")[:2] == ["main ends", "done"]
