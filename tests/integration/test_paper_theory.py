"""The paper's theorem and its memory figures: the experiments in `examples/reproduction` that need no training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ds_fira.tools.dry_run import plan_run
from ds_fira.tools.estimate.paper import MODELS, PUBLISHED, method_bytes
from examples.reproduction import figure_8, table_1
from examples.reproduction.lib import figure_8_report, provenance, table_1_report
from examples.reproduction.lib.memory_finetune import EVERY, TABLE_6
from examples.reproduction.lib.memory_measure import FLOAT32, bookkeeping_bytes, build, measure

RANK = 8


@pytest.fixture(scope="module")
def simulated() -> dict[str, Any]:
    """A small simulation, as it is read back from its file."""
    simulation = figure_8.Simulation(steps=(1, 5, 20, 50, 100), repetitions=2_000, chunk=500)
    return json.loads(json.dumps(figure_8.compute(simulation)))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with a wide MLP and an untied head; its embedding has more elements than stay in float32."""
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


def test_the_closed_form_agrees_with_the_simulation(simulated: dict[str, Any]) -> None:
    checks = figure_8_report.closed_form_checks(simulated)
    assert {(check["rank"], check["step"]) for check in checks} == {
        (n, t) for n in figure_8.RANKS for t in (20, 50, 100)
    }
    assert all(abs(check["deviation"]) < 4 for check in checks)
    # Sharp enough to tell 3 / (n + 2) from 2 / (n + 1), at the rank with the most samples.
    sharp = next(check for check in checks if (check["rank"], check["step"]) == (5, 100))
    assert abs(2 / 6 * sharp["predicted"] / figure_8_report.factor(5) - sharp["simulated"]) > 10 * sharp["error"]


def test_the_moments_of_the_rate_are_those_of_a_scaled_inverse_chi_square_for_a_simple_average() -> None:
    for step in (5, 20, 100):
        # As beta2 goes to 1 all squares weigh the same.
        assert figure_8.rate_moment(1.0, step, 1 - 1e-9) == pytest.approx(step / (step - 2), rel=1e-6)
        variance = figure_8.rate_variance(step, "phi2", 1 - 1e-9)
        assert variance == pytest.approx(figure_8.scaled_inverse_chi_square_variance(step), rel=1e-4)
        log_mean = math.lgamma((step - 1) / 2) - math.lgamma(step / 2)
        assert figure_8.rate_moment(0.5, step, 1 - 1e-9) == pytest.approx(math.sqrt(step / 2) * math.exp(log_mean))
    assert math.isinf(figure_8.rate_variance(4, "phi2"))
    assert math.isinf(figure_8.rate_variance(2, "phi"))
    assert math.isfinite(figure_8.rate_variance(3, "phi"))


def test_the_weights_of_the_average_are_those_of_adam() -> None:
    """The corrected gradient of "momentum", squared, is the squared update of torch's Adam."""
    generator = np.random.default_rng(0)
    for situation, step, weighted, squares in figure_8._steps(figure_8.Simulation(steps=(3,)), (1, 4), generator):
        if situation != "momentum":
            continue
        gradients = np.random.default_rng(0).standard_normal((3, 4))
        param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = torch.optim.Adam([param], lr=1.0, eps=0.0)
        for gradient in gradients:
            before = param.detach().clone()
            param.grad = torch.from_numpy(gradient)
            optimizer.step()
        assert step == 3
        assert squares.ravel() == pytest.approx(gradients[-1] ** 2)
        assert weighted.ravel() == pytest.approx(((param - before) ** 2).detach().numpy())


def test_the_inequality_holds_for_adam_and_fails_with_the_first_moment_at_a_low_rank(simulated: dict[str, Any]) -> None:
    for situation in ("assumed", "adam"):
        found = figure_8_report.verdicts(simulated, situation)
        assert all(verdict == "holds" for steps in found.values() for verdict in steps.values())
    momentum = figure_8_report.verdicts(simulated, "momentum")
    assert momentum[5][100] == "fails"
    assert momentum[5][5] == "holds"
    assert momentum[100][100] == "holds"


