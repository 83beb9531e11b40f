"""What the command lines of the examples share: a parser and an end in one sentence."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import deepspeed

import ds_fira

WRONG, FAILED = 2, 1


class OneSentenceParser(argparse.ArgumentParser):
    """Stops with one sentence, not with a page of usage: every process of the launcher prints it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with the status of a wrong option."""
        self.exit(WRONG, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """An argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def stop(sentence: str, engine: deepspeed.DeepSpeedEngine | None = None, status: int = WRONG) -> NoReturn:
    """End every process in good order with one sentence; for errors that all of them know of.

    The status is that of a wrong option, with which `launch/run.sh` starts nothing again, unless another is given.
    """
    ds_fira.shutdown(engine)
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(status)
