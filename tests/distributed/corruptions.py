"""Ways in which a checkpoint folder goes bad: what disks, copies, tools and people do to files, drawn at random."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_fira.checkpoint.manifest import MANIFEST, render
from ds_fira.checkpoint.tag_folder import LATEST

Corruption = Callable[
    [random.Random, Path, Path], str
]  # chance, folder of checkpoints, a folder outside: what was done


def _files(chance: random.Random, folder: Path, tag: str = "second") -> Path:
    """A file that counts: of the checkpoint, its manifest, or `latest`; a pipe in its place would never be read."""
    return chance.choice([path for path in (*sorted((folder / tag).iterdir()), folder / LATEST) if path.is_file()])


def _rewritten(path: Path, content: bytes | bytearray) -> str:
    path.write_bytes(content)
    return path.name


def flip(chance: random.Random, folder: Path, outside: Path) -> str:
    """Bits turn round."""
    path = _files(chance, folder)
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 5])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return _rewritten(path, content)


def truncate(chance: random.Random, folder: Path, outside: Path) -> str:
    """The end is missing."""
    path = _files(chance, folder)
    return _rewritten(path, path.read_bytes()[: chance.choice([0, chance.randrange(path.stat().st_size)])])


def append(chance: random.Random, folder: Path, outside: Path) -> str:
    """Something follows."""
    path = _files(chance, folder)
    return _rewritten(path, path.read_bytes() + chance.randbytes(chance.choice([1, 512])))


def blank(chance: random.Random, folder: Path, outside: Path) -> str:
    """A block of zeros, as after a power failure."""
    path = _files(chance, folder)
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.choice([1, 512, 1 << 20]))
    content[start:stop] = bytes(stop - start)
    return _rewritten(path, content)


def noise(chance: random.Random, folder: Path, outside: Path) -> str:
    """Something else altogether, of the same size."""
    path = _files(chance, folder)
    return _rewritten(path, chance.randbytes(path.stat().st_size))


def delete(chance: random.Random, folder: Path, outside: Path) -> str:
    """A file is gone."""
    path = _files(chance, folder)
    path.unlink()
    return path.name


def replace(chance: random.Random, folder: Path, outside: Path) -> str:
    """By a folder, or a link to nowhere, to itself, to another file, or to where the file was moved."""
    path = _files(chance, folder)
    how = chance.choice(["folder", "nowhere", "itself", "other", "moved"])
    other = _files(chance, folder)
    moved = path.rename(outside / path.name)
    if how == "folder":
        path.mkdir()
    else:
        path.symlink_to({"nowhere": "nowhere", "itself": path.name, "other": other, "moved": moved}[how])
    return f"{path.name} by {how} {other.name}"


def swap(chance: random.Random, folder: Path, outside: Path) -> str:
    """Two files change places, in one checkpoint or between two."""
    one = _files(chance, folder)
    other = _files(chance, folder) if chance.random() < 0.5 else folder / "first" / one.name
    if other == one or not other.exists():
        other = next(path for path in (folder / "second").iterdir() if path != one)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"{one.name} {other.parent.name}/{other.name}"


def add(chance: random.Random, folder: Path, outside: Path) -> str:
    """Shards of other ranks or kinds, newer than the others: of another run, or a copy of one."""
    states = "mp_rank_00_optim_states.pt"
    names = [f"{prefix}zero_pp_rank_{rank}_{states}" for prefix in ("", "bf16_") for rank in (0, 1, 2, 7)]
    names += [f"{prefix}mp_rank_0{rank}_model_states.pt" for prefix in ("", "zero_pp_rank_2_") for rank in (0, 1)]
    here = folder / "second"
    name = chance.choice([name for name in names if not (here / name).exists()])
    source = chance.choice(sorted(path for path in (folder / "first").iterdir() if path.suffix == ".pt"))
    content = chance.choice([source.read_bytes(), b"", chance.randbytes(1000)])
    (here / name).write_bytes(content)
    os.utime(here / name, (2e9, 2e9))
    return name


def edit_manifest(chance: random.Random, folder: Path, outside: Path) -> str:
    """Entries that cannot be, a format that is not known, one that has no checksum; some with a checksum that fits."""
    path = folder / "second" / MANIFEST
    content = _manifest(path)
    kind = chance.choice(["entry", "record", "format", "older", "files", "text", "names", "of the other"])
    values = ["7", -1, 10**30, None, [], {}, 1.5, True, float("nan")]
    if kind == "entry":
        content[chance.choice(["serial", "files", "save_latest", "format"])] = chance.choice(values[:7])
    elif kind == "record":
        name = chance.choice(sorted(content["files"]))
        content["files"][name] = chance.choice([*values, {"size": 1}, {"size": "1", "crc32": 1}])
    elif kind == "format":
        content["format"] = chance.choice([0, 3, 99, -2, "2"])
    elif kind == "files":
        content["files"] = dict(
            chance.sample(sorted(content["files"].items()), chance.randrange(len(content["files"])))
        )
    elif kind == "names":
        record = next(iter(content["files"].values()))
        content["files"][chance.choice(["../first/x", "/etc/passwd", "", "a/../b", "\0"])] = record
    elif kind == "older":
        for key in ("sha256", "latest_was", "save_id"):
            content.pop(key, None)
        content["format"] = 1
    text = json.dumps(content, indent=1).encode()
    if kind == "of the other":
        text = (folder / "first" / MANIFEST).read_bytes()
    elif kind == "text":
        text = chance.choice([b"", b"{}", b"[" * 100_000, b'{"files":' * 50_000, b"9" * 6000, b"\xff\xfe", b"null"])
    elif kind not in ("older", "files") and chance.random() < 0.5:
        text = render(content)  # by someone who means it; of what is left out of "files" nobody could tell
    path.write_bytes(text)
    return kind


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest to edit.

    Raises:
        ValueError: another harm, done before, has left none that names files.
    """
    try:
        content = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not (isinstance(content, dict) and isinstance(content.get("files"), dict) and content["files"]):
        raise ValueError("it names no files")
    return content


