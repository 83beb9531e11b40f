"""What the ranks of a test pool run to see how a signal that one of them gets reaches all."""

from __future__ import annotations

import os
import signal
import time

import torch

import ds_fira


def signalled(steps: int, when: dict[int, int]) -> tuple[list[bool], list[int], bool]:
    """Ask at every step; some ranks get SIGTERM in one of them.

    Args:
        steps: at most so many are made.
        when: by rank, the step in which it gets the signal.

    Returns:
        The answers, which signals the handler from before saw, and whether that handler is back in the end.
    """
    rank, seen, answers = torch.distributed.get_rank(), [], []

    def older(number: int, _: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, older)
    with ds_fira.Termination() as termination:
        for step in range(steps):
            time.sleep(0.05 * rank)  # ranks are never at the same place
            if when.get(rank) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(termination.requested())
            if answers[-1]:
                break
        status = termination.status
    assert status == 143
    back = signal.signal(signal.SIGTERM, before) is older
    return answers, seen, back
