"""Run a training script that knows nothing of ds_fira: `deepspeed --module ds_fira.run train.py --args`.

Registers the optimizers of ds_fira, then runs the script as `__main__` with its own arguments. Without a GPU it also
keeps DeepSpeed from compiling its shared-memory collectives, which needs a C++ compiler and up to a minute.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import ds_fira  # noqa: F401  (the import registers)
from ds_fira.runtime.process import skip_shared_memory_op


def main(argv: list[str] | None = None) -> None:
    """Run the script named by the first argument that is not the launcher's.

    Args:
        argv: arguments without the program's name. The DeepSpeed launcher puts `--local_rank=N` in front of them; it
            goes on to the script, as the launcher would have passed it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    passed_on = []
    while argv and argv[0].startswith("--local_rank"):
        passed_on.append(argv.pop(0))
    if not argv or argv[0] in ("-h", "--help"):
        # Not a status that launch/run.sh would start again on.
        print("usage: deepspeed --module ds_fira.run SCRIPT [ARGUMENTS]", file=sys.stderr)
        sys.exit(0 if argv else 2)
    script = Path(argv.pop(0))
    if not script.is_file():
        print(f"ds_fira.run: {script} is not a file; give the path of a training script.", file=sys.stderr)
        sys.exit(2)
    skip_shared_memory_op()
    sys.argv = [str(script), *passed_on, *argv]
    # As python does for a script, so that it can import what lies beside it.
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
