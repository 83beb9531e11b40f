"""`python -m ds_fira COMMAND`: what can be asked before and after training."""

from __future__ import annotations

import argparse
import sys

from ds_fira.tools import inspect_checkpoint
from ds_fira.tools.estimate import command as estimate
from ds_fira.tools.run_report import plots

# Each has `register(commands)`, which adds a parser whose default `run` is called with the parsed arguments, gives the
# exit status (None for 0), and raises ValueError, with one sentence, for arguments that are not legal.
COMMANDS = (estimate, plots, inspect_checkpoint)


def main(argv: list[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ds_fira", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.register(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"python -m ds_fira {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
