"""`python -m ds_fira` writes data to stdout and everything else to stderr; imported for that before anything else.

DeepSpeed's logger takes hold of stdout when it is imported, and says there, on a machine without an accelerator, that
there is none. In the process of a command it gets stderr instead; in every other process nothing changes.
"""

from __future__ import annotations

import contextlib
import sys


def is_command() -> bool:
    """Whether this process is `python -m ds_fira`, asked while Python imports the package to find `__main__`."""
    names = ("ds_fira", "ds_fira.__main__")
    # While it looks for the module, Python keeps "-m" where the name of the script will be.
    return sys.argv[:1] == ["-m"] and any(part in names or part.endswith("mds_fira") for part in sys.orig_argv[1:])


if is_command():
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed  # noqa: F401
