"""The table of patches: every row holds in the installed DeepSpeed, is on once, and leaves others' wrappers alone."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.nn import Parameter
from torch.optim import AdamW

import ds_fira
from ds_fira.engine.deepspeed import loss_scale, patches
from ds_fira.engine.deepspeed.patches import PATCHES, TEMPORARY, Patch, is_installed


def test_every_row_is_on() -> None:
    """Nothing of the table is missing in this DeepSpeed; no row stands twice."""
    assert all(is_installed(patch) for patch in PATCHES)
    assert len({(patch.owner, patch.name, patch.wrapper) for patch in PATCHES}) == len(PATCHES)
    owners = {kind.__name__: kind for kind in (TorchCheckpointEngine, DeepSpeedEngine)}
    assert all(hasattr(owners[owner], name) for owner, name, _ in TEMPORARY if owner in owners)


def test_registering_again_wraps_nothing_again() -> None:
    """Every method stays the function that it was."""
    before = {(patch.owner, patch.name): getattr(patch.owner, patch.name) for patch in PATCHES}
    ds_fira.register()
    assert all(getattr(owner, name) is function for (owner, name), function in before.items())


@pytest.mark.parametrize("shows", [True, False], ids=["wraps", "hides"])
def test_a_foreign_wrapper_neither_fakes_nor_hides_ours(shows: bool) -> None:
    """One that stood there before does not keep ours out; one that came after does not let it in again."""
    calls: list[str] = []

    def foreign(function: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            calls.append("foreign")
            return function(*args)

        return functools.wraps(function)(wrapped) if shows else wrapped

    def ours(original: Any, *args: Any) -> Any:
        calls.append("ours")
        return original(*args)

    class Engine:
        @foreign
        def step(self) -> str:
            return "stepped"

    patch = Patch(Engine, "step", ours)
    patches.install(patch)
    assert is_installed(patch)
    Engine.step = foreign(Engine.step)
    patches.install(patch)
    assert Engine().step() == "stepped"
    assert calls == ["foreign", "ours", "foreign"]


def test_rows_of_one_method_nest_in_their_order() -> None:
    """The last row of a method is called first."""

    class Engine:
        def step(self) -> list[str]:
            return []

    def wrapper(name: str) -> Any:
        def wrap(original: Any, engine: Engine) -> list[str]:
            return [name, *original(engine)]

        wrap.__qualname__ = name
        return wrap

    for name in ("inner", "outer"):
        patches.install(Patch(Engine, "step", wrapper(name)))
    patches.install(Patch(Engine, "missing", wrapper("inner"), optional=True))
    assert Engine().step() == ["outer", "inner"]


def test_backward_passes_on_whatever_it_was_given() -> None:
    """An engine of another optimizer is called with its own arguments, in their own form."""
    engine = SimpleNamespace(basic_optimizer=AdamW([Parameter(torch.zeros(2, 2))]))
    given: list[Any] = []

    def backward(engine: Any, *args: Any, **kwargs: Any) -> str:
        given.append((args, kwargs))
        return "loss"

    assert loss_scale.scale_backward(backward, engine, 1, release_loss=True) == "loss"
    assert given == [((1,), {"release_loss": True})]
