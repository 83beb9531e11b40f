"""Start and end of processes; DeepSpeed is found here, and imported first."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys


def import_deepspeed() -> bool:
    """Import DeepSpeed where it is installed; gives whether it is.

    `ds-fira` and `python -m ds_fira` write data to stdout and everything else to stderr. DeepSpeed's logger takes hold
    of stdout as it is imported, and says there, on a machine without an accelerator, that there is none. In the process
    of a command it gets stderr instead.
    """
    try:
        if importlib.util.find_spec("deepspeed") is None:
            return False
    except ImportError:  # another one's finder refuses it
        return False
    with contextlib.redirect_stdout(sys.stderr if _is_command() else sys.stdout):
        import deepspeed  # noqa: F401
    return True


def _is_command() -> bool:
    """Whether this process is `ds-fira`, or `python -m ds_fira` that imports the package to find `__main__`."""
    if os.path.basename(sys.argv[0] if sys.argv else "") == "ds-fira":
        return True
    names = ("ds_fira", "ds_fira.__main__")
    # While it looks for the module, Python keeps "-m" where the name of the script will be.
    return sys.argv[:1] == ["-m"] and any(part in names or part.endswith("mds_fira") for part in sys.orig_argv[1:])
