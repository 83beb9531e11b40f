"""What the command lines of the examples share."""

import argparse
from typing import NoReturn


class OneSentenceParser(argparse.ArgumentParser):
    """Stops with one sentence, not with a page of usage: every process of the launcher prints it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """An argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
