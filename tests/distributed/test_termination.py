"""`ds_fira.Termination`: one rank's SIGTERM is an answer of all ranks at the same step. Launchers: test_restart.py."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

import ds_fira
from tests.programs import run_code
from tests.ranks import Pools


@pytest.mark.parametrize("when", [{2: 3}, {0: 3}, {0: 4, 1: 3, 2: 5}, {}])
def test_every_rank_answers_alike_at_the_same_step(ranks: Pools, when: dict[int, int]) -> None:
    """Whichever rank gets the signal first, and whoever gets it later: one call after that all ranks know."""
    results = ranks.run(3, "signalled", "tests.distributed.termination_jobs", steps=8, when=when)
    expected = [False] * 4 + [True] if when else [False] * 8
    for rank, (answers, seen, back) in enumerate(results):
        assert answers == expected
        assert seen == ([signal.SIGTERM] if when.get(rank, 9) <= 4 else [])
        assert back


ALONE = """
import os, signal, sys, ds_fira
with ds_fira.Termination() as termination:
    assert not termination.requested()
    os.kill(os.getpid(), signal.SIGTERM)
    if sys.argv[1] == "asked":
        assert termination.requested()
        print("saved", flush=True)
        sys.exit(termination.status)
print("not reached")
"""


@pytest.mark.parametrize(("how", "status"), [("asked", 143), ("not asked", -signal.SIGTERM)])
def test_a_process_alone(how: str, status: int, tmp_path: Path) -> None:
    """It knows at once; a signal that nobody asked about ends the process behind the block, as it would have."""
    done = run_code(ALONE, [how], tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stdout == ("saved\n" if how == "asked" else "")


def test_another_thread_cannot_have_it() -> None:
    """Python takes signals in its main thread alone."""
    errors = []

    def make() -> None:
        try:
            ds_fira.Termination()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "make it in the main thread" in errors[0]
