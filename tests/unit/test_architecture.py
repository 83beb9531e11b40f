"""What docs/architecture.md says of the code's shape: which way imports go, who talks to other ranks, sizes, words."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "ds_fira"
FOLDERS = ("ds_fira", "tests", "benchmarks", "examples")
FACES = ("__init__.py", "__main__.py", "hf.py", "run.py", "version.py")
LONGEST, SHORTEST = 300, 30
MOST_ANY = 120
PURE = [
    "core",
    *(
        f"sharding.{name}"
        for name in ("geometry", "row_blocks", "shared_entries", "split_matrix", "plan", "projection")
    ),
]
PURE += ["sharding.lowrank.local_plan"]
# May use torch.distributed: the one file of collectives, the start and end of processes, and what reads an engine's
# groups. Of these the last makes no collective.
DISTRIBUTED = ("sharding/comm.py", "runtime/", "engine/")
COLLECTIVE = re.compile(
    r"(batch_)?(all_|reduce|broadcast|barrier|monitored_barrier|gather|scatter|i?send|i?recv|P2POp)\w*"
)
# Names that the code had before its words became those of the field: anywhere in code and prose.
OLD_WORDS = (
    r"\b(RowPiece|MatrixPlace|keep_share|parcels?|lean way|base way|the lean|lean and base"
    r"|ds_fira\.(shard|places|lean))\b"
)
OLD_CLASSES = {"Piece", "Part", "Share", "Place", "Places", "Region", "Link", "Channel", "Binding", "Method", "Watch"}
# Good names elsewhere; in the algorithm and the plans they had meanings of their own.
OLD_NAMES = {"usable", "square", "whole", "resolution", "correction", "carried", "phase", "lean", "parcel"}


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of such an expression, else an empty text."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def distributed_names(path: Path) -> set[str]:
    """What a file takes of `torch.distributed`: the names behind the dot, by whatever import."""
    tree = ast.parse(path.read_text())
    modules, found = {"torch.distributed"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch.distributed"):
                    found.add("")
                    modules.add(alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full == "torch.distributed":
                    found.add("")
                    modules.add(alias.asname or alias.name)
                elif node.module.startswith("torch.distributed"):
                    found.add(alias.name)
    for node in ast.walk(tree):
        name = dotted(node)
        found |= {name.removeprefix(f"{module}.") for module in modules if name.startswith(f"{module}.")}
    return found


def identifiers(path: Path) -> set[str]:
    """Classes, functions, arguments and variables that a file names; no attributes of others' objects."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg is not None):
            found.add(node.arg)
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_go_down_the_wings() -> None:
    """The contracts in setup.cfg."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = lint_imports(config_filename=str(ROOT / "setup.cfg"), no_cache=True)
    assert status == 0, said.getvalue()


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("ds_fira", "tests", "benchmarks", cache_dir=None)


@pytest.mark.parametrize("name", PURE)
def test_the_algorithm_and_the_planners_know_no_process_group(graph: grimp.ImportGraph, name: str) -> None:
    """Neither they nor anything of ours that they import."""
    module = f"ds_fira.{name}"
    own = {module, *graph.find_descendants(module)}
    for each in own | graph.find_upstream_modules(module, as_package=name == "core"):
        path = ROOT / Path(*each.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert not distributed_names(path), relative(path)


def test_collectives_are_made_in_one_file() -> None:
    for path in python_files("ds_fira"):
        name = path.relative_to(LIBRARY).as_posix()
        used = distributed_names(path)
        assert not used or name.startswith(DISTRIBUTED), f"{name} uses torch.distributed"
        if not name.startswith(DISTRIBUTED[:2]):
            collectives = {each for each in used if COLLECTIVE.fullmatch(each)}
            assert not collectives, f"{name} makes collectives: {collectives}"


def test_benchmarks_do_not_import_tests(graph: grimp.ImportGraph) -> None:
    """Tests may import benchmarks, so the other way would be a circle."""
    importers = {importer for importer, _ in _edges(graph, "benchmarks", "tests")}
    assert not importers
    assert not {importer for above in ("tests", "benchmarks") for importer, _ in _edges(graph, "ds_fira", above)}


def _edges(graph: grimp.ImportGraph, importer: str, imported: str) -> Iterator[tuple[str, str]]:
    for module in {importer, *graph.find_descendants(importer)}:
        for other in graph.find_modules_directly_imported_by(module):
            if other.split(".")[0] == imported:
                yield module, other


def test_no_file_is_long() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in python_files(*FOLDERS)}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_no_file_of_the_library_is_a_crumb() -> None:
    """What a user names when importing or running may be short."""
    lengths = {path: len(path.read_text().splitlines()) for path in python_files("ds_fira") if path.name not in FACES}
    assert not {relative(path): length for path, length in lengths.items() if length < SHORTEST}


def test_types_say_what_they_are() -> None:
    """`Any` is rare in the library, and the algorithm has none."""
    counts = {path: len(re.findall(r"\bAny\b", path.read_text())) for path in python_files("ds_fira")}
    assert not {relative(path): count for path, count in counts.items() if count and LIBRARY / "core" in path.parents}
    assert sum(counts.values()) < MOST_ANY


def test_old_words_are_gone() -> None:
    found: dict[str, set[str]] = {}
    texts = [*python_files(*FOLDERS), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    for path in texts:
        words = {match.group() for match in re.finditer(OLD_WORDS, path.read_text())}
        if path.suffix == ".py" and LIBRARY in path.parents:
            names = identifiers(path)
            words |= names & OLD_CLASSES
            if {"core", "sharding"} & set(path.parts):
                words |= names & OLD_NAMES
        if words and path != Path(__file__):
            found[relative(path)] = words
    assert not found
