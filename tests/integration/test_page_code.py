"""What the pages tell a reader to type works: Python runs, JSON is legal, commands and the files they name exist."""

from __future__ import annotations

import glob
import importlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_fira.core.algorithms import KEY, algorithm_of
from ds_fira.optim.settings import check_params
from tests.integration.page_blocks import FOLDERS, PAGES, ROOT, Block, blocks, commands, fault, is_command, spans
from tests.programs import Forked, run_command

PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*{{}},-]+")
NAME = re.compile(r"ds_fira(?:\.\w+)+")
ALL = [block for page in PAGES for block in blocks(page)]
# What a page takes for granted: an engine that trains, as the pages before it have built one.
IMPORTS = "import os, sys\nimport torch\nimport ds_fira\n"
GIVEN = """
import deepspeed
from tests.small_models import SEQUENCE, VOCABULARY, llama
ds_fira.init_distributed()
config = {
    "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1},
    "optimizer": {"type": "FiraAdam", "params": {"rank": 2, "lr": 0.01, "record_scaling_factors": 1}},
}
model, folder, batch = llama(), "state", 3
engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
module, rows = engine.module, torch.randint(VOCABULARY, (2, SEQUENCE))
engine.module.forward = lambda rows, forward=module.forward: forward(input_ids=rows, labels=rows).loss
batches = [rows, rows]
engine.backward(engine(rows)); engine.step()
os.makedirs("runs/mine", exist_ok=True)
engine.save_checkpoint("state")
"""
# Pages whose Python needs it.
WITH_ENGINE = ("checkpointing.md", "configs.md", "launching.md", "monitoring.md")
# What a reader tries first; of plug_and_play.md a unit test runs every block.
IN_EVERY_RUN = ("finetuning.md", "migrate.md", "start.md")
# Whose Python needs what the commands before it have made; test_newcomer.py runs both, in their order.
FOLLOWED = ("own_text.md",)


def of(language: str) -> list[Block]:
    return [block for block in ALL if block.language == language and block.reason is None]


def pages_with(language: str) -> list[object]:
    names = dict.fromkeys(block.page for block in of(language) if block.page not in FOLLOWED)
    return [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.full) for name in names]


def test_every_block_says_what_it_is() -> None:
    """In a language that is run here, or as the output of a command, or with a reason."""
    assert not [str(block) for block in ALL if block.language not in ("bash", "python", "json", "text", "bibtex")]
    assert not [str(block) for block in ALL if block.reason is not None and len(block.reason) < 10]
    assert len(of("bash")) + len(of("python")) + len(of("json")) > 60


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page: str, tmp_path: Path) -> None:
    """The blocks of a page in one process, in a folder that has the JSON of the page as ds_config.json."""
    for block in of("json"):
        if block.page == page and block.text.startswith("{"):
            (tmp_path / "ds_config.json").write_text(block.text)
    code = [IMPORTS, GIVEN] if page in WITH_ENGINE else [IMPORTS]
    # As lines of the page, for a traceback to name the block.
    code += [f"exec(compile({block.text!r}, {str(block)!r}, 'exec'))" for block in of("python") if block.page == page]
    script = tmp_path / "train.py"
    script.write_text("\n".join(code))
    # With what a launcher tells the one rank that it starts.
    (ended,) = Forked(str(script), [], tmp_path, ranks=1).wait()
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_is_legal(block: Block) -> None:
    """A whole config, or a part of one without the braces around it."""
    config = json.loads(block.text if block.text.startswith("{") else f"{{{block.text}}}")
    if "optimizer" in config:
        optimizer = config["optimizer"]
        check_params(optimizer["params"], algorithm=algorithm_of({KEY: optimizer["type"]}))
    if block.text.startswith("{"):
        assert "gradient_clipping" in config, "DeepSpeed clips at 1.0 where it is missing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    """Programs, files, modules, tests, extras and options of every command in a block or between backticks."""
    found = [(str(block), words) for block in of("bash") if block.page == page.name for words in commands(block.text)]
    found += [(page.name, words) for span in spans(page) if is_command(span) for words in commands(span)]
    assert not [(place, " ".join(words), what) for place, words in found if (what := fault(words)) is not None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_exist(page: Path) -> None:
    words = [word.rstrip(".,:;").partition("::")[0] for span in spans(page) for word in span.split()]
    assert not [word for word in words if PATH.fullmatch(word) and not any(map(glob.glob, alternatives(word)))]
    names = [found[0] for span in spans(page) if (found := NAME.match(span))]
    assert not [name for name in names if not resolves(name)]


def alternatives(path: str) -> list[str]:
    """The paths that a shell would make of `a/{b,c}`, from the top of the repository."""
    braces = re.search(r"\{([^}]*)\}", path)
    middles = braces[1].split(",") if braces else [""]
    start, end = (path[: braces.start()], path[braces.end() :]) if braces else (path, "")
    return [str(ROOT / f"{start}{middle}{end}") for middle in middles]


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def printed() -> list[tuple[Block, Block]]:
    """Commands of this package with what they print: a block of bash, and the block of text behind it."""
    pairs = [(one, two) for one, two in itertools.pairwise(ALL) if one.page == two.page]
    behind = [(one, two) for one, two in pairs if two.line - one.line <= one.text.count("\n") + 4]
    return [(one, two) for one, two in behind if (one.language, two.language) == ("bash", "text")]


@pytest.mark.full
@pytest.mark.parametrize(("command", "output"), printed(), ids=str)
def test_commands_print_what_the_page_shows(command: Block, output: Block, tmp_path: Path) -> None:
    (words,) = commands(command.text)
    assert words[:3] == ["python", "-m", "ds_fira"]
    ended = run_command(words[3:], tmp_path, variables={"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr
    assert output.text in ended.stdout


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("bash launch/nothing.sh", "does not exist"),
        ("python -m benchmarks.speed.nothing", "does not exist"),
        ("python -m ds_fira estimate --model llama_7b --ranks 8", "no option --ranks"),
        ("bash launch/llama_7b.sh --date /data", "no option --date"),
        ("bash launch/test.sh tests/unit/test_architecture.py::test_nothing", "has no test"),
        ("pip install 'ds_fira[nothing]'", "no extra"),
        ("deepspeed --num_gpus 2 examples/nothing.py", "does not exist"),
    ],
)
def test_faults_are_found(command: str, what: str) -> None:
    (words,) = commands(command)
    assert what in str(fault(words))


def test_names_and_files_that_are_gone_are_found() -> None:
    check: list[tuple[Callable[[str], object], str, str]] = [
        (resolves, "ds_fira.core.step.update", "ds_fira.core.step.nothing"),
        (lambda path: any(map(glob.glob, alternatives(path))), "launch/llama_{1b,9b}.sh", "launch/llama_{8b,9b}.sh"),
    ]
    for is_there, good, bad in check:
        assert is_there(good)
        assert not is_there(bad)
