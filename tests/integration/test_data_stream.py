"""The stream of the pre-training example on one process: no token lost, none twice, and the same after a restart."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.integration.data_jobs import c4_files, write_c4

from pretraining.loader import Loader  # isort: skip
from pretraining.rows import State  # isort: skip
from pretraining.documents import Documents, is_held_out  # isort: skip
from pretraining.streaming import START, Lane, LaneRecipe, StreamRows  # isort: skip
from pretraining.tokenization import Encoder, train_tokenizer  # isort: skip

SEQ_LENGTH = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """Five files of very unequal size; one has a single document."""
    folder = tmp_path_factory.mktemp("c4")
    return folder, write_c4(folder, [40, 1, 17, 300, 8])


@pytest.fixture(scope="module")
def encoder(corpus: tuple[Path, list[list[str]]]) -> Encoder:
    """Of a tokenizer trained on the corpus."""
    return Encoder(train_tokenizer([text for file in corpus[1] for text in file], 400))


def recipe(documents: Documents, encoder: Encoder, **changes: int) -> LaneRecipe:
    """A recipe of short rows and small blocks."""
    settings = {"seq_length": SEQ_LENGTH, "seed": 0, "lanes": 1, "block_rows": 8, **changes}
    return LaneRecipe(documents=documents, encoder=encoder, **settings)


def micro_batches(rows: StreamRows, batch_size: int) -> Iterator[tuple[torch.Tensor, State]]:
    """A rank's batches, each with the state after it."""
    rows.batch_size = batch_size
    for batch in rows:
        yield batch, rows.state_dict()


def ordered_rows(lane: Lane, count: int) -> np.ndarray:
    """The first rows of a lane in the order of the text, before they are shuffled."""
    rows: list[np.ndarray] = []
    for _, block in lane._blocks(START):
        rows.extend(block)
        if len(rows) >= count:
            return np.stack(rows[:count])
    raise AssertionError("a stream ended")


@pytest.mark.parametrize("block_rows", [1, 8, 10_000])
def test_no_token_is_lost(corpus, encoder, block_rows: int) -> None:
    """The rows end to end are the documents end to end, each opened and closed, across batches, files and epochs."""
    lane = Lane(recipe(c4_files(corpus[0]), encoder, block_rows=block_rows), 0)
    expected: list[int] = []
    for epoch in range(3):
        for file in np.random.default_rng([0, epoch]).permutation(5).tolist():
            for ids in encoder(corpus[1][file]):
                expected.extend(ids.tolist())
        if epoch == 0:
            tokens_of_epoch = len(expected)
    count = len(expected) // SEQ_LENGTH
    assert tokens_of_epoch % SEQ_LENGTH  # otherwise no row reaches from one epoch into the next
    assert ordered_rows(lane, count).ravel().tolist() == expected[: count * SEQ_LENGTH]


def test_rows_of_a_block_are_shuffled_and_all_there(corpus, encoder) -> None:
    """What a lane gives are the rows of each block, every one once, in another order."""
    documents = c4_files(corpus[0])
    lane = Lane(recipe(documents, encoder), 0)
    given = np.stack([next(lane) for _ in range(64)])
    plain = ordered_rows(Lane(recipe(documents, encoder), 0), 64)
    assert not np.array_equal(given, plain)
    for start in range(0, 64, 8):
        assert sorted(map(bytes, given[start : start + 8])) == sorted(map(bytes, plain[start : start + 8]))


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_lanes_are_disjoint_and_together_everything(corpus, encoder, lanes: int) -> None:
    """Every document is in one lane, once in an epoch, in this one and in the next."""
    documents = c4_files(corpus[0])
    expected = Counter(text for file in corpus[1] for text in file)
    epochs: list[Counter[str]] = [Counter(), Counter()]
    for lane in range(lanes):
        for position, text in Lane(recipe(documents, encoder, lanes=lanes), lane)._documents(START):
            if position.epoch == 2:
                break
            if text is not None:
                epochs[position.epoch][text] += 1
    assert epochs == [expected, expected]


def test_held_out_documents_are_in_no_lane(corpus, encoder) -> None:
    """The documents of validation and of training together are all, and no document is both."""
    paths = sorted(corpus[0].glob("c4-train.*"))
    whole = c4_files(corpus[0])
    for held_out in (True, False):
        part = Documents(files=whole.files, parts=whole.parts, held_out=held_out)
        found = [(file, number) for file in range(len(paths)) for number, _ in part.read(file)]
        expected = [
            (file, number)
            for file, texts in enumerate(corpus[1])
            for number in range(len(texts))
            if is_held_out(file, number) == held_out
        ]
        assert found == expected
        assert found


