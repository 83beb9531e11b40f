"""docs/troubleshooting.md: every message that the library raises or warns with, and what to do about it.

The messages are read from the code (`ast`); docs/messages.toml has cause and remedy of the frequent ones. After a
change of either:

python docs/tools/messages.py
"""

from __future__ import annotations

import ast
import functools
import re

import tomllib  # isort: skip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "ds_fira"
PAGE = ROOT / "docs" / "troubleshooting.md"
DATA = ROOT / "docs" / "messages.toml"
WARNINGS = ("warnings.warn", "logger.warning", "warn_once")
GAP = "…"
# Fewer words of its own than this, and a message says nothing that could be looked up.
LEAST_WORDS = 3
# A sentence that is raised elsewhere than it is written has at least as many.
SENTENCE_WORDS = 7
# What holds a sentence, or the first half of one, until an exception takes it.
HOLDERS = ("found", "sentence")
# Sentences of docstrings and tables that these make.
NOT_MESSAGES = ("optim/constructor.py", "optim/plug.py", "tools/estimate/compute.py")
TOPICS = {
    "Settings and param groups": ("optim", "core/settings.py", "core/selection.py", "core/quantization.py"),
    "Checkpoints": ("checkpoint", "engine/deepspeed/save_load", "engine/deepspeed/released.py", "core/normalized.py"),
    "DeepSpeed's config and engine": ("engine",),
    "Start of processes, and ranks that fail": ("runtime/launchers.py", "runtime/process.py", "runtime", "run.py"),
    "While it trains": ("core/basis.py", "sharding", "observe", "core/kernels/__init__.py"),
    "Commands": ("tools",),
    "In code of your own": ("",),
}


@dataclass(frozen=True)
class Message:
    """One sentence of the library.

    Attributes:
        text: what it says; `…` for what is filled in.
        kind: the exception, or "warning".
        module: its file below ds_fira/.
    """

    text: str
    kind: str
    module: str

    @property
    def topic(self) -> str:
        """The section of the page: that of the longest path which the module's begins with."""
        pairs = [(len(start), name) for name, starts in TOPICS.items() for start in starts if self._is_below(start)]
        return max(pairs)[1]

    def _is_below(self, start: str) -> bool:
        return not start or self.module == start or self.module.startswith(f"{start}/")


def template(node: ast.expr) -> str | None:
    """The text of a literal, with `…` in the place of what is filled in; None of anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_part(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            before, after = template(left), template(right)
            return None if before is None and after is None else f"{before or GAP}{after or GAP}"
        case ast.IfExp(body=body):
            return template(body)
    return None


def _part(value: ast.expr) -> str:
    return str(value.value) if isinstance(value, ast.Constant) else GAP


def _cleaned(text: str) -> str:
    # With the optimizer's name most messages begin.
    return re.sub(rf"{GAP}+", GAP, re.sub(rf"^{GAP}(?=:| param group:)", "FiraAdam", " ".join(text.split())))


def messages_of(path: Path) -> Iterator[Message]:
    """The messages of one file, in its order."""
    module = path.relative_to(LIBRARY).as_posix()
    tree = ast.parse(path.read_text())
    seen: set[int] = set()
    found: list[tuple[int, str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            # Docstrings of fields stand behind them, and count as such too.
            strings = [line.value for line in node.body if isinstance(line, ast.Expr)]
            seen |= {id(each) for string in strings if isinstance(string, ast.Constant) for each in ast.walk(string)}
        said = _said(node)
        if said is None:
            continue
        kind, argument = said
        seen |= {id(each) for each in ast.walk(argument)}
        text = template(argument)
        # A name that a module lacks is Python's own sentence.
        if text is not None and _words(text) >= LEAST_WORDS and kind != "AttributeError":
            found.append((argument.lineno, text, kind))
    for node in ast.walk(tree):
        if id(node) in seen or not isinstance(node, ast.Constant | ast.JoinedStr):
            continue
        if isinstance(node, ast.JoinedStr):
            seen |= {id(each) for each in ast.walk(node)}
        text = template(node)
        if text is not None and module not in NOT_MESSAGES and _is_sentence(text):
            found.append((node.lineno, text, "message"))
    for _, text, kind in sorted(found):
        yield Message(_cleaned(text), kind, module)


def _said(node: ast.AST) -> tuple[str, ast.expr] | None:
    """The exception's name, or "warning", and the text that a statement raises or warns with."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        name = ast.unparse(node.exc.func).rpartition(".")[2]
        # A helper that makes the exception has a name in small letters.
        return (name if name[0].isupper() else "ValueError"), node.exc.args[0]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in WARNINGS and node.args:
        return "warning", node.args[0]
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[-1]).rpartition(".")[2] in HOLDERS:
        text = template(node.value)
        return ("message", node.value) if text is not None and _words(text) >= SENTENCE_WORDS else None
    if isinstance(node, ast.ClassDef):
        # An exception that makes its own sentence of what it is given.
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__" and call.args:
                text = template(call.args[0])
                if text is not None and " " in text:
                    return node.name, call.args[0]
    return None


