"""The paper's pre-training experiments: every method trains, claims are judged by rule, the page is its results'."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.reproduction import figure_2, report
from examples.reproduction.lib import methods, train
from examples.reproduction.lib.data import Text
from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.spec import SEEDS, SIZES, Run, settings_of
from examples.reproduction.lib.tables import FAILS, HOLDS, WITHIN, Score, grid, lower, score, tuned

TINY = SIZES["tiny"]
CPU = torch.device("cpu")
METHODS = ("Adam", "Fira", "GaLore", "LoRA", "ReLoRA")


@pytest.fixture(scope="module")
def text() -> Text:
    """Rows in which every token but the first follows from the one before it."""
    generator = np.random.default_rng(0)
    first = generator.integers(0, TINY.vocabulary, (400, 1))
    rows = (first + 7 * np.arange(TINY.seq_length)) % TINY.vocabulary
    facts = {"source": "made", "tokens": {"train": rows.size}, "unigram_entropy": math.log(TINY.vocabulary)}
    return Text(rows, torch.from_numpy(rows[: TINY.validation_rows]), facts)


@pytest.fixture
def made_text(text: Text, monkeypatch: pytest.MonkeyPatch) -> Text:
    """In place of the reviews, whose preparation takes a minute."""
    monkeypatch.setattr("examples.reproduction.lib.data.load", lambda name, size: text)
    return text


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, made_text: Text) -> None:
    size = dataclasses.replace(TINY, steps=60, gap=20)
    result = train.train(Run(method=method, lr=0.01), size, CPU)
    assert len(result["train_loss"]) == len(result["grad_norm"]) == size.steps
    assert result["validation"][-1] == (size.steps, result["val_loss"])
    assert result["val_loss"] < result["train_loss"][0] - 0.1
    short = dataclasses.replace(size, steps=12, gap=5)
    runs = [Run(method=method, lr=0.01), Run(method=method, lr=0.01), Run(method=method, lr=0.01, seed=1)]
    first, again, other = (train.train(run, short, CPU)["train_loss"] for run in runs)
    assert again == first, "the same run twice"
    assert other != first


def test_low_rank_methods_hold_less_state_than_adam(made_text: Text) -> None:
    held = {method: train.train(Run(method=method, lr=0.01), TINY, CPU)["state_bytes"] for method in METHODS}
    assert held["Fira"] - held["GaLore"] <= 4 * 7  # a residual norm for each of the seven matrices
    assert held["GaLore"] < held["Adam"]


def test_merging_adapters_leaves_the_function_as_it_is(text: Text) -> None:
    training = train.Training(Run(method="LoRA", lr=0.01), TINY, text, CPU)
    for step in range(4):
        training.step(step, np.arange(4))
    before = training.validate()
    weights = [p.detach().clone() for n, p in training.model.named_parameters() if "base_layer" in n]
    methods.merge_adapters(training.model)
    assert training.validate() == pytest.approx(before, rel=1e-5)
    after = [p for n, p in training.model.named_parameters() if "base_layer" in n]
    assert any(not torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    products = [p for n, p in training.model.named_parameters() if "lora_B" in n]
    assert products
    assert not any(product.any() for product in products)


def test_schedule() -> None:
    rates = [train.learning_rate(step, 300) for step in range(300)]
    assert rates[0] == pytest.approx(1 / 30)
    assert rates[29] == rates[30] == 1.0
    assert rates[165] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert train.restarts(300) == [75, 131, 187, 244]


def test_recorded_factors_come_with_the_result(made_text: Text) -> None:
    for method in ("Adam", "Fira"):
        found = train.train(Run(method=method, lr=0.01, record=2), TINY, CPU)["scaling_factors"]
        assert len(found) == 7
        assert all(one["steps"] == [2, 4, 6, 8] for one in found.values())


def test_spikes_by_their_rule() -> None:
    generator = np.random.default_rng(0)
    losses = list(5.0 - 0.01 * np.arange(120) + 0.01 * generator.standard_normal(120))
    assert figure_2.find_spikes(losses, 0) == []
    losses[60] += 0.2
    losses[61] += 0.3
    losses[91] += 0.2
    assert figure_2.find_spikes(losses, 0) == [60, 91]
    assert figure_2.find_spikes(losses, 70) == [91]
    assert figure_2.at_refreshes([60, 91], 30) == [60, 91]
    assert figure_2.at_refreshes([60, 91], 40) == []


def test_verdicts() -> None:
    low, middle, high = Score((9.0, 9.5, 10.0)), Score((9.8, 10.2, 10.6)), Score((11.0, 11.2, 12.0))

    def verdict(first: Score, second: Score) -> str:
        return lower("", "", ("first", first), ("second", second)).verdict

    assert verdict(low, high) == HOLDS
    assert verdict(high, low) == FAILS
    assert verdict(low, middle) == verdict(middle, low) == WITHIN
    assert verdict(low, Score((math.inf,) * 3)) == HOLDS
    assert str(Score((9.0, math.inf, 9.0))) == "diverged at 1 of 3 seeds"


def results_with(losses: dict[Run, float | None], folder: Path) -> Results:
    """Results of runs that were not trained."""
    results = Results(TINY, folder)
    for run, loss in losses.items():
        results.add({"key": run.key(TINY), "val_loss": loss})
    return results


def test_learning_rate_is_the_best_of_the_grid(tmp_path: Path) -> None:
    run = Run(method="Adam", lr=0.01, settings=settings_of(eps=1e-6))
    losses = dict(zip(grid(run), (None, 3.0, 2.5, 2.6, 4.0), strict=True))
    results = results_with(losses, tmp_path)
    assert tuned(results, run) == dataclasses.replace(run, lr=0.001)
    assert Results(TINY, tmp_path)[tuned(results, run)]["val_loss"] == 2.5, "read again from the file"
    assert not score(results, dataclasses.replace(run, lr=0.01), seeds=SEEDS[:1]).finite


def test_a_run_is_known_by_all_that_decides_it() -> None:
    run = Run(method="Fira", lr=0.01)
    variants: list[Any] = [
        {"seed": 1},
        {"lr": 0.02},
        {"settings": settings_of(rank=2)},
        {"text": "python"},
        {"length": 3},
    ]
    keys = {dataclasses.replace(run, **change).key(TINY) for change in variants}
    keys |= {run.key(TINY), run.key(dataclasses.replace(TINY, steps=9))}
    assert len(keys) == len(variants) + 2


def test_a_longer_run_has_more_steps_and_as_many_refreshes(made_text: Text) -> None:
    result = train.train(Run(method="Fira", lr=0.01, length=3), TINY, CPU)
    assert len(result["train_loss"]) == 3 * TINY.steps
    assert Run(method="Fira", lr=0.01, length=3).stretched(TINY).gap == 3 * TINY.gap
    # The key of a committed result, from before runs had a length.
    assert Run(method="Fira", lr=0.01).key(SIZES["cpu"]) in Results(SIZES["cpu"]).found


def invented(run: Run) -> dict[str, Any]:
    """A result of a run that was not trained, other for every run."""
    generator = np.random.default_rng(int(run.key(TINY), 16) % 2**32)
    result: dict[str, Any] = {"key": run.key(TINY), "val_loss": float(generator.uniform(3, 4))}
    result |= {"train_loss": list(generator.uniform(3, 4, TINY.steps)), "grad_norm": [1.0] * TINY.steps}
    result |= {"state_bytes": 1000, "trainable_parameters": 10**6, "seconds": float(generator.uniform(10, 20))}
    if run.record:
        shared = {"steps": list(range(1, TINY.steps + 1)), "side": "left", "shape": [4, 3]}
        result["scaling_factors"] = {
            f"layer {number}": {**shared, "matrix": list(generator.uniform(1, 2, 8)), "column": [number, 2.0, 3.0]}
            for number in range(7)
        }
    return result


def test_every_section_renders(tmp_path: Path) -> None:
    """From results of every run that the experiments ask for; they ask for more once learning rates are tuned."""
    results = Results(TINY, tmp_path)
    for _ in range(4):
        for name in filter(report.trains, report.ORDER):
            for stage in report.module(name).stages(results):
                for run in stage:
                    if run not in results:
                        results.add(invented(run))
    for name in filter(report.trains, report.ORDER):
        assert not report.lacks(name, results)
        text = report.module(name).section(results, tmp_path)
        claims = report.module(name).claims(results)
        assert claims
        for claim in claims:
            assert f"| {claim.text} |" in text
        for picture in report.pictures(text):
            assert (tmp_path / Path(picture).name).is_file()


def test_the_page_is_what_the_results_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/reproduction.md, made again from the committed results; plots go elsewhere."""
    monkeypatch.setattr(report, "FIGURES", tmp_path)
    page = report.page(list(report.ORDER), Results(SIZES["cpu"]))
    assert page == report.PAGE.read_text(), "run `python -m examples.reproduction.report --page-only`"
    for picture in report.pictures(page):
        assert (report.PAGE.parent / picture).is_file()
        assert (tmp_path / Path(picture).name).is_file()
