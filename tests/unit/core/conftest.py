"""Fixtures of the tests of core."""

from __future__ import annotations

import pytest

from ds_fira.core import subspace_solvers


@pytest.fixture(params=["exact", "gram", "direct", "bfloat16"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of the randomized method, whatever the sizes and the device would choose."""
    chosen = "direct" if request.param == "bfloat16" else request.param
    monkeypatch.setattr(subspace_solvers, "cheapest", lambda *_: chosen)
    monkeypatch.setattr(subspace_solvers, "fast_bfloat16", lambda _: request.param == "bfloat16")
    return request.param
