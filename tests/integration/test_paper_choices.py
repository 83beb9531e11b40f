"""Fine-tuning on questions: what needs no model: files, choice of rates, differences between methods, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.finetuning.choices import question_of, read_questions
from examples.reproduction import table_3
from examples.reproduction.lib import table_3_report
from examples.reproduction.table_3_memory import memory_rows
from tests.integration.finetune_jobs import record


def test_records_of_llm_adapters() -> None:
    instruction = "Pick one.\n\nAnswer1: a\n\nAnswer2: b\n\nAnswer format: answer1/answer2"
    one = question_of({"instruction": instruction, "output": "the correct answer is answer2", "answer": "answer2"})
    assert one.responses == ("the correct answer is answer1", "the correct answer is answer2")
    assert one.answer == 1
    assert question_of({"instruction": "Why?", "output": "so", "answer": "so"}).responses == ("so",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no record"),
        ("{", "neither a JSON array nor JSON lines"),
        ("[3]", "record 0 of .* is a int"),
        (json.dumps([record(0), record(1) | {"output": " "}]), "record 1 of .* has no text in the field output"),
        (json.dumps([record(0) | {"answer": "grey"}]), "does not contain"),
        (json.dumps([record(0) | {"choices": ["blue"]}]), "none of its choices blue"),
    ],
)
def test_files_that_are_no_questions(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=expected):
        read_questions(tmp_path / "file.json")


def fake_run(correct: str, seed: int = 0) -> dict[str, Any]:
    return {"correct": correct, "test": correct.count("1") / len(correct), "seed": seed}


def test_a_difference_has_the_spread_of_questions_and_seeds() -> None:
    """By hand: 2 of 100 questions lost, 12 won, and the same again with other seeds."""
    ours, theirs = fake_run("1" * 12 + "0" * 2 + "1" * 86), fake_run("0" * 12 + "1" * 2 + "1" * 86)
    difference, margin = table_3_report.paired_difference([ours], [theirs])
    assert difference == pytest.approx(10)
    assert margin == pytest.approx(1.96 * ((14 - 100 * 0.1**2) / 99 / 100) ** 0.5 * 100)
    other = fake_run("0" * 22 + "1" * 78, seed=1)
    wider = table_3_report.paired_difference([ours, other], [theirs])[1]
    assert wider > margin


def test_rates_are_chosen_by_validation_and_seed_0() -> None:
    runs = [
        {"set": "a", "method": "fira", "lr": lr, "seed": seed, "validation": share}
        for lr, seed, share in ((1e-4, 0, 0.5), (1e-3, 0, 0.7), (1e-2, 0, 0.7), (1e-4, 1, 0.9))
    ]
    assert table_3.chosen_rates(runs) == {"a": {"fira": 1e-3}}


def test_what_gives_table_3s_memory() -> None:
    rows = {(row["method"], row["counted"]): row for row in memory_rows()}
    seven = rows["Fira", "states, all seven projections of a layer"]
    # Of a layer of LLaMA-7B: four of 4096 x 4096, three of 4096 x 11008; m r + 2 n r + 1.
    layer = 4 * (3 * 4096 * 32 + 1) + 3 * (4096 * 32 + 2 * 11008 * 32 + 1)
    assert seven["gb"] == pytest.approx(32 * layer * 2 / 1e9)
    assert seven["agrees"]
    assert not rows["Fira", "states, Q, K, V, up and down"]["agrees"]
    assert all(row["agrees"] for (_, counted), row in rows.items() if "of 7e9 parameters" in counted)
