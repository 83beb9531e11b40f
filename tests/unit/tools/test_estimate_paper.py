"""The paper's Table 2 beside its formula: which cells follow, and what the 61.1% is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_fira.__main__ import main
from ds_fira.tools.estimate.paper import MODELS, PUBLISHED, implied_saving, reproduced, state_saving, table_2


def test_the_formula_gives_the_saving_of_the_text_and_not_of_the_table() -> None:
    assert state_saving() == pytest.approx(0.611, abs=5e-4)
    nominal, real = implied_saving()
    assert nominal == pytest.approx(1 - (4.38 - 2.6) / (7.8 - 2.6))
    assert abs(nominal - 0.611) > 0.04
    assert real > nominal


def test_cells_by_hand() -> None:
    """LLaMA 60M: 58.07M weights; 16.27M numbers of low-rank state; 10.03M of adapters; the rest 32.78M."""
    own = {cell.method: cell.own for cell in table_2() if cell.model == "llama_60m"}
    matrices = [(512, 512)] * 32 + [(512, 1376)] * 24
    weights, rest = 58_073_600, 2 * 32000 * 512 + 17 * 512
    low_rank = sum(128 * m + 2 * 128 * n for m, n in matrices)
    adapters = sum(128 * (m + n) for m, n in matrices)
    assert own["Full-Rank"] == 6 * weights
    assert own["GaLore"] == 2 * (weights + low_rank + 2 * rest)
    assert own["Fira"] == own["GaLore"] + 2 * len(matrices)
    assert own["LoRA"] == own["ReLoRA"] == 2 * (weights + 3 * adapters + 2 * rest)


def test_which_cells_follow() -> None:
    """One cell follows from the formula; two more from the model's name; of the others no row from one convention."""
    follows = {(cell.method, cell.model) for cell in table_2() if cell.follows("GB") or cell.follows("GiB")}
    assert follows == {("Full-Rank", "llama_350m")}
    by_convention = reproduced("Full-Rank")
    assert by_convention[("GB", "vocabulary 32000", "untied head", "weights by name")] == ["llama_60m", "llama_1b"]
    assert {model for models in by_convention.values() for model in models} == set(MODELS) - {"llama_130m"}
    assert max(map(len, reproduced("Fira").values())) == 1
    assert not reproduced("LoRA")


def test_the_command_prints_every_cell_and_names_the_differences(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "paper.json"
    assert main(["estimate", "--paper", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    for method, figures in PUBLISHED.items():
        rows = [line for line in text.splitlines() if line.startswith(f"{method} ") and " llama_" in line]
        assert [f"{figure:.2f}G" in row for figure, row in zip(figures, rows, strict=True)] == [True] * 4
    assert "61.1%" in text
    assert "Full-Rank 60M and 1B: follows only" in text
    assert "65.8%" in text
    written = json.loads(file.read_text())
    assert len(written["table_2"]) == 20
    assert written["differences"]
