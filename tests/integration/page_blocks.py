"""What the pages tell a reader to type: blocks of code, commands in the text, names of files and of Python."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
RUN = ("python", "bash", "torchrun", "deepspeed", "ds-fira", "mpirun", "sbatch", "accelerate", "pip")
LAUNCHERS = ("deepspeed", "torchrun", "mpirun", "accelerate", "srun", "sbatch")
# Programs of others, whose arguments are theirs to check.
OTHERS = ("cat", "cd", "echo", "export", "git", "hf", "pre-commit", "ruff", "sed", "source", "tensorboard")
FOLDERS = ("benchmarks", "docs", "ds_configs", "ds_fira", "examples", "launch", "tests")
# What stands for a script or a file of the reader's.
OF_THE_READER = ("train.py", "SCRIPT", "FILE")
# Where a script's options are defined: in itself and in these folders.
PARTS = {
    "examples/pretrain_llama.py": ("examples/pretraining",),
    "examples/finetuning/commonsense.py": ("examples/finetuning",),
    "examples/hf_trainer.py": ("examples/huggingface",),
    "examples/accelerate_train.py": ("examples/huggingface",),
    "examples/memory_savings.py": ("examples/memory",),
    "launch/gpu_check.sh": ("benchmarks/gpu_check",),
}
PRETRAINING = "examples/pretrain_llama.py"
# What the scripts hand on to pytest.
PYTEST = ("--full", "--timeout", "-s", "-k", "-q", "-x")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its place, its language, its text, and why it is not run, if it is not."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@functools.cache
def blocks(page: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page, in its order."""
    text = page.read_text()
    return tuple(
        Block(page.name, text.count("\n", 0, found.start("text")), found["language"], found["text"], found["reason"])
        for found in FENCE.finditer(text)
    )


def spans(page: Path) -> Iterator[str]:
    """What stands between single backticks, outside of blocks."""
    for found in SPAN.finditer(FENCE.sub("", page.read_text())):
        yield " ".join(found[1].split())


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell text: their words, without comments, variables and what is redirected."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        command: list[str] = []
        redirected = False
        for word in [*words, "&&"]:
            if redirected:
                redirected = False
            elif word == ">":
                redirected = True
            elif word in ("&&", "||", "|", ";"):
                while command and re.match(r"[A-Z_]+\w*=", command[0]):
                    command.pop(0)
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def is_command(span: str) -> bool:
    """Whether a text between backticks is a command that a reader could type, and not the name of a program."""
    words = [word for word in span.split() if not re.match(r"[A-Z_]+\w*=", word)]
    return len(words) > 1 and words[0] in RUN and not words[1].endswith(",")


def fault(words: list[str]) -> str | None:
    """What is wrong with a command: a file, test, module, extra or option that does not exist; None if nothing is."""
    program, *rest = words
    if program in OTHERS or program in OF_THE_READER:
        return None
    if program == "pip":
        return _pip_fault(rest)
    if program == "ds-fira":
        return _module_fault("ds_fira", rest)
    if program == "python" and rest[:1] == ["-c"]:
        compile(rest[1], "page", "exec")
        return None
    if program == "python" and rest[:1] == ["-m"]:
        return _module_fault(rest[1], rest[2:])
    if program in ("bash", "python") or program in LAUNCHERS:
        scripts = [index for index, word in enumerate(rest) if word.endswith((".py", ".sh", ".sbatch"))]
        if "-m" in rest and program in LAUNCHERS:
            index = rest.index("-m")
            return _module_fault(rest[index + 1], rest[index + 2 :])
        if not scripts:  # options of a launcher, spoken of
            return None if program in LAUNCHERS or set(rest) & set(OF_THE_READER) else f"{program} starts no script"
        return _script_fault(rest[scripts[0]], rest[scripts[0] + 1 :])
    return f"{program} is no program that the pages know"


def _pip_fault(words: list[str]) -> str | None:
    extras = re.findall(r"(?:\.|ds_fira)\[(\w+)\]", " ".join(words))
    known = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text().partition("extras_require]")[2], re.MULTILINE)
    return next((f"there is no extra {extra}" for extra in extras if extra not in known), None)


def _script_fault(script: str, words: list[str]) -> str | None:
    if script in OF_THE_READER or script.endswith("zero_to_fp32.py"):  # DeepSpeed puts it beside every checkpoint
        return None
    if not (ROOT / script).is_file():
        return f"{script} does not exist"
    if script in ("launch/test.sh", "launch/test_versions.sh"):
        return _tests_fault(words)
    if script in ("launch/run.sh", "launch/slurm.sbatch"):
        return _script_fault(words[0], words[1:]) if words and words[0].endswith((".py", ".sh")) else None
    parts = PARTS.get(script, ())
    if script.startswith("launch/llama_") or script == "launch/quickstart.sh":
        script, parts = PRETRAINING, PARTS[PRETRAINING]
    return _option_fault(words, sources(script, *parts))


def _module_fault(module: str, words: list[str]) -> str | None:
    if module == "pytest":
        return _tests_fault(words)
    if module == "mkdocs":
        return None
    path = ROOT / module.replace(".", "/")
    if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
        return f"the module {module} does not exist"
    if module.split(".")[0] == "ds_fira":
        return _option_fault(words, help_of(words[0])) if words and words[0].isidentifier() else None
    return _option_fault(words, sources(module.split(".")[0]))


def _tests_fault(words: list[str]) -> str | None:
    for word in words:
        path, _, test = word.partition("::")
        if word.startswith("tests"):
            if not (ROOT / path).exists():
                return f"{path} does not exist"
            if test and f"def {test.partition('[')[0]}(" not in (ROOT / path).read_text():
                return f"{path} has no test {test}"
        elif word.startswith("-") and word not in PYTEST:
            return f"{word} is no option of the tests that the pages know"
    return None


def _option_fault(words: list[str], known: str) -> str | None:
    for word in words:
        option = word.partition("=")[0]
        if re.match(r"--?[a-z]", option) and not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known):
            return f"there is no option {option}"
    return None


@functools.cache
def sources(*names: str) -> str:
    """The text of scripts and of the Python files in folders."""
    files = [file for name in names for file in ([ROOT / name] if "." in name else (ROOT / name).rglob("*.py"))]
    text = "\n".join(file.read_text() for file in files)
    if "HfArgumentParser" in text:
        # Its options are the fields of a class of transformers, with underscores.
        from transformers import TrainingArguments

        text += " ".join(f"--{name}" for name in TrainingArguments.__dataclass_fields__)
        text += " ".join(f"--{name}" for name in re.findall(r"^    (\w+): ", text, re.MULTILINE))
    return text


@functools.cache
def help_of(command: str) -> str:
    """What `python -m ds_fira COMMAND --help` prints."""
    import contextlib
    import io

    from ds_fira.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([command, "--help"])
    return printed.getvalue()
