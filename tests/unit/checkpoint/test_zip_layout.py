"""Files of torch.save that were laid out before they were written."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_fira.checkpoint.pickled import bytes_of, pickled, tensors_in
from ds_fira.checkpoint.zip_layout import ZipLayout


def state() -> dict[str, Any]:
    """What checkpoints hold: views of one memory, odd sizes, none, of every width."""
    flat = torch.arange(1000, dtype=torch.float32).bfloat16()
    return {
        "module": {"a": flat[:10], "b": flat[10:900].view(10, 89), "tied": flat[:10]},
        "odd": [torch.arange(7, dtype=torch.int8), (torch.tensor(3), torch.empty(0)), torch.ones(3, dtype=torch.bool)],
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "numbers": {"lr": 1e-3, "text": "ä"},
    }


def written(value: object, path: Path, alignment: int = 64) -> int:
    """Write a file by its layout; returns the sum that the layout tells."""
    structure, storages = pickled(value)
    contents = [bytes_of(storage).numpy().tobytes() for storage in storages]
    layout = ZipLayout(path.stem, len(structure), [len(content) for content in contents], alignment)
    runs, crc = layout.rest(structure, [zlib.crc32(content) for content in contents])
    with path.open("wb") as file:
        places = [entry.start for entry in layout.storages]
        for offset, content in [*runs, *zip(places, contents, strict=True)]:
            file.seek(offset)
            file.write(content)
    assert path.stat().st_size == layout.size
    return crc


def test_the_bytes_are_torchs(tmp_path: Path) -> None:
    """All of them but the number of the serialization, and the sum of that number."""
    ours, theirs = tmp_path / "ours" / "file.pt", tmp_path / "theirs" / "file.pt"
    for path in (ours, theirs):
        path.parent.mkdir()
    crc = written(state(), ours)
    torch.save(state(), theirs)
    a, b = ours.read_bytes(), theirs.read_bytes()
    assert crc == zlib.crc32(a)
    assert len(a) == len(b)
    with zipfile.ZipFile(theirs) as archive:
        entry = archive.getinfo("file/.data/serialization_id")
        sums = entry.CRC.to_bytes(4, "little")
    differing = [at for at in range(len(a)) if a[at] != b[at]]
    number = b.rfind(sums, 0, b.find(b"PK\1\2"))
    content = range(number - 4 - 40, number + 4)
    listed = b.rfind(sums)
    assert all(at in content or at in range(listed, listed + 4) for at in differing), differing[:5]


@pytest.mark.parametrize("mmap", [False, True])
def test_every_reader_takes_it(mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    written(state(), path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    found = torch.load(path, mmap=mmap, weights_only=False)
    assert found["module"]["a"].data_ptr() == found["module"]["tied"].data_ptr()
    for a, b in zip(tensors_in(found), tensors_in(state()), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.load(io.BytesIO(path.read_bytes()))["numbers"] == state()["numbers"]


def test_another_alignment_of_torchs(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    written(state(), path, 4096)
    assert torch.equal(torch.load(path)["odd"][0], state()["odd"][0])


def test_large_files(tmp_path: Path) -> None:
    """Two storages of 5 GB, of which only the ends are written: places and fields are those that torch writes."""
    size = (5 << 30) + 3
    memory = [torch.empty(count, dtype=torch.uint8) for count in (4, size, 7, size, 9)]
    ours, theirs = tmp_path / "ours" / "big.pt", tmp_path / "theirs" / "big.pt"
    for path in (ours, theirs):
        path.parent.mkdir()
    structure, storages = pickled(memory)
    layout = ZipLayout("big", len(structure), [storage.nbytes() for storage in storages])
    runs, _ = layout.rest(structure, [0] * len(storages))
    with ours.open("wb") as file:
        for offset, content in runs:
            file.seek(offset)
            file.write(content)
        for entry in (layout.storages[1], layout.storages[4]):
            os.pwrite(file.fileno(), b"end", entry.start + entry.size - 3)
    with torch.serialization.skip_data():
        torch.save(memory, theirs)
    assert ours.stat().st_size == theirs.stat().st_size == layout.size
    with zipfile.ZipFile(ours) as mine, zipfile.ZipFile(theirs) as other:
        listed = [(each.filename, each.header_offset, each.file_size, each.extra) for each in mine.infolist()]
        assert listed == [(each.filename, each.header_offset, each.file_size, each.extra) for each in other.infolist()]
    with theirs.open("rb") as file:
        for offset, content in runs[:-1]:
            file.seek(offset)
            head = content[-(content[::-1].find(b"\4\3KP") + 4) :]
            file.seek(offset + len(content) - len(head))
            assert file.read(len(head)) == head
    found = torch.load(ours, mmap=True)
    assert [len(tensor) for tensor in found] == [4, size, 7, size, 9]
    assert bytes(found[1][-3:].tolist()) == bytes(found[4][-3:].tolist()) == b"end"


def test_memory_of_two_dtypes_is_refused() -> None:
    """As by torch.save: a reader would give both the first one's dtype."""
    first = torch.zeros(8)
    with pytest.raises(RuntimeError, match="lie in the same memory"):
        pickled([first, first.view(torch.int32)])
    assert np.array_equal(bytes_of(first.untyped_storage()).numpy(), np.zeros(32, np.uint8))
