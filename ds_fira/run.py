"""Run a training that knows nothing of ds_fira: `deepspeed --module ds_fira.run train.py --args`.

Or a module, as python does: `torchrun -m ds_fira.run -m package.module --args`. Registers the optimizers of ds_fira,
with the Trainer too (`ds_fira.hf`), then runs the script or the module as `__main__` with its own arguments. Without a
GPU it also keeps DeepSpeed from compiling its shared-memory collectives, which needs a C++ compiler and up to a minute.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

from ds_fira import hf  # the import of ds_fira registers
from ds_fira.runtime.process import skip_shared_memory_op


def main(argv: list[str] | None = None) -> None:
    """Run the script, or behind -m the module, named by the first argument that is not the launcher's.

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
        print("usage: deepspeed --module ds_fira.run {SCRIPT | -m MODULE} [ARGUMENTS]", file=sys.stderr)
        sys.exit(0 if argv else 2)
    if argv[0] == "-m":
        _run_module(argv[1:], passed_on)
        return
    script = Path(argv.pop(0))
    if not script.is_file():
        print(f"ds_fira.run: {script} is not a file; give the path of a training script.", file=sys.stderr)
        sys.exit(2)
    _prepare()
    sys.argv = [str(script), *passed_on, *argv]
    # As python does for a script, so that it can import what lies beside it.
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


def _run_module(argv: list[str], passed_on: list[str]) -> None:
    """Run a module as `python -m` does: it may import what lies in the folder that the run was started in."""
    sys.path.insert(0, os.getcwd())
    try:
        known = bool(argv) and importlib.util.find_spec(argv[0]) is not None
    except (ImportError, ValueError):  # of a package before it that is not there, or no name
        known = False
    if not known:
        named = f"{argv[0]} is no module that can be imported" if argv else "-m names no module"
        print(f"ds_fira.run: {named}; give its name, such as package.module.", file=sys.stderr)
        sys.exit(2)
    _prepare()
    sys.argv = [argv[0], *passed_on, *argv[1:]]
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _prepare() -> None:
    skip_shared_memory_op()
    hf.register_when_imported()


if __name__ == "__main__":
    main()
