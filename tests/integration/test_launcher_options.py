"""Every option of the examples reaches them under every launcher: none is the beginning of several of its own."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable

import pytest
from accelerate.commands.launch import launch_command_parser
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

from tests.programs import ROOT

LAUNCHERS: dict[str, tuple[Callable[[list[str]], Namespace], str]] = {
    "torchrun": (lambda line: get_args_parser().parse_args(line), "training_script_args"),
    "deepspeed": (runner.parse_args, "user_args"),
    "accelerate launch": (lambda line: launch_command_parser().parse_args(line), "training_script_args"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_options_pass(launcher: str) -> None:
    texts = [path.read_text() for path in (ROOT / "examples").rglob("*.py")]
    options = sorted(set(re.findall(r'"(--[a-z][a-z0-9_-]*)"', "".join(texts))))
    assert {"--monitors", "--save-every", "--resume"} <= {*options}
    parse, given = LAUNCHERS[launcher]
    for option in options:
        line = [option, "value", f"{option}=value"]
        assert getattr(parse(["train.py", *line]), given) == line


def test_behind_two_dashes_torchrun_reads_nothing_of_a_script_s_own() -> None:
    """As `launch/run.sh` calls it: `--monitor` alone would be the beginning of two of torchrun's options."""
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["train.py", "--monitor", "csv"])
    found = get_args_parser().parse_args(["--nproc_per_node", "2", "--", "train.py", "--monitor", "csv"])
    assert (found.training_script, found.training_script_args) == ("train.py", ["--monitor", "csv"])
    assert '--nproc_per_node "$nproc" -- "$@"' in (ROOT / "launch" / "run.sh").read_text()
