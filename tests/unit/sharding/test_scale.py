"""Plans on 64 to 2048 ranks: even states, work that does not grow with ranks times matrices, and what they send."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.communication import scale_models
from benchmarks.communication.scale import write
from benchmarks.communication.scale_models import MODELS, plan
from benchmarks.communication.scale_step import Exchange, GroupModel, Link
from ds_fira.core.settings import GroupSettings
from ds_fira.optim.settings import check_params
from ds_fira.sharding.geometry import EvenCut, MatrixShard, matrices_of, split
from ds_fira.sharding.lowrank.answer_form import basis_rows_lent, forms_of, low_rank_elements
from ds_fira.sharding.lowrank.step import turns_of
from ds_fira.sharding.plan import MANY_SHARERS, plan_groups, plan_hash
from ds_fira.sharding.projection import state_numel

MOST_UNEVEN, LITTLE = 1.3, 50e6  # times the mean, wherever the fullest rank holds more bytes
LARGE = [("7b", 256), ("7b", 1024), ("70b", 1024), ("70b", 256), ("8x22b", 512)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Of the grid of models, engines and ranks all of 7B on 512 and more ranks is in every run, and more at random."""
    if "of_a_model" not in metafunc.fixturenames:
        return
    cases = []
    for (model, rank), ranks in ((each, ranks) for each in LARGE for ranks in (64, 512, 1024, 2048)):
        for mode in ("zero2", "zero3", "fsdp2"):
            now = model == "7b" and (mode == "zero2" or (rank, ranks) == (1024, 512))
            cases.append(pytest.param((model, rank, mode, ranks), marks=() if now else pytest.mark.full))
    metafunc.parametrize("of_a_model", cases, ids=str)


