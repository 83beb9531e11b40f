"""The package as it is built: complete, and working where neither the repository nor DeepSpeed is in sight."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ds_fira.version import __version__
from tests.programs import ROOT
from tests.ranks import free_port

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
NOT_BUILT = (".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")

ALONE = """
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
# Knows nothing of ds_fira, which `ds_fira.run` registers.
TRAIN = """
import sys
import deepspeed, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64))
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config="ds_config.json")
x = torch.randn(2, 64, dtype=torch.bfloat16)
for _ in range(4):
    loss = (engine(x) - x).square().mean()
    engine.backward(loss)
    engine.step()
kind, where = type(engine.basic_optimizer), sys.modules["ds_fira"].__file__
# In one piece: the launcher's processes share the output.
sys.stdout.write(f"{kind.__name__} {where} step {engine.global_steps} of rank {engine.global_rank}\n")
"""


def requirements() -> dict[str, Requirement]:
    """Every requirement of setup.cfg, by the option and the line that it stands in."""
    options = {"install_requires": SETUP["options"]["install_requires"], **SETUP["options.extras_require"]}
    lines = [(name, line) for name, text in options.items() for line in text.split("\n") if line]
    return {f"{name}: {line}": Requirement(line) for name, line in lines}


def test_python_versions_are_one_statement() -> None:
    """Metadata, README, the set-up script and the linter name the same oldest Python."""
    required = SETUP["options"]["python_requires"]
    oldest = required.removeprefix(">=")
    assert sys.version.split()[0] in SpecifierSet(required)
    assert f"Programming Language :: Python :: {oldest}" in SETUP["metadata"]["classifiers"].split("\n")
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text()
    assert f"({oldest.replace('.', ', ')})" in (ROOT / "launch" / "setup.sh").read_text()
    assert f'"py{oldest.replace(".", "")}"' in (ROOT / "ruff.toml").read_text()


def test_the_pinned_versions_are_within_the_bounds() -> None:
    """What the tests install is what the metadata allows; every package that a test needs is pinned."""
    names = {name.lower().replace("_", "-"): version for name, version in PINNED.items()}
    for where, requirement in requirements().items():
        version = names.get(requirement.name.lower().replace("_", "-"))
        assert version is not None, f"{where} is not in constraints.txt"
        assert requirement.specifier.contains(version, prereleases=True), f"{where} is pinned at {version}"


def test_the_version_is_that_of_changelog_and_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors", "license", "preferred-citation"} <= citation.keys()
    assert citation["license"] == SETUP["metadata"]["license"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] in (__version__, "Unreleased")


def files_below(folder: Path) -> set[str]:
    """Every file that belongs to the repository, by its path, links to folders followed."""
    ignored = shutil.ignore_patterns(*NOT_BUILT)
    found = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        left_out = ignored(at, [*folders, *files])
        folders[:] = [name for name in folders if name not in left_out]
        found |= {str((Path(at) / name).relative_to(folder)) for name in files if name not in left_out}
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the source distribution, made of a copy of the repository, and of the wheel, made of that."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*NOT_BUILT))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    # Away from the repository, whose editable installation a build must not find.
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def environment(built: Path) -> Path:
    """A new environment that holds the wheel, and of the tests' environment only what it depends on."""
    folder = built / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True, cwd=built)
    # Of a path that is added so, Python runs no .pth files: the editable installation of ds_fira is not found in it.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return folder


def run(environment: Path, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of an environment, on a machine that says nothing of its accelerator."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DS_ACCELERATOR")}
    path = f"{environment / 'bin'}:{kept['PATH']}"
    program = str(environment / "bin" / command[0])
    variables = {**kept, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [program, *command[1:]], cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.full
def test_what_is_built_is_complete_and_well_described(built: Path) -> None:
    """The wheel has every file of the package, the source distribution every file of the repository; twine accepts."""
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        assert files_below(ROOT / "ds_fira") <= {name.removeprefix("ds_fira/") for name in archive.namelist()}
        assert not {name for name in archive.namelist() if not name.startswith("ds_fira")}
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
        assert all(member.isfile() for member in members)
        held = {member.name.partition("/")[2] for member in members}
    assert files_below(ROOT) - held == set()
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.full
def test_a_wheel_steps_without_deepspeed(environment: Path, tmp_path: Path) -> None:
    """A lone FiraAdam needs torch alone."""
    done = run(environment, "python", "-c", ALONE, str(environment), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "stepped"


@pytest.mark.full
@pytest.mark.timeout(900)  # six new interpreters, for machines that are busy
def test_a_wheel_trains_by_its_own_config_under_the_launcher(environment: Path, tmp_path: Path) -> None:
    """As the first page says: print a config, ask what it does, train with it on two ranks."""
    printed = run(environment, "ds-fira", "config", "zero2_bf16", folder=tmp_path)
    assert (printed.returncode, printed.stdout) == (0, (ROOT / "ds_configs" / "zero2_bf16.json").read_text())
    (tmp_path / "ds_config.json").write_text(printed.stdout)
    asked = run(
        environment, "ds-fira", "doctor", "ds_config.json", "--model", "llama_60m", "--gpus", "2", folder=tmp_path
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("versions ")
    assert f"ds_fira {__version__}" in asked.stdout
    assert run(environment, "ds-fira", "config", "zero9", folder=tmp_path).returncode == 2
    (tmp_path / "train.py").write_text(TRAIN)
    launcher = ["python", "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    done = run(environment, *launcher, "--module", "ds_fira.run", "train.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = sorted(line for line in done.stdout.splitlines() if "of rank" in line)
    assert [line.split()[0] for line in lines] == ["FiraAdam", "FiraAdam"]
    assert all(str(environment) in line and "step 4" in line for line in lines)
