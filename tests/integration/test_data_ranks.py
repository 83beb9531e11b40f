"""The example's data on several real processes: shares, resume, and errors that end all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.grids import half
from tests.integration.data_jobs import CUT_SHORT, write_broken, write_c4
from tests.ranks import Pools

Run = Callable[..., list[Any]]


@pytest.fixture
def run(ranks: Pools) -> Run:
    """`ranks.run` of a job of this module's."""
    return lambda world_size, job, **arguments: ranks.run(
        world_size, job, module="tests.integration.data_jobs", **arguments
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, which two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("corpus")
    write_c4(folder / "c4", [90, 20, 60])
    return folder


@pytest.mark.parametrize(("world_size", "streaming"), half([1, 2], [False, True]))
def test_resume_gives_the_batches_that_would_have_come(corpus, run: Run, world_size: int, streaming: bool) -> None:
    """With batches made ahead, from the middle of an optimizer step on, over the end of an epoch."""
    settings = {"text": corpus / "c4", "streaming": streaming, "cache": corpus / "cache", "batch_size": 5}
    whole = run(world_size, "batches", count=160, micro_steps=3, save_at=50, **settings)
    states = [rank["state"] for rank in whole]
    assert all(state == states[0] for state in states)
    resumed = run(world_size, "batches", count=110, micro_steps=3, state=states[0], **settings)
    for before, after in zip(whole, resumed, strict=True):
        assert before["error"] is after["error"] is None
        assert len(before["batches"]) == 160
        assert after["batches"] == before["batches"][50:]
        assert after["validation"] == before["validation"]


def test_prepared_rows_are_shared_without_a_gap(corpus, run: Run) -> None:
    """Two epochs over two ranks hold every row twice, though a step reaches over the end of the first."""
    settings = {"text": corpus / "c4", "streaming": False, "cache": corpus / "cache"}
    results = run(2, "batches", count=1, batch_size=1, **settings)
    tokens = results[0]["facts"]["tokens"]
    rows = tokens["train"] // 16
    assert (2 * rows) % 14  # the epoch ends within a step of 14 rows
    results = run(2, "batches", count=2 * rows // 14 + 1, batch_size=7, **settings)
    steps = zip(*(rank["batches"] for rank in results), strict=True)
    used = [tuple(row) for step in steps for batch in step for row in batch]
    assert sorted(used[:rows]) == sorted(used[rows : 2 * rows])
    assert used[:rows] != used[rows : 2 * rows]
    held = [tuple(row) for rank in results for batch in rank["validation"] for row in batch]
    assert len(held) == len(set(held)) == tokens["validation"] // 16 // 2 * 2


def test_another_number_of_processes(corpus, run: Run) -> None:
    """Prepared rows go on on any number; a stream on any that divides its lanes."""
    rows = {"text": corpus / "c4", "streaming": False, "cache": corpus / "cache"}
    stream = {"text": corpus / "c4", "streaming": True, "cache": corpus / "cache", "lanes": 2}
    for settings in (rows, stream):
        two = run(2, "batches", count=20, batch_size=4, save_at=10, **settings)
        (one,) = run(1, "batches", count=10, batch_size=8, state=two[0]["state"], **settings)
        for step, batch in enumerate(one["batches"], start=10):
            assert sorted(batch) == sorted(chain(*(rank["batches"][step] for rank in two)))
    (one,) = run(1, "batches", count=1, batch_size=8, state=two[0]["state"], **{**stream, "lanes": None})
    assert one["error"] == (
        "the training state was written with lanes 2, and now it is 1: resume with the same data and options"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [({"seed": 5}, "written with seed 0, and now it is 5"), ({"streaming": False}, "of the kind stream, not rows")],
)
def test_a_state_of_other_data_is_refused(corpus, run: Run, change: dict[str, Any], told: str) -> None:
    """A resumed run with another order or other data stops, on every rank."""
    settings = {"text": corpus / "c4", "streaming": True, "cache": corpus / "cache", "batch_size": 4}
    state = run(2, "batches", count=2, save_at=1, **settings)[0]["state"]
    results = run(2, "batches", count=2, state=state, **(settings | change))
    assert all(told in rank["error"] for rank in results)


@pytest.mark.parametrize("streaming", [True, False])
def test_bad_input_stops_every_rank(tmp_path: Path, run: Run, streaming: bool) -> None:
    """A missing, an undecodable and an empty text, a vocabulary that is too small: one sentence, on both ranks."""
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9 \xff\n\nmore")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text("\n\n \n\n")
    (tmp_path / "tiny.txt").write_text("a\n\nb\n\nc")
    write_c4(tmp_path / "c4", [30])
    cases = {
        "none.txt": "none.txt does not exist",
        "bytes.txt": "bytes.txt cannot be read: 'utf-8' codec can't decode byte 0xe9",
        "empty.jsonl": "empty.jsonl is empty",
        "blank.txt": "blank.txt holds",
        "tiny.txt": "split of tiny.txt is shorter than one row of 16 tokens",
    }
    for name, told in cases.items():
        first, second = run(2, "open_message", cache=tmp_path / "cache", text=tmp_path / name, streaming=streaming)
        assert first == second
        assert told in first, name
    arguments = {"cache": tmp_path / "cache", "text": tmp_path / "c4", "streaming": streaming}
    messages = run(2, "open_message", **arguments, tokenizer=str(tmp_path / "none.json"))
    assert messages == [f"--tokenizer {tmp_path / 'none.json'} does not exist"] * 2


def test_an_error_of_one_rank_ends_all(tmp_path: Path, run: Run) -> None:
    """A file that cannot be read, in the middle of one rank's share, stops both with its sentence, in the same step."""
    seed, broken = write_broken(tmp_path / "c4")
    settings = {"text": tmp_path / "c4", "streaming": True, "cache": tmp_path / "cache", "batch_size": 2}
    first, second = run(2, "batches", count=10_000, micro_steps=3, seed=seed, **settings)
    assert first["error"] == second["error"] == f"{broken} cannot be read: {CUT_SHORT}"
    assert len(first["batches"]) == len(second["batches"]) > 0
    assert not len(first["batches"]) % 3