def test_seed_decides_the_order(corpus, encoder) -> None:
    """One seed gives one order, another seed another, and the files of two epochs come in different orders."""

    def rows(seed: int) -> list[bytes]:
        lane = Lane(recipe(c4_files(corpus[0]), encoder, seed=seed), 0)
        return [bytes(next(lane)) for _ in range(100)]

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)
    lane = Lane(recipe(c4_files(corpus[0]), encoder), 0)
    stream = lane._documents(START)
    orders: list[list[str]] = [[], []]
    for position, text in stream:
        if position.epoch == 2:
            break
        if text is not None:
            orders[position.epoch].append(text)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("lanes", [2, 4])
def test_resume_anywhere(corpus, encoder, world_size: int, lanes: int) -> None:
    """From the state after any batch on, in a block or between two, over the end of epochs, the same batches come."""
    documents = c4_files(corpus[0])
    for rank in range(world_size):

        def fresh(rank: int = rank) -> StreamRows:
            return StreamRows(recipe(documents, encoder, lanes=lanes), {"seed": 0}, rank, world_size)

        whole = list(islice(micro_batches(fresh(), 3), 550))
        epochs = {lane["position"][0] for _, state in whole for lane in state["lanes"].values()}
        assert max(epochs) >= 1
        # A step that shares no factor with block or epoch meets every kind of place.
        for index in range(0, len(whole) - 8, 41):
            states = [whole[index][1]] if world_size == 1 else [whole[index][1]] * world_size
            saved = json.loads(json.dumps(fresh().merge(states)))
            resumed = fresh()
            resumed.load(saved, rank, world_size)
            for (batch, state), (expected, expected_state) in zip(
                micro_batches(resumed, 3), whole[index + 1 : index + 9], strict=False
            ):
                assert batch.tolist() == expected.tolist()
                assert state == expected_state


def test_resume_on_another_number_of_processes(corpus, encoder) -> None:
    """Two lanes go on from two ranks to one: together the same rows; where lanes are not equally far, it is refused."""
    documents = c4_files(corpus[0])
    ranks = [micro_batches(StreamRows(recipe(documents, encoder, lanes=2), {}, rank, 2), 4) for rank in range(2)]
    for _ in range(10):
        states = [next(rank)[1] for rank in ranks]
    saved = StreamRows(recipe(documents, encoder, lanes=2), {}, 0, 2).merge(states)
    one = StreamRows(recipe(documents, encoder, lanes=2), {}, 0, 1)
    one.load(saved, 0, 1)
    for batch, _ in islice(micro_batches(one, 8), 10):
        expected = [row for rank in ranks for row in next(rank)[0].tolist()]
        assert sorted(batch.tolist()) == sorted(expected)

    saved["lanes"]["0"]["rows"] += 1
    with pytest.raises(ValueError, match=r"written by 2 processes.*not on 1"):
        one.load(saved, 0, 1)
    with pytest.raises(ValueError, match="--lanes 2 is not a multiple of the 3 processes"):
        StreamRows(recipe(documents, encoder, lanes=2), {}, 0, 3)


def test_a_lane_without_documents_is_refused(tmp_path: Path, encoder) -> None:
    """Fewer documents than lanes end with a sentence, not in an endless search."""
    write_c4(tmp_path, [3], validation=0)
    lane = Lane(recipe(c4_files(tmp_path), encoder, lanes=5), 4)
    with pytest.raises(ValueError, match="part 5 of 5 of the training text holds no documents"):
        next(lane)


def running(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody waits for does not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_worker_obeys_its_rank_alone(corpus, encoder) -> None:
    """A SIGTERM from outside leaves the worker at work; `close` ends it."""
    before = multiprocessing.active_children()
    loader = Loader(StreamRows(recipe(c4_files(corpus[0]), encoder), {}, 0, 1), depth=2)
    loader.get()
    (worker,) = (child for child in multiprocessing.active_children() if child not in before)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(10):
        loader.get()
    loader.close()
    worker.join(10)
    assert not worker.is_alive()


def be_killed(documents: Documents, encoder: Encoder, connection: Connection) -> None:
    """Start a worker, tell its process, and be killed as a rank is for want of memory."""
    loader = Loader(StreamRows(recipe(documents, encoder), {}, 0, 1), depth=2)
    loader.get()
    connection.send([child.pid for child in multiprocessing.active_children()])
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_worker_ends_with_a_rank_that_is_killed(corpus, encoder) -> None:
    """Within two seconds: what it holds open of the rank's would let the other ranks wait."""
    ours, theirs = multiprocessing.Pipe()
    arguments = (c4_files(corpus[0]), encoder, theirs)
    rank = multiprocessing.get_context("fork").Process(target=be_killed, args=arguments)
    rank.start()
    (pid,) = ours.recv()
    rank.join(10)
    end = time.monotonic() + 2
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running(pid)
