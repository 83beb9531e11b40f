"""`ds-fira checkpoint`: its exit status and standard output are an interface."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fira.__main__ import main
from tests.programs import run_command
from tests.ranks import Pools

MODEL = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def saved(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of float32 states, whole ones and such with a number that is not finite."""
    folder = tmp_path_factory.mktemp("spoiled")
    for state_dtype in ("float32", "int8"):
        ranks.run(
            2, "spoiled", "tests.distributed.safe_jobs", folder=str(folder / state_dtype), state_dtype=state_dtype
        )
    return folder


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it, on a machine that says nothing of its accelerator."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment["PYTHONPATH"] = os.getcwd()
    command = [sys.executable, "-m", "ds_fira", "checkpoint", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)


@pytest.mark.full
def test_as_a_shell_starts_it(saved: Path) -> None:
    """In a new interpreter."""
    fine = call(str(saved / "float32"), "--tag", "fine", "--verify", "--json")
    assert (fine.returncode, len(json.loads(fine.stdout))) == (0, 1)
    assert "Traceback" not in fine.stderr


def test_as_a_shell_runs_it(saved: Path, tmp_path: Path) -> None:
    """Standard output is one JSON document or the text, and everything else is on standard error."""
    folder = shutil.copytree(saved / "float32", tmp_path / "copy")

    def forked(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_command(["checkpoint", *arguments], tmp_path, {"DS_ACCELERATOR": None})

    fine = forked(str(folder), "--tag", "fine", "--verify", "--json")
    assert fine.returncode == 0
    (entry,) = json.loads(fine.stdout)
    assert (entry["fault"], entry["step"], entry["states"]["finite"]) == (None, 1, True)
    content = bytearray((folder / "fine" / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "fine" / MODEL).write_bytes(content)
    changed = forked(str(folder), "--verify", "--json")
    assert changed.returncode == 1
    entries = {entry["tag"]: entry["fault"] for entry in json.loads(changed.stdout)}
    assert entries.pop("fine") == f"the content of its file {MODEL} has changed"
    assert not any(entries.values())
    missing = forked(str(folder), "--tag", "nowhere")
    assert (missing.returncode, missing.stdout) == (1, "nowhere: not complete: it is missing\n")
    empty = forked(str(tmp_path / "nothing"), "--json")
    assert (empty.returncode, empty.stdout) == (2, "")
    assert "nothing is no folder; name one that holds checkpoints." in empty.stderr
    assert forked("--never").returncode == 2
    for found in (fine, changed, missing, empty):
        assert "Traceback" not in found.stderr


def test_status_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a user looks."""
    with pytest.raises(SystemExit):
        main(["checkpoint", "--help"])
    assert "exit status:\n  0  every checkpoint listed is complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state_dtype", "tag", "found"),
    [
        ("float32", "limiters", "limiters of layers"),
        ("float32", "bases", "bases of layers"),
        ("float32", "moments", "moments of layers"),
        ("float32", "moments of AdamW", "moments of "),
        ("float32", "master weights", "master weights of "),
        ("int8", "scales of moments", "scales of moments of layers"),
        ("int8", "scales of moments of AdamW", "scales of moments of "),
        ("int8", "master weights", "master weights of "),
    ],
)
def test_what_is_not_finite_is_named(
    saved: Path, state_dtype: str, tag: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is of: all that is called finite has been read."""
    assert main(["checkpoint", str(saved / state_dtype), "--tag", tag, "--json"]) == 1
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["fault"] is None
    assert entry["states"]["finite"] is False
    (named,) = entry["states"]["not_finite"]
    assert named.startswith(found)
    assert main(["checkpoint", str(saved / state_dtype), "--tag", tag]) == 1
    assert f"NOT FINITE: {named}: load an older one" in capsys.readouterr().out
    assert main(["checkpoint", str(saved / state_dtype), "--tag", "fine"]) == 0
    told = capsys.readouterr().out
    assert (
        f"all finite: the module's weights, master weights, bases, limiters, {'scales of ' * (state_dtype == 'int8')}"
    )
    assert "moments" in told.rpartition("all finite")[2]


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


STRANGE: dict[str, Any] = {
    "a model without keys": lambda tag: _write(tag / MODEL, {"module": {}}),
    "no optimizer": lambda tag: _write(tag / MODEL, {"optimizer": None, "global_steps": 1, "dp_world_size": 1}),
    "a step that is none": lambda tag: _write(tag / MODEL, {"optimizer": {"param_groups": []}, "global_steps": "x"}),
    "groups that are none": lambda tag: _write(
        tag / MODEL, {"optimizer": {"param_groups": 3}, "global_steps": 1, "dp_world_size": 1}
    ),
    "a description that is none": lambda tag: _write(
        tag / MODEL,
        {"optimizer": {"param_groups": [], "fira": 3}, "global_steps": 1, "dp_world_size": 1, "module": {}},
    ),
    "a tag with a control character": lambda tag: _write(tag.with_name("\x1b[31mred\n") / MODEL, [1]),
    "latest is a folder": lambda tag: (tag.parent / "latest").mkdir(),
    "latest is no text": lambda tag: (tag.parent / "latest").write_bytes(b"\xff\xfe\x00"),
    "latest is long": lambda tag: (tag.parent / "latest").write_text("x" * 5000),
    "a loop of links": lambda tag: (tag / "loop").symlink_to(tag / "loop"),
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize("options", [[], ["--verify", "--json"], ["--tag", "x"]])
def test_a_strange_folder_ends_in_one_sentence(
    case: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never in a traceback, and never in a status that says all is well."""
    (tmp_path / "x").mkdir()
    STRANGE[case](tmp_path / "x")
    assert main(["checkpoint", str(tmp_path), *options]) in (1, 2)
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err
    if "--json" in options and told.out:
        assert all(entry["fault"] for entry in json.loads(told.out))
    else:
        assert len((told.out + told.err).splitlines()) <= 3
