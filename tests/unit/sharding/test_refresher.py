"""What a refresher says before long decompositions, and which matrices it gives their bases together."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import allocate, matrix_states
from ds_fira.core.step import MatrixTask
from ds_fira.observe.metrics import StepMetrics
from ds_fira.optim.settings import check_params
from ds_fira.sharding import refresher
from ds_fira.sharding.refresher import Refresher, batch_limit, batches, svd_seconds, svd_warning
from tests.reference.gradients import make_gradients

WIDE, TALL = (9, 24), (24, 9)
FLOAT = torch.float32


def settings_of(subspace: str = "svd", moments: str = "rotate") -> GroupSettings:
    return GroupSettings.of(check_params({"rank": 4, "subspace": subspace, "refresh_moments": moments}))


def tasks_of(gradients: list[Tensor], settings: GroupSettings) -> list[MatrixTask]:
    found = []
    for gradient in gradients:
        shape, weight = (gradient.shape[0], gradient.shape[1]), torch.zeros_like(gradient)
        (state,) = matrix_states(allocate(weight, [shape], settings, False), [shape], settings, False, FIRA_ADAM)
        found.append(MatrixTask(weight, gradient, state, settings, 1e-4))
    return found


@pytest.mark.parametrize(
    ("device", "subspace", "shape", "warns"),
    [
        ("cuda", "svd", (4096, 11008), True),
        ("cuda", "svd", (2048, 2048), True),
        ("cuda", "svd", (1024, 1024), False),
        ("cuda", "randomized", (4096, 11008), False),
        ("cuda", "gram", (4096, 11008), False),
        ("cpu", "svd", (4096, 11008), False),
    ],
)
def test_only_long_exact_decompositions_on_a_gpu_are_announced(
    device: str, subspace: str, shape: tuple[int, int], warns: bool
) -> None:
    assert (svd_warning(device, [(8, 8), shape], FLOAT, settings_of(subspace)) is not None) == warns
    assert svd_warning(device, [], FLOAT, settings_of(subspace)) is None


def test_the_announcement_says_how_large_how_long_and_what_to_do() -> None:
    """The seconds are those of 10 minutes for a LLaMA 7B; twice as many in float64."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096), (11008, 4096), (4096, 11008)]
    assert 32 * sum(svd_seconds("cuda", shape, FLOAT) for shape in shapes) == pytest.approx(600, rel=0.05)
    said = svd_warning("cuda", shapes, FLOAT, settings_of())
    for part in (
        "7 of a param group's",
        "up to 11008 x 4096",
        "4.2 s",
        "19 s in all",
        "every 200 steps",
        "'randomized'",
    ):
        assert part in said
    assert svd_seconds("cuda", (4096, 4096), torch.float64) == 2 * svd_seconds("cuda", (4096, 4096), FLOAT)


def test_it_is_said_once_and_before_the_first_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresher, "svd_seconds", lambda device_type, *_: 0.2 if device_type == "cpu" else 0.0)
    monkeypatch.setattr(refresher, "SLOW_SECONDS", 0.0)
    order = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: order.append("svd") or svd(*a, **k))
    monkeypatch.setattr(warnings, "warn", lambda message, **_: order.append(message))
    chosen = Refresher(StepMetrics(), "FiraAdam")
    for _ in range(2):
        chosen.refresh(tasks_of(make_gradients(WIDE, 2), settings_of()))
    assert order[0].startswith("FiraAdam: subspace = 'svd' now decomposes 2 of a param group's matrices")
    # Nor is the user told of the same thing after the time has been spent.
    assert order[1:] == ["svd"] * 4


def test_a_gpu_takes_matrices_of_a_shape_together() -> None:
    assert batch_limit("cpu", "randomized", 1000) == 1
    assert batch_limit("cuda", "svd", 1000) == 1
    assert batch_limit("cuda", "randomized", 1000) == refresher.MAX_BATCH
    assert batch_limit("cuda", "gram", 4 * 4096 * 4096) == 4
    assert batch_limit("cuda", "randomized", 2**40) == 1


@pytest.mark.parametrize("moments", ["keep", "rotate"])
@pytest.mark.parametrize("subspace", ["gram", "randomized"])
def test_bases_of_a_batch_are_those_of_its_matrices(
    subspace: str, moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches as on a GPU: one decomposition for the matrices of a shape, and one without a gradient waits."""
    settings = settings_of(subspace, moments)
    wide, tall = make_gradients(WIDE, 3), make_gradients(TALL, 2)
    gradients = [wide[0], tall[0], wide[1], torch.zeros(WIDE), tall[1], wide[2]]
    called = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: called.append(a.shape[:-2]) or eigh(a))
    ends = {}
    for together in (False, True):
        monkeypatch.setattr(refresher, "batch_limit", lambda *_, size=8 if together else 1: size)
        tasks = tasks_of(gradients, settings)
        called.clear()
        for _ in range(2):
            Refresher(StepMetrics(), "FiraAdam").refresh(tasks)
        expected = [(3,), (2,)] if together else [()] * 5
        assert called == expected + ([(3,), (2,)] if together else [()] * 5)
        ends[together] = [task.state.basis if task.state.has_basis else None for task in tasks]
    assert [basis is None for basis in ends[True]] == [False, False, False, True, False, False]
    for alone, batched in zip(ends[False], ends[True], strict=True):
        if alone is not None:
            # The projectors, since equal columns are not asked for; rounding of products of small matrices.
            assert (alone @ alone.t() - batched @ batched.t()).abs().max() <= 1e-4


def test_a_batch_that_fails_is_tried_matrix_by_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix that cannot be decomposed keeps its old basis, here none, and costs the others nothing."""
    monkeypatch.setattr(refresher, "batch_limit", lambda *_: 8)
    eigh, calls = torch.linalg.eigh, []

    def fails(a: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(a.ndim)
        if a.ndim == 3 or len(calls) == 3:
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    tasks = tasks_of(make_gradients(WIDE, 3), settings_of("gram", "keep"))
    with pytest.warns(UserWarning, match="a decomposition failed") as caught:
        Refresher(StepMetrics(), "FiraAdam").refresh(tasks)
    assert len(caught) == 1
    assert calls == [3, 2, 2, 2]
    assert [task.state.has_basis for task in tasks] == [True, False, True]


def test_what_is_together_is_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and param groups apart, in order; all of it or all of it not yet with a basis."""
    one, two = settings_of("gram"), settings_of("gram")
    gradients = make_gradients(WIDE, 3)
    tasks = [*tasks_of(gradients, one), *tasks_of(gradients[:1], two), *tasks_of(make_gradients(TALL, 1), one)]
    tasks[1].state.refresh_step.fill_(3)
    monkeypatch.setattr(refresher, "batch_limit", lambda *_: 8)
    found, places = batches(tasks), {id(task): place for place, task in enumerate(tasks)}
    assert [[places[id(task)] for task in batch] for batch in found] == [[0, 2], [1], [3], [4]]
