"""What every command of `ds-fira` shares: how it is added, what it gives back, and how its process ends.

Standard output holds what was asked for and nothing else; what libraries say goes to standard error. A status of 2 is a
wrong setting or option, which would be as wrong the next time: `launch/run.sh` starts nothing again on it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ds_fira.version import __version__

PROGRAM = "ds-fira"
WRONG = 2


class Answer(NamedTuple):
    """What a command gives back.

    Attributes:
        text: for standard output.
        status: of the process; 0 where all is well.
    """

    text: str
    status: int = 0


class Command(Protocol):
    """A module with one command."""

    def register(self, commands: argparse._SubParsersAction) -> None:
        """Add the command to argparse's `commands`, through `add`."""


def add(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], Answer], **texts: str
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: argparse's.
        name: of the command.
        run: called with the parsed arguments; raises ValueError or OSError, with one sentence, where they are wrong.
        **texts: `help`, a line of the list of commands; `description` and `epilog`, printed as they are.

    Returns:
        The command's parser, for its arguments.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, formatter_class=layout, allow_abbrev=False, **texts)
    parser.set_defaults(run=run)
    return parser


def run(commands: Sequence[Command], description: str, argv: list[str] | None = None) -> int:
    """Run the command that a command line names.

    Args:
        commands: all there are.
        description: of the program.
        argv: the arguments; the process's own where None.

    Returns:
        The exit status.

    Raises:
        SystemExit: argparse cannot read the arguments, with status 2; or they ask for help.
    """
    parser = argparse.ArgumentParser(prog=PROGRAM, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    added = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in commands:
        command.register(added)
    args = parser.parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = args.run(args)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM} {args.command}: {error}", file=sys.stderr)
        return WRONG
    sys.stdout.write(answer.text.removesuffix("\n") + "\n")
    return answer.status