def test_the_section_on_the_theorem_holds_its_results(
    simulated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = figure_8.section(simulated, tmp_path)
    assert text.startswith(f"## {figure_8.TITLE}\n")
    assert (tmp_path / "theorem.png").stat().st_size > 10_000
    assert "reproduction/theorem.png" in text
    at = simulated["simulation"]["steps"].index(100)
    for situation in figure_8.SITUATIONS:
        assert f"{simulated['variances'][situation]['phi']['50']['variance'][at]:.3g} ± " in text
    assert "rank 5 from step 50" in text
    # Another result gives another verdict.
    monkeypatch.setattr(figure_8_report, "plot", lambda *_: None)
    simulated = json.loads(json.dumps(simulated))
    simulated["exact"]["phi2"] = [value and 1.2 * value for value in simulated["exact"]["phi2"]]
    simulated["exact"]["phi"] = [value and 1e-6 for value in simulated["exact"]["phi"]]
    changed = figure_8.section(simulated, tmp_path)
    assert "under the proof's assumptions: not reproduced" in changed
    assert "not reproduced, it fails at 16 of 16 pairs" in changed


@pytest.mark.parametrize("method", ["Full-Rank", "Fira", "GaLore", "LoRA"])
def test_what_is_held_is_the_formula_and_the_known_bookkeeping(method: str, config: Path) -> None:
    run = plan_run(build(config, "meta"), 1, 0, rank=RANK)
    # By hand: four square and three wide matrices in each of two layers; embedding and head, five norms.
    matrices, rest = [(64, 64)] * 8 + [(64, 172)] * 6, [500 * 64] * 2 + [64] * 5
    weights = sum(m * n for m, n in matrices) + sum(rest)
    low_rank = {
        "Full-Rank": (0, 2 * (weights - sum(rest))),
        "Fira": (0, sum(RANK * m + 2 * RANK * n + 1 for m, n in matrices)),
        "GaLore": (0, sum(RANK * m + 2 * RANK * n for m, n in matrices)),
        "LoRA": (sum(RANK * (m + n) for m, n in matrices), sum(2 * RANK * (m + n) for m, n in matrices)),
    }[method]
    formula = (2 * (weights + low_rank[0]), 2 * (low_rank[1] + 2 * sum(rest)))
    assert method_bytes(method, run) == formula
    held = measure(method, build(config), RANK)
    assert held["weights"] == formula[0]
    assert held["states"] == formula[1] + bookkeeping_bytes(method, run)
    assert (
        bookkeeping_bytes(method, run)
        == {
            "Full-Rank": 4 * 21,
            "LoRA": 4 * (2 * 14 + 7),
            "GaLore": 0,
            "Fira": 14 * (8 + 8 + 2) + 7 * 8 + 5 * 2 * 64 * 2,
        }[method]
    )
    if method == "Fira":
        held = measure(method, build(config), RANK, "float32")
        assert held["states"] == 2 * formula[1] + bookkeeping_bytes(method, run, FLOAT32)
        planned = plan_run(build(config, "meta"), 1, 0, rank=RANK, state_dtype="bfloat16")
        assert planned.state_bytes(0, torch.bfloat16) == formula[1] + bookkeeping_bytes(method, run)
    if method in table_1.ON_META:
        assert measure(method, build(config, "meta"), RANK) == held


def test_table_3_by_hand() -> None:
    """Per layer of LLaMA 7B at rank 32: three (or four) square matrices of 4096, two (or three) of 4096 x 11008."""
    square, wide = 3 * 4096 * 32, 32 * 4096 + 2 * 32 * 11008
    rows = {row["method"]: row for row in table_1.table_3()}
    assert (len(TABLE_6), len(EVERY)) == (5, 7)
    five, seven = rows["Fira"]["readings"].values()
    assert five == 2 * 32 * (3 * (square + 1) + 2 * (wide + 1))
    assert seven == 2 * 32 * (4 * (square + 1) + 3 * (wide + 1))
    assert table_1_report.unit_of(five, 0.26) is None
    assert table_1_report.unit_of(seven, 0.26) == "GB"
    adapters = 32 * (3 * 32 * 8192 + 2 * 32 * (4096 + 11008))
    assert next(iter(rows["LoRA"]["readings"].values())) == 6 * adapters
    assert rows["LoRA"]["measured"] == 6 * adapters + 4 * 2 * 5 * 32
    assert rows["Prefix"]["readings"] == {"30 virtual tokens": 6 * 30 * 32 * 2 * 4096}


def test_the_section_on_memory_holds_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed results: every figure is in the section, and verdicts follow them."""
    results = json.loads((provenance.ROOT / "examples/reproduction/results/table_1.json").read_text())
    text = table_1.section(results, tmp_path)
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert len(results["cells"]) == len(PUBLISHED) * len(MODELS)
    assert all(table_1_report.unexplained(cell) == 0 for cell in results["cells"] if cell["held"] is not None)
    for cell in results["cells"]:
        size = table_1_report.SIZES[cell["model"]]
        row = next(line for line in text.splitlines() if line.startswith(f"| {cell['method']} | {size} |"))
        assert f"| {cell['published']:.2f} | {sum(cell['formula'].values()) / 1e9:.3f} |" in row
    assert [line for line in text.splitlines() if line.endswith("| reproduced, in GiB |")] == [
        next(line for line in text.splitlines() if line.startswith("| Full-Rank | 350M |"))
    ]
    assert "Fira's 0.26 from all seven linear layers of a block (in GB)" in text
    assert "61.1% of optimizer states saved for LLaMA 1B at rank 512: reproduced" in text
    monkeypatch.setattr(table_1_report, "plot", lambda *_: None)
    results["saving"]["held"] = 0.5
    results["cells"][0]["held"]["states"] += 1
    changed = table_1.section(results, tmp_path)
    assert "rank 512: not reproduced" in changed
    assert "Table 1, the formulas: not reproduced" in changed


def test_a_stamp_names_the_commit_and_does_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = provenance.stamp()
    assert json.loads(json.dumps(stamp)) == stamp
    assert stamp["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in stamp["versions"]["torch"]
    if (provenance.ROOT / ".git").exists() and stamp["commit"] is not None:
        assert len(stamp["commit"]) == 40
        assert stamp["commit"][:12] in provenance.stamp_line(stamp)
    monkeypatch.setenv("PATH", "")
    without = provenance.stamp()
    assert without["commit"] is None
    assert without["dirty"] is None
    assert "no git commit" in provenance.stamp_line(without)