def test_states_are_even(of_a_model: tuple[str, int, str, int]) -> None:
    """At most 1.3 times the mean wherever a rank holds more than 50 MB, counted in every rank's own plan."""
    model, rank, mode, ranks = of_a_model
    made = plan(model, ranks, mode, rank)
    states = 4 * made.states()
    assert states.max() <= LITTLE or states.max() <= MOST_UNEVEN * states.mean()
    assert states.sum() >= 4 * made.formula
    for dp_rank in (0, ranks // 3, ranks - 1):
        own = sum(matrix.state_numel(dp_rank) for layout, _ in made.layouts for matrix in layout.split)
        whole = [shard.shape for layout, _ in made.layouts for shard in layout.unsplit[dp_rank]]
        own += sum(state_numel(shape, rank) for shape in whole)
        assert states[dp_rank] == 4 * (made.beside + own)


def calls_of(model: str, ranks: int, mode: str) -> int:
    """Calls of functions that Python makes to plan a model on one rank."""
    counted = 0

    def see(frame: Any, event: str, _: Any) -> None:
        nonlocal counted
        counted += event == "call" and "ds_fira/sharding" in frame.f_code.co_filename

    sys.setprofile(see)
    try:
        plan(model, ranks, mode)
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.parametrize("ranks", [512, pytest.param(2048, marks=pytest.mark.full)])
@pytest.mark.parametrize("mode", ["zero2", "zero3", "fsdp2"])
def test_work_does_not_grow_with_ranks_times_matrices(mode: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On many ranks twice the matrices cost little more, and eight times the ranks at most eight times as much."""
    found = {}
    for layers, each in ((8, ranks // 8), (8, ranks), (16, ranks)):
        monkeypatch.setitem(scale_models.MODELS, "some", replace(MODELS["7b"], layers=layers))
        for cache in _caches():
            cache.cache_clear()
        found[layers, each] = calls_of("some", each, mode)
    assert found[8, ranks // 8] > 2048  # something is counted
    assert found[8, ranks] <= 8 * found[8, ranks // 8]
    assert found[16, ranks] <= 1.2 * found[8, ranks]


def _caches() -> list[Any]:
    from ds_fira.sharding import shared_entries

    return [shared_entries._sums, shared_entries._transfers, shared_entries._basis_transfers]


@pytest.mark.parametrize(("begin", "size", "partitions"), [(0, 7, 9), (5, 7, 10), (14, 60, 2), (3, 1, 64)])
def test_an_even_cut_is_a_table_of_fragments(begin: int, size: int, partitions: int) -> None:
    """Element by element: who holds it, where it is in the matrix and in the rank's partition."""
    (matrix,) = matrices_of("w", (6, 10), begin)
    cut = split(matrix, size, partitions)
    expected: dict[int, list[int]] = {}
    for element in range(60):
        expected.setdefault((begin + element) // size, []).append(element)
    assert list(cut) == list(expected)
    assert len(cut) == len(expected)
    for rank, elements in expected.items():
        offset = max(0, begin - rank * size)
        assert cut[rank] == MatrixShard("w", (6, 10), offset, elements[0], elements[-1] + 1)
    assert cut.get(max(cut) + 1) is None
    assert max(cut) + 1 not in cut
    placed = EvenCut("w", (6, 10), begin, size, lambda rank: 100 * rank)
    assert all(placed[rank].offset == cut[rank].offset + 100 * rank for rank in cut)


def test_a_hash_says_what_is_cut_where() -> None:
    """Also where a plan is too large to be listed: another beginning, or another size, is another plan."""
    settings = GroupSettings.of(check_params({"rank": 2}))

    def hashed(begin: int, size: int) -> str:
        cut = split(matrices_of("w", (100, 30), begin)[0], size, 400)
        assert len(cut) > 64
        return plan_hash(plan_groups([([cut], size)], 400, [settings]))

    assert hashed(0, 30) == hashed(0, 30)
    assert len({hashed(0, 30), hashed(1, 30), hashed(0, 31)}) == 3


@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize(("ranks", "size"), [(3, 400), (5, 205), (12, 91), (40, 31)])
def test_the_model_sends_what_the_plan_says(evenly: bool, ranks: int, size: int) -> None:
    """Rank by rank, of matrices of both sides, those of many sharers among them: steps and refreshes."""
    shapes, begin, cuts = [(12, 40), (40, 12), (7, 9)], 0, []
    for index, shape in enumerate(shapes):
        (matrix,) = matrices_of(f"w{index}", shape, 0 if evenly else begin)
        own = -(-math.prod(shape) // ranks) if evenly else size
        cuts.append(split(matrix, own, ranks))
        begin += math.prod(shape)
    for given in ({}, {"exact_cuts": True}, {"subspace": "gram", "refresh_moments": "rotate"}):
        settings = GroupSettings.of(check_params({"rank": 3, "update_proj_gap": 5, **given}))
        (layout,) = plan_groups([(cuts, size)], ranks, [settings], evenly)
        group, step, renewing = GroupModel(layout, settings), Exchange(ranks, Link()), Exchange(ranks, Link())
        group.step(step)
        group.refresh(renewing)
        forms = {p: form for turn in group.turns for p, form in forms_of(turn, layout.low_rank, settings).items()}
        for rank in range(ranks):
            sent = again = 0
            for position, matrix in enumerate(layout.split):
                if matrix.way == "gathered":
                    sent += matrix.gathered_elements(rank)
                    continue
                short = forms[position] == "in_parts"
                kept = position in group.keeps
                sent += low_rank_elements(matrix, rank, settings, short=short, keeps_rows=kept)
                again += matrix.refresh_elements(rank, settings)
                assert kept or not basis_rows_lent(matrix, rank) or len(group.turns) > 1
            assert step.sent[rank] == 4 * sent
            assert renewing.sent[rank] == 4 * again
        assert step.sent.sum() == pytest.approx(step.received.sum())


def test_an_owner_of_many_sharers_is_relieved() -> None:
    """A left matrix on more than eight ranks has its columns kept by all of them; with exact_cuts it stays whole."""
    (whole,) = matrices_of("w", (64, 256))
    for sharers in (MANY_SHARERS, MANY_SHARERS + 1):
        cut = split(whole, -(-whole.numel // sharers), sharers)
        for exact in (False, True):
            settings = GroupSettings.of(check_params({"rank": 4, "exact_cuts": exact}))
            (layout,) = plan_groups([([cut], whole.numel)], sharers, [settings])
            (matrix,) = layout.split
            assert matrix.evenly_sharded == (sharers > MANY_SHARERS and not exact)
            assert (matrix.way == "gathered") == exact
            if matrix.evenly_sharded:
                shares = [len(matrix.kept(rank)) for rank in matrix.sharers]
                assert max(shares) - min(shares) <= 1


def test_few_owners_do_not_keep_many_ranks_waiting() -> None:
    """Two large matrices on 64 ranks: gathered they would send less, and two ranks would take in all of it."""
    settings = GroupSettings.of(check_params({"rank": 512}))
    wholes = [matrices_of(f"w{index}", (4096, 4096))[0] for index in range(64)]
    cuts = [split(whole, whole.numel // 64, 64) for whole in wholes]
    ways = {}
    for count in (2, 64):
        (layout,) = plan_groups([(cuts[:count], count * wholes[0].numel // 64)], 64, [settings], True)
        ways[count] = {matrix.way for matrix in layout.split}
        assert {matrix.cheaper_way(64, settings) for matrix in layout.split} == {"gathered"}
    assert ways == {2: {"low_rank"}, 64: {"gathered"}}


def test_matrices_of_different_ranks_share_a_turn() -> None:
    """However many there are, and however large: neighbours that share a rank are in two turns."""
    settings = GroupSettings.of(check_params({"rank": 1024}))
    whole, ranks = 8192 * 28672, 256
    cuts = [split(matrices_of(f"w{n}", (8192, 28672), n * whole)[0], 10 * whole // ranks, ranks) for n in range(10)]
    (layout,) = plan_groups([(cuts, 10 * whole // ranks)], ranks, [settings])
    turns = turns_of(layout.low_rank)
    assert len(layout.low_rank) == 10
    assert len(turns) == 2
    for turn in turns:
        held = np.zeros(ranks)
        for position in turn:
            held[list(layout.low_rank[position].sharers)] += 1
        assert held.max() == 1


def test_tables_go_between_their_marks(tmp_path: Any) -> None:
    """What stands there is replaced, the rest stays; a page without marks is refused."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: plans -->\nold\n<!-- end: plans -->\nafter\n")
    write(page, {"plans": ["| a |", "|---|"]})
    write(page, {"plans": ["| b |", "|---|"]})
    assert page.read_text() == "before\n<!-- table: plans -->\n\n| b |\n|---|\n\n<!-- end: plans -->\nafter\n"
    with pytest.raises(ValueError, match="has no marks <!-- table: steps -->"):
        write(page, {"steps": []})
