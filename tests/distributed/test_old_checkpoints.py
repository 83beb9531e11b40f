"""Checkpoints that earlier versions wrote load ever after, to the bit: the promise across versions.

The archives under `tests/data` are what `python -m tests.distributed.old_jobs` wrote with the code of that version.
They are never made anew.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from ds_fira.checkpoint.named_state import FORMAT, KEY
from tests.distributed.old_jobs import ALONE, CASES, STEPS, TYPES, alone, states_alone, step_alone
from tests.distributed.resume_jobs import same
from tests.grids import full_if
from tests.ranks import Pools

VERSIONS = ("0.1.0",)


@pytest.fixture(scope="module", params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a version, unpacked."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parents[1] / "data" / f"checkpoints_{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def full(name: str) -> bool:
    """Three quarters of the grid; in the rest every type meets every stage, in one dtype of states, on one rank or two.

    With each dtype and number of ranks every type and every stage is among them.
    """
    case = CASES[name]
    kind = TYPES.index(case.optimizer)
    now = (case.state_dtype == "int8") == (kind + case.stage) % 2 and case.world_size - 1 == (
        kind + case.stage // 2
    ) % 2
    return name.startswith(case.optimizer) and not now


@pytest.mark.parametrize("name", full_if(full, CASES))
def test_an_old_checkpoint_loads_to_the_bit(ranks: Pools, old: Path, name: str) -> None:
    """Weights, masters, states, schedule, counts and generators are those that were saved, and training goes on."""
    for rank, seen in enumerate(
        ranks.run(CASES[name].world_size, "load_case", "tests.distributed.old_jobs", name=name, folder=str(old))
    ):
        found, expected = seen["found"], seen["expected"]
        differing = [
            key for key in sorted(found.keys() | expected.keys()) if not same(found.get(key), expected.get(key))
        ]
        assert differing == [], f"rank {rank}"
        assert (seen["tag"], seen["client_state"]) == ("kept", name)
        assert len(seen["losses"]) == 3
        assert all(0.0 < loss < 10.0 for loss in seen["losses"])


def test_an_old_state_dict_loads_to_the_bit(old: Path) -> None:
    """An optimizer without an engine."""
    kept = torch.load(old / ALONE, weights_only=True)
    model, optimizer = alone(7)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    assert same(states_alone(optimizer), kept["states"])
    step_alone(model, optimizer, range(STEPS, STEPS + 3))
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_a_state_dict_of_a_later_form_is_refused() -> None:
    """Instead of read as what it is not; the optimizer stays as it was."""
    model, optimizer = alone(7)
    step_alone(model, optimizer, range(1))
    before, later = states_alone(optimizer), optimizer.state_dict()
    later[KEY]["format"] = FORMAT + 1
    with pytest.raises(ValueError, match=rf"FiraAdam: the state dict is of format {FORMAT + 1}, .*; update ds_fira"):
        optimizer.load_state_dict(later)
    assert same(states_alone(optimizer), before)
