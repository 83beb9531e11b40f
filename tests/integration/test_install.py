"""The package as pip builds it: whole, and working where neither the repository nor DeepSpeed is in sight."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.programs import ROOT

TRAIN = """
import sys
sys.modules["deepspeed"] = None  # an import of it fails
import torch, ds_fira
assert ds_fira.__file__.startswith(sys.argv[1]), ds_fira.__file__
param = torch.nn.Parameter(torch.ones(6, 8))
optimizer = ds_fira.FiraAdam([param], lr=0.1, rank=2)
param.grad = torch.randn(6, 8)
optimizer.step()
assert not torch.equal(param, torch.ones(6, 8))
print("stepped")
"""


@pytest.mark.full
def test_a_wheel_holds_everything_and_steps_without_deepspeed(tmp_path: Path) -> None:
    """Every module and data file of the repository is in it, and a lone FiraAdam needs torch alone."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    source.mkdir()
    files = [path for path in (ROOT / "ds_fira").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in [*files, *(ROOT / name for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"))]:
        copied = source / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(installed)
    assert {path.relative_to(ROOT).as_posix() for path in files} <= held
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(installed)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "stepped"
