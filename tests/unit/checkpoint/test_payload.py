"""States in two views: what another program knows of them, and all else in a payload."""

from __future__ import annotations

from typing import Any

import torch

from ds_fira.checkpoint import safe_load
from ds_fira.checkpoint.named_state import KEY
from ds_fira.checkpoint.payload import PAYLOAD, fold, unfold
from ds_fira.checkpoint.pickled import pickled

PROJECTED = {"step": torch.tensor([3, 3]), "basis": torch.ones(2, 4, 1), "exp_avg": torch.full((2, 1, 5), 2.0)}
PLAIN = {"step": torch.tensor(3), "exp_avg": torch.arange(6.0), "exp_avg_sq": torch.arange(6.0) ** 2}
IN_INT8 = {**PLAIN, "exp_avg_scale": torch.ones(1)}
OF_A_RULE = {"step": torch.tensor(3)}  # of one without moments
STATE = {0: PROJECTED, 1: PLAIN, 2: IN_INT8, 4: OF_A_RULE}  # the fourth never had a gradient
SIZES = [40, 8, 8, 2, 3]


def own() -> dict[str, Any]:
    return {"state": STATE, "param_groups": [{"params": [0, 1, 2, 3, 4], "lr": 0.1}], KEY: {"format": 1}}


def equal(found: dict[int, dict[str, torch.Tensor]], expected: dict[int, dict[str, torch.Tensor]]) -> bool:
    return {(number, *state) for number, state in found.items()} == {
        (number, *state) for number, state in expected.items()
    } and all(torch.equal(found[n][key], value) for n, state in expected.items() for key, value in state.items())


def test_moments_of_whole_parameters_are_seen_and_others_have_no_content() -> None:
    seen, payload = fold(own(), SIZES, steps=3)
    assert {number: state["exp_avg"].numel() for number, state in seen.items()} == {0: 40, 1: 6, 2: 8, 3: 2, 4: 3}
    assert [number for number, state in seen.items() if state["exp_avg"].is_meta] == [0, 2, 3, 4]
    assert {state["step"] for state in seen.values()} == {3}
    assert payload["state"].keys() == STATE.keys()
    assert payload["state"][1].keys() == {"step"}


def test_both_views_together_are_the_state_again_and_nothing_is_there_twice() -> None:
    seen, payload = fold(own(), SIZES, steps=3)
    found = unfold(payload, seen)
    assert found.keys() == own().keys()
    assert equal(found["state"], STATE)
    assert STATE[1].keys() == PLAIN.keys(), "what was given is as it was"
    _, storages = pickled({"state": {**seen, 5: payload}, PAYLOAD: payload})
    assert len(storages) == len(pickled(own())[1])


def test_both_views_are_read_without_running_anything(tmp_path: Any) -> None:
    seen, payload = fold(own(), SIZES, steps=3)
    torch.save({"state": seen, PAYLOAD: payload}, tmp_path / "states.pt")
    found = safe_load.read(tmp_path / "states.pt")
    assert equal(unfold(found[PAYLOAD], found["state"])["state"], STATE)