def _words(text: str) -> int:
    return len(re.findall(r"[A-Za-z_]{2,}", text))


def _is_sentence(text: str) -> bool:
    """Whether a literal that nothing raises where it stands is a whole message, and no help text or fragment."""
    whole = text.endswith(".") or (text.startswith((GAP, "ds_fira")) and text.endswith(f": {GAP}"))
    return whole and "\n" not in text and _words(text) >= SENTENCE_WORDS and ("; " in text or ": " in text)


@functools.cache
def all_messages() -> tuple[Message, ...]:
    """Every message once, in the order of the files."""
    found = {message.text: message for path in sorted(LIBRARY.rglob("*.py")) for message in messages_of(path)}
    return tuple(found.values())


def explained() -> list[dict[str, str]]:
    """The frequent messages with `cause` and `remedy`, in the order of docs/messages.toml."""
    return tomllib.loads(DATA.read_text())["message"]


def page(messages: Sequence[Message], details: list[dict[str, str]]) -> str:
    """The page as Markdown."""
    by_text = {message.text: message for message in messages}
    parts = [HEAD]
    for topic in TOPICS:
        of_topic = [message for message in messages if message.topic == topic]
        if not of_topic:
            continue
        parts.append(f"## {topic}\n")
        for detail in details:
            if detail["text"] in by_text and by_text[detail["text"]].topic == topic:
                parts += [f"### {detail['title']}\n", f"> {escaped(detail['text'])}\n"]
                parts += [f"**Cause.** {detail['cause'].strip()}\n", f"**Remedy.** {detail['remedy'].strip()}\n"]
        parts += [
            f"### All messages: {topic[0].lower()}{topic[1:]}\n",
            "| message | raised as | in |\n| --- | --- | --- |",
        ]
        rows = (f"| {escaped(each.text)} | {each.kind} | `{each.module}` |" for each in of_topic)
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def escaped(text: str) -> str:
    """A message as Markdown that shows it letter by letter."""
    return re.sub(r"([\\`*_{}\[\]<>|#$])", r"\\\1", text)


HEAD = f"""# Troubleshooting by message

Search this page for the words of your message. `{GAP}` stands for what the message fills in: a name, a number, a path.
Most messages begin with the optimizer that you named (`FiraAdam`, `GaLoreAdam`, `ApolloAdam`, `FiraRMSProp` or your
own); here that is `FiraAdam` throughout.

A message is one sentence in two parts: what is wrong, then what to do. The frequent ones come first in each section,
with cause and remedy at length. `python docs/tools/messages.py` writes this page from the code: no message is missing.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(all_messages(), explained()))
    print(f"{PAGE.relative_to(ROOT)}: {len(all_messages())} messages, {len(explained())} explained")


if __name__ == "__main__":
    main()
