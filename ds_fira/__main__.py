"""`ds-fira COMMAND`, also `python -m ds_fira COMMAND`: what can be asked before and after training."""

from __future__ import annotations

import sys

from ds_fira.tools import commands, config_files, inspect_checkpoint
from ds_fira.tools.doctor import command as doctor
from ds_fira.tools.estimate import command as estimate
from ds_fira.tools.run_report import plots

COMMANDS = (config_files, doctor, estimate, plots, inspect_checkpoint)


def main(argv: list[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    return commands.run(COMMANDS, "What can be asked before and after training with FiraAdam.", argv)


if __name__ == "__main__":
    sys.exit(main())
