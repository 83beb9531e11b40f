"""A newcomer's hour, timed: the first pages of the site, word by word, from a clone to a text of one's own.

Every block of bash, Python and JSON of these pages is run or saved as it stands, in the order of the pages, at the top
of a clone that lies in an empty folder. Only two things are not as a newcomer has them. The packages of
`constraints.txt` are there already, so that pip finds them instead of fetching them (`test_install.py` looks at what is
installed). And the text is what the page offers to whoever has none at hand.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoModelForCausalLM

from tests.integration.page_blocks import ROOT, Block, blocks
from tests.integration.test_install import NOT_BUILT

PAGES = ("start.md", "own_text.md")
SAVED_AS = re.compile(r"[Ss]ave this\b[^`]*`([\w.]+)`[^`]*$")
# Lines that go on to act in the blocks behind them, as in one terminal.
LASTING = ("source ", "cd ", "export ")
PROGRAMS = ("deepspeed", "pip", "torchrun")


class Done(NamedTuple):
    """What became of a block: its text, what it printed, seconds of the clock and of all its processes."""

    block: Block
    printed: str
    seconds: float
    processor: float


def saved_as(block: Block) -> str | None:
    """The name under which the sentence before a block says to save it."""
    before = (ROOT / "docs" / block.page).read_text().splitlines()[: block.line - 1]
    found = SAVED_AS.search(" ".join(before[-4:]))
    return found[1] if found else None


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, and in it a `.venv` that finds what the tests' environment holds, but not ds_fira."""
    folder = tmp_path_factory.mktemp("newcomer") / "ds_fira"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*NOT_BUILT))
    environment = folder / ".venv"
    venv.create(environment, with_pip=False, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    # Of a path that is added so, Python runs no .pth files: the editable installation of ds_fira is not found in it.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    for name in PROGRAMS:
        program = environment / "bin" / name
        lines = (Path(sys.executable).parent / name).read_text().splitlines(keepends=True)
        program.write_text("".join([f"#!{environment / 'bin' / 'python'}\n", *lines[1:]]))
        program.chmod(0o755)
    return folder


def follow(folder: Path) -> list[Done]:
    """Do what the pages say, block by block; stops at the first that fails."""
    outside = ("PYTHONPATH", "VIRTUAL_ENV", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in outside}
    # The system's programs; pip has nothing to fetch, neither packages nor what builds one.
    path = ":".join(part for part in kept["PATH"].split(":") if Path(part) != Path(sys.executable).parent)
    variables = {**kept, "PATH": path, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHON": sys.executable}
    lasting: list[str] = []
    found = []
    for block in (block for page in PAGES for block in blocks(ROOT / "docs" / page)):
        assert block.reason is None, f"{block} is not run"
        name = saved_as(block)
        if name is not None:
            (folder / name).write_text(block.text)
            continue
        if block.language == "python":
            (folder / "typed.py").write_text(block.text)
        command = "python typed.py" if block.language == "python" else block.text
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        ended = subprocess.run(
            ["bash", "-e", "-c", "\n".join([*lasting, command])],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append(Done(block, ended.stdout, time.monotonic() - began, processor))
        print(
            f"{found[-1].seconds:6.0f} s, {processor:6.0f} of processors  {block}  {command.splitlines()[0]}",
            flush=True,
        )
        assert ended.returncode == 0, f"{block}\n{block.text}\n{ended.stdout[-6000:]}"
        lasting += [line for line in block.text.splitlines() if line.startswith(LASTING)]
    return found


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_first_pages_word_by_word(clone: Path) -> None:
    """A JSON diagnosed, a text trained, resumed on another number of processes, reported, opened by transformers."""
    done = follow(clone)
    seconds, processor = (
        sum(column) for column in zip(*((each.seconds, each.processor) for each in done), strict=True)
    )
    print(f"{seconds:6.0f} s, {processor:6.0f} of processors  in all")

    def printed(start: str) -> list[str]:
        (found,) = (each.printed for each in done if start in each.block.text)
        return found.splitlines()

    quickstart = clone / "runs" / "quickstart"
    assert all((quickstart / name).exists() for name in ("summary.json", "loss.png", "report.html", "model"))
    figures = json.loads((quickstart / "summary.json").read_text())
    assert figures["val_loss"] < figures["unigram_entropy"] or figures["steps"] < figures["steps_requested"]
    losses = re.findall(r"rank \d: loss [\d.]+ after 20 steps", "\n".join(printed("deepspeed --num_gpus 2")))
    assert len(losses) == 2

    assert printed("doctor mine.json")[-1] == "verdict   would train"
    refused, status = printed("doctor slip.json")[-2:]
    assert "unknown setting 'rnak' = 32; did you mean 'rank'?" in refused
    assert status == "status 2"

    mine = clone / "runs" / "mine"
    figures = json.loads((mine / "summary.json").read_text())
    assert (figures["steps"], figures["world_size"]) == (60, 1)
    assert figures["deepspeed_config"]["train_batch_size"] == 16
    recorded = json.loads(next(mine.rglob("fira_run.json")).read_text())["starts"]
    assert [(start["step"], start["ranks"]) for start in recorded] == [(0, 2), (40, 1)]
    assert all(f"global_step{step}" in "\n".join(printed("checkpoint runs/mine/state")) for step in (20, 40, 60))
    for page in (mine / "report.html", clone / "compare.html"):
        assert page.read_text().count("<figure>") >= 7
    assert "The optimizer" in "\n".join(printed("AutoModelForCausalLM"))
    model, exported = AutoModelForCausalLM.from_pretrained(mine / "model"), list((mine / "fp32").iterdir())
    assert sum(each.numel() for each in model.parameters()) == figures["parameters"]
    assert exported


def test_blocks_are_saved_where_the_page_says() -> None:
    """The sentence before a block names the file, and no other sentence does."""
    named = {str(block): saved_as(block) for page in PAGES for block in blocks(ROOT / "docs" / page)}
    assert [name for name in named.values() if name] == ["ds_config.json", "train.py", "mine.json"]
