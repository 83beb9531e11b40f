"""Files that several writers share: whose bytes are whose, and what becomes of a part that nobody wrote."""

from __future__ import annotations

import itertools
import random
import resource
import zlib
from pathlib import Path

import pytest
import torch

from ds_fira.checkpoint import atomic_save
from ds_fira.checkpoint.host_copies import HostCopies
from ds_fira.checkpoint.manifest import record_file
from ds_fira.checkpoint.outgoing import Frame, Outgoing, extents_of, shares
from ds_fira.checkpoint.pickled import pickled
from ds_fira.checkpoint.ranged_file import RangedFile, Stream
from tests.unit.checkpoint.test_tags import save


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_shares_are_even_and_whole(of: int) -> None:
    chance = random.Random(of)
    for _ in range(20):
        sizes = [chance.choice([0, 1, 63, 64, 5000]) for _ in range(chance.randrange(6))]
        found = [list(shares(sizes, number, of)) for number in range(of)]
        covered = [(storage, byte) for part in found for storage, a, b in part for byte in range(a, b)]
        assert covered == [(storage, byte) for storage, size in enumerate(sizes) for byte in range(size)]
        counts = [sum(b - a for _, a, b in part) for part in found]
        assert max(counts) - min(counts) <= 128


def test_several_writers_make_torchs_file(tmp_path: Path) -> None:
    """Three, one of which is the owner and has what they do not share; the sum is that of the file."""
    shared = [torch.randn(100, 10), torch.randn(7).bfloat16()]
    state = {"module": shared, "buffer": torch.arange(5), "step": 3}
    structure, storages = pickled(state)
    numbers = {storage._cdata: number for number, storage in enumerate(storages)}
    order = tuple(numbers[tensor.untyped_storage()._cdata] for tensor in shared)
    frame = Frame(len(structure), tuple(storage.nbytes() for storage in storages), order, 64)
    files = [Outgoing("file.pt", 0, extents_of([t.untyped_storage() for t in shared], n, 3)) for n in range(3)]
    files[0].pickled, files[0].frame = structure, frame
    for extent in files[0].extents:
        extent.storage = order[extent.storage]
    (rest,) = set(range(len(storages))) - set(order)
    (buffer,) = extents_of([storages[rest]])
    buffer.storage = rest
    files[0].extents.append(buffer)
    written = [file.write(tmp_path, frame) for file in reversed(files)]
    sums = list(itertools.chain.from_iterable(part for part, _ in written))
    record, last = files[0].finish(tmp_path, sums)
    assert record == record_file(tmp_path / "file.pt")
    assert record["size"] == last + sum(count for _, count in written)
    found = torch.load(tmp_path / "file.pt")
    assert torch.equal(found["module"][0], shared[0])
    assert torch.equal(found["module"][1], shared[1])
    assert torch.equal(found["buffer"], state["buffer"])
    with pytest.raises(OSError, match=r"bytes of a storage were written by no rank: .*file\.pt"):
        files[0].finish(tmp_path, sums[1:])


def test_torchs_older_format(tmp_path: Path) -> None:
    state = {"a": torch.randn(10), "b": [1, 2]}
    file = Outgoing("old.pt", 0, old=state)
    sums, written = file.write(tmp_path, None)
    record, _ = file.finish(tmp_path, sums)
    assert record == record_file(tmp_path / "old.pt")
    assert written == record["size"]
    assert torch.equal(torch.load(tmp_path / "old.pt")["a"], state["a"])


def test_a_write_that_the_system_cuts_short_names_the_file(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*cut\.pt"), RangedFile(tmp_path / "cut.pt") as file:
            file.write(0, bytes(8000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with RangedFile(tmp_path / "whole.pt") as file:
        stream = Stream(file)
        stream.write(b"ab")
        stream.write(bytearray(b"c"))
    assert (tmp_path / "whole.pt").read_bytes() == b"abc"
    assert (stream.size, stream.crc32) == (3, zlib.crc32(b"abc"))


def test_copies_are_kept_apart_and_their_memory_is_kept() -> None:
    copies, tensors = HostCopies(), [torch.arange(100.0), torch.arange(3.0)]
    first = extents_of([tensor.untyped_storage() for tensor in tensors])
    copies.take(first)
    place, taken = first[0].data.data_ptr(), [extent.data.clone() for extent in first]
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(extent.data, copy) for extent, copy in zip(first, taken, strict=True))
    assert torch.equal(first[1].data.view(torch.float32), torch.arange(3.0))
    second = extents_of([tensor.untyped_storage() for tensor in tensors])
    copies.take(second)
    assert second[0].data.data_ptr() == place
    assert not second[0].data.any()


def test_checkpoints_of_round_steps_stay(tmp_path: Path) -> None:
    """And so does what is no checkpoint of ours, or is ours among files of the user."""
    for number in range(1, 7):
        save(tmp_path, f"step{number}", steps=number)
    (tmp_path / "step1" / "notes.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    assert atomic_save.prune(tmp_path, 1, 3) == ["step5", "step4", "step2", "step1"]
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left == ["mine", "step1", "step3", "step6"]
    assert [path.name for path in (tmp_path / "step1").iterdir()] == ["notes.txt"]
