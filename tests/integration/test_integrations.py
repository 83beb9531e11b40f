"""The diffs of docs/integrations: they apply to the releases that they name, and what they add trains."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

import ds_fira

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "integrations"
PROJECTS = {"llamafactory": "llamafactory==0.9.5", "ms_swift": "ms-swift==4.6.0"}


def diff_of(name: str) -> Path:
    """The file of a project's diff."""
    return FOLDER / f"{name}.diff"


@pytest.mark.parametrize("name", PROJECTS)
def test_a_diff_holds_our_own_lines_only(name: str) -> None:
    """It adds lines, and quotes none of the project's; its page names the release and shows it."""
    lines = [line for line in diff_of(name).read_text().splitlines() if not line.startswith(("---", "+++", "@@"))]
    assert lines
    assert {line[:1] for line in lines} == {"+"}
    page = (FOLDER / f"{name}.md").read_text()
    assert PROJECTS[name] in page
    shown = re.search(r"```diff\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == diff_of(name).read_text().strip()


@pytest.fixture(name="patched", params=PROJECTS)
def _patched(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A project's name, and the folder of its release with the diff applied; skipped where it cannot be had."""
    name, source = request.param, tmp_path / "source"
    if shutil.which("patch") is None:
        pytest.skip("there is no program `patch`")
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", PROJECTS[name]]
    if subprocess.run([*fetch, "-d", str(tmp_path)], check=False, capture_output=True, timeout=120).returncode:
        pytest.skip(f"{PROJECTS[name]} cannot be downloaded")
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(source)
    subprocess.run(["patch", "-p1", "--fuzz=0", "-i", str(diff_of(name))], cwd=source, check=True, capture_output=True)
    before = dict(sys.modules)
    yield name, source
    for added in sys.modules.keys() - before.keys():
        if added.partition(".")[0] in ("llamafactory", "swift"):
            del sys.modules[added]


def load(source: Path, name: str) -> Any:
    """A module of an unpacked release, without what its packages import beside it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(source.joinpath(*parts[:depth]))]
        sys.modules[package.__name__] = package
    return importlib.import_module(name)


def made_by(name: str, source: Path, model: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that the patched project makes of a model."""
    if name == "ms_swift":
        load(source, "swift.optimizers.fira")
        callback = sys.modules["swift.optimizers.fira"].FiraOptimizerCallback(args, SimpleNamespace(model=model))
        assert "'fira': FiraOptimizerCallback" in (source / "swift/optimizers/mapping.py").read_text()
        return callback.create_optimizer()
    finetuning = load(source, "llamafactory.hparams.finetuning_args").FinetuningArguments(
        use_fira=True, fira_rank=4, fira_target="up", fira_scale=0.5
    )
    tree = ast.parse((source / "llamafactory/train/trainer_utils.py").read_text())
    wanted = ("_create_fira_optimizer", "create_custom_optimizer")
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    scope: dict[str, Any] = {"Optional": None, "_create_galore_optimizer": None}
    exec("from __future__ import annotations\n" + "\n".join(map(ast.unparse, body)), scope)
    return scope["create_custom_optimizer"](model, args, finetuning)


@pytest.mark.full
def test_a_patched_project_makes_a_fira_adam(patched: tuple[str, Path], tmp_path: Path) -> None:
    """With its own settings; it projects the linear layers, and a step of it changes them."""
    name, source = patched
    for file in re.findall(r"^\+\+\+ b/(\S+)", diff_of(name).read_text(), re.MULTILINE):
        compile((source / file).read_text(), file, "exec")
    model = nn.ModuleDict({"up": nn.Linear(8, 12), "norm": nn.LayerNorm(12)})
    args = TrainingArguments(str(tmp_path), learning_rate=0.01, optim_args="rank=4,alpha=0.5", use_cpu=True)
    optimizer = made_by(name, source, model, args)
    assert isinstance(optimizer, ds_fira.FiraAdam)
    assert [(group.get("rank"), group["lr"]) for group in optimizer.param_groups] == [(4, 0.01), (None, 0.01)]
    assert optimizer.param_groups[0]["alpha"] == 0.5
    before = model["up"].weight.detach().clone()
    model["norm"](model["up"](torch.randn(3, 8))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model["up"].weight)
