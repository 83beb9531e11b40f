"""The compatibility matrix: few combinations in which all settings meet, every feature, and the page about both."""

from __future__ import annotations

import itertools
import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

from ds_fira.engine.deepspeed import unsupported
from tests.compatibility.feature_jobs import NEITHER
from tests.compatibility.matrix import (
    DTYPES,
    RESULTS,
    Case,
    cases,
    covering_pairs,
    rows_of,
    run,
    run_features,
    trained_cases,
)
from tests.compatibility.page import page
from tests.compatibility.versions import count_with, install
from tests.grids import full_if
from tests.ranks import Pools


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What the last whole run found."""
    return json.loads(RESULTS.read_text())


def test_pairs_of_settings(ranks: Pools, results: dict[str, Any]) -> None:
    """Every two settings that trained together in the whole run do so here, in one combination or another."""
    chosen = covering_pairs(trained_cases(results["rows"]))
    assert {case.stage for case in chosen} == {row["stage"] for row in results["rows"]}
    for row in rows_of(chosen, run(ranks, chosen)):
        assert row["trained"], row
        assert not row["wrong"], row
        assert not row["refused"], row


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", unsupported.TESTED)
def test_pairs_of_settings_with_every_version(version: str, tmp_path: Path) -> None:
    """As `test_pairs_of_settings`, in processes that import a DeepSpeed of a folder of its own."""
    try:
        target = install(version, tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip(f"pip could not install deepspeed {version}")
    counts = count_with(version, target)
    # A version of DeepSpeed refuses settings that it does not have yet: the page says how many combinations.
    recorded = {entry["deepspeed"]: entry for entry in json.loads(RESULTS.read_text())["tested_versions"]}[version]
    figures = ("right", "refused", "wrong")
    assert [counts[figure] for figure in figures] == [recorded[figure] for figure in figures], counts["details"]
    assert all(reason.startswith("DeepSpeed: ") for reason, _ in counts["details"])


def test_covering_pairs() -> None:
    """No pair of settings is left out, and far fewer cases do than there are."""
    candidates = cases()
    chosen = covering_pairs(candidates)

    def pairs(of: list[Case]) -> set[Any]:
        return {pair for case in of for pair in itertools.combinations(case.settings, 2)}

    assert pairs(chosen) == pairs(candidates)
    assert len(chosen) < 60
    assert {case.dtype for case in chosen} == set(DTYPES)


def test_the_whole_run_is_whole(results: dict[str, Any]) -> None:
    """The committed results have every combination, and none gave wrong results."""
    found = []
    for row in results["rows"]:
        assert not row["wrong"], row
        refused = [values for by_message in row["refused"].values() for values in by_message]
        found += [(row["stage"], row["dtype"], row["offload"], *values) for values in refused]
        found += [(row["stage"], row["dtype"], row["offload"], *values) for values, *_ in row["trained"]]
        assert all(message.startswith("DeepSpeed: ") for message in row["refused"])
    assert sorted(map(str, found)) == sorted(str((*case.row, *case.values)) for case in cases())


@pytest.mark.parametrize("together", full_if(False.__eq__, [True, False]))
def test_features(ranks: Pools, together: bool) -> None:
    """What is supported trains as one process does; what is refused is refused by the one who is to."""
    # Of those that are joined every second one is in every run.
    for entry in run_features(ranks, together, every=2 if together else 1):
        # AdamW is tried where features are tried one by one.
        wanted = "refused" if together and entry["expected"] == NEITHER else entry["expected"]
        assert entry["result"] == wanted, entry
        if entry["result"] == "refused":
            assert ": FiraAdam: " in entry["message"], entry
            assert entry["message"].count(". ") == 0, "more than one sentence"


def test_page_is_what_the_run_found(results: dict[str, Any]) -> None:
    """docs/compatibility.md is written, not edited."""
    assert Path("docs/compatibility.md").read_text() == page(results)


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.19.8", True), ("0.19.2", True), ("0.17.6", True), ("0.20.0", False), ("0.16.9", False), ("0.18.9", False)],
)
def test_versions(version: str, tested: bool) -> None:
    """A version that is not tested is warned about, once."""
    assert unsupported.is_tested(version) is tested
    unsupported.warn_if_untested.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unsupported.warn_if_untested(version, "GaLoreAdam")
        unsupported.warn_if_untested(version, "GaLoreAdam")
    assert len(caught) == (0 if tested else 1)
    texts = [str(warning.message) for warning in caught]
    assert all(text.startswith(f"GaLoreAdam: DeepSpeed {version} ") and "pip install" in text for text in texts)