def edit_latest(chance: random.Random, folder: Path, outside: Path) -> str:
    """It names something else, or nothing."""
    shutil.copytree(folder / "first", outside / "second")
    (folder / LATEST).unlink()
    texts = [
        "",
        " ",
        "..",
        ".",
        "../second",
        str(outside / "second"),
        "x" * 5000,
        "a\0b",
        "latest",
        "first",
        "second\n",
    ]
    text = chance.choice([*texts, "second/", ".saving-second", "nowhere", "é" * 200, None, None])
    if text is None:
        return _replaced_latest(chance, folder)
    (folder / LATEST).write_text(text)
    return repr(text[:20])


def _replaced_latest(chance: random.Random, folder: Path) -> str:
    kind = chance.choice(["binary", "folder", "loop", "nowhere", "pipe"])
    path = folder / LATEST
    if kind == "binary":
        path.write_bytes(chance.randbytes(4000))
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(LATEST if kind == "loop" else "nowhere")
    return kind


def move(chance: random.Random, folder: Path, outside: Path) -> str:
    """The whole checkpoint is elsewhere, a link to there, a link to itself, a file, or under the name of a leftover."""
    kind = chance.choice(["gone", "link out", "link in", "loop", "file", "unfinished", "aside"])
    path = folder / "second"
    inside = {"unfinished": ".saving-second", "aside": ".replaced-second", "link in": "moved"}
    path.rename(folder / inside[kind] if kind in inside else outside / "second")
    if kind == "file":
        path.write_text("second")
    elif kind.startswith("link") or kind == "loop":
        path.symlink_to({"link out": outside / "second", "link in": "moved", "loop": "second"}[kind])
    return kind


# How often each is drawn.
KINDS: dict[Corruption, int] = {
    flip: 5,
    truncate: 3,
    append: 1,
    blank: 3,
    noise: 1,
    delete: 3,
    replace: 3,
    swap: 3,
    add: 4,
    edit_manifest: 6,
    edit_latest: 4,
    move: 2,
}


def corrupt(seed: str, folder: Path, outside: Path) -> str:
    """Do one or, now and then, two of these to the newest checkpoint; returns which."""
    chance = random.Random(seed)
    done = []
    for kind in chance.choices([*KINDS], [*KINDS.values()], k=chance.choice([1, 1, 1, 2])):
        try:
            done.append(f"{kind.__name__} {kind(chance, folder, outside)}")
        except (OSError, ValueError, IndexError, StopIteration) as error:
            done.append(f"{kind.__name__} found nothing to harm ({type(error).__name__})")
    return ", ".join(done)
