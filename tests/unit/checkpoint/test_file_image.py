"""Files in memory of which only a part is there, and who reads which part."""

from __future__ import annotations

import os
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_fira.checkpoint.file_image import SMALL, FileImage
from ds_fira.checkpoint.safe_load import UnsafeFileError
from ds_fira.checkpoint.shared_read import Listed, divide


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_each_byte_is_read_by_one_rank(ranks: int) -> None:
    files = {"a": Listed(1000), "b": Listed(3, rank=ranks - 1), "c": Listed(0), "d": Listed(11), "e": Listed(99_999)}
    parts, counts = divide(files, ranks), [0] * ranks
    for name, listed in files.items():
        assert parts[name] == sorted(parts[name])
        assert all(one.stop == other.start for one, other in pairwise(parts[name]))
        assert sum(part.stop - part.start for part in parts[name]) == listed.size
        for part in parts[name]:
            counts[part.rank] += part.stop - part.start
    counts[-1] -= 3
    assert max(counts) - min(counts) <= 1


def outlined(path: Path) -> FileImage:
    """An image into which only the outline was read."""
    content = path.read_bytes()
    image = FileImage(path, len(content))
    for ranges in image.outline():
        for part in ranges:
            image.view(part.start, part.stop)[:] = content[part.start : part.stop]
    return image


def whole(path: Path) -> FileImage:
    """An image of all bytes."""
    content = path.read_bytes()
    image = FileImage(path, len(content))
    image.view(0, len(content))[:] = content
    return image


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(3000, 50, generator=generator)
    content = {
        "large": large,
        "part": large.T[3:7],
        "half": torch.randn(70, 90, generator=generator).bfloat16(),
        "small": torch.arange(9),
        "none": torch.empty(0, 3),
        "param": nn.Parameter(torch.randn(40, 40, generator=generator)),
        "plain": [1, "two", {"three": (3.0, None)}],
    }
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_a_file_that_is_all_there(saved: Path) -> None:
    image, expected = whole(saved), torch.load(saved)
    found = image.structure()
    assert found.keys() == expected.keys()
    assert found["plain"] == expected["plain"]
    for name in ("large", "part", "half", "small", "none", "param"):
        assert type(found[name]) is type(expected[name])
        assert found[name].stride() == expected[name].stride()
        assert torch.equal(found[name], expected[name])
    assert found["part"].untyped_storage().data_ptr() == found["large"].untyped_storage().data_ptr()


def test_each_reader_has_containers_of_its_own(tmp_path: Path) -> None:
    """What one removes, the next still finds; attributes and what holds itself are kept."""
    plain: dict[str, object] = {"module": nn.BatchNorm1d(3).state_dict(), "pair": ([1], {2: [3]}), "set": {4}}
    plain["self"] = plain
    torch.save(plain, tmp_path / "x.pt")
    image = whole(tmp_path / "x.pt")
    first = image.structure()
    assert first["self"] is first
    assert first["module"]._metadata[""] == {"version": 2}
    del first["module"]["weight"]
    first["pair"][1][2].append(5)
    second = image.structure()
    assert second["module"].keys() == plain["module"].keys()
    assert (second["pair"], second["set"]) == (plain["pair"], plain["set"])


def test_the_outline_alone_says_where_every_tensor_is(saved: Path) -> None:
    image, expected, content = outlined(saved), torch.load(saved), saved.read_bytes()
    found = image.structure()
    assert torch.equal(found["small"], expected["small"])
    assert not found["large"][20:2000].any()
    for name in ("large", "half", "param"):
        assert found[name].nbytes > SMALL
        part = image.range_of(found[name])
        image.view(part.start, part.stop)[:] = content[part.start : part.stop]
        assert torch.equal(found[name], expected[name])
    part = image.range_of(found["part"])
    assert image.range_of(found["large"]).start + 3 * 4 == part.start
    assert image.range_of(torch.empty(3)) is image.range_of(found["none"]) is None


def test_a_file_of_more_than_4_gb(saved: Path, tmp_path: Path) -> None:
    """Sparse, its records behind a hole: offsets stand in the fields of 64 bits."""
    path = tmp_path / "large.pt"
    with path.open("w+b") as file, zipfile.ZipFile(saved) as small:
        file.seek(9 << 29)
        with zipfile.ZipFile(file, "w") as archive:
            for name in small.namelist():
                archive.writestr(name, small.read(name))
    image = FileImage(path, path.stat().st_size)
    with path.open("rb") as file:
        for ranges in image.outline():
            for part in ranges:
                file.seek(part.start)
                image.view(part.start, part.stop)[:] = file.read(len(part))
        assert image.legible
        found, expected = image.structure(), torch.load(saved)
        part = image.range_of(found["large"])
        assert part.start > 1 << 32
        file.seek(part.start)
        image.view(part.start, part.stop)[:] = file.read(len(part))
    assert torch.equal(found["large"], expected["large"])
    assert torch.equal(found["small"], expected["small"])


def test_memory_that_is_given_back(tmp_path: Path) -> None:
    image = FileImage(tmp_path / "x", 100_000)
    image.bytes.fill_(1)
    image.forget(range(5000, 90_000))
    kept = image.bytes.nonzero().flatten()
    assert kept[:8192].tolist() == list(range(8192))
    assert kept[8192] == 86_016
    image.forget(range(10, 20))
    assert image.bytes[:100].all()


def test_files_of_other_kinds_are_left_to_torch(saved: Path, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3000)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N." * 99)
    content = saved.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:-30])
    (tmp_path / "none.pt").write_bytes(b"")
    (tmp_path / "noise.pt").write_bytes(os.urandom(9) + content[9:])
    for name in ("legacy", "script", "packed", "cut", "none", "noise"):
        for image in (whole(tmp_path / f"{name}.pt"), outlined(tmp_path / f"{name}.pt")):
            assert not image.legible, name
    assert whole(saved).legible
    assert outlined(saved).legible


def test_nothing_is_run(tmp_path: Path) -> None:
    class Calls:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    torch.save({"x": Calls(), "y": torch.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(UnsafeFileError, match=r"x\.pt would import posix\.system"):
        whole(tmp_path / "x.pt").structure()
    assert not (tmp_path / "mark").exists()
