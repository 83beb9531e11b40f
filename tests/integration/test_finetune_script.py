"""The fine-tuning script under DeepSpeed on two ranks, and an experiment from its set to its section."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from examples.finetuning.choices import (
    predictions,
    read_questions,
    training_rows,
)
from examples.finetuning.loop import PlainEngine, fine_tune, schedule, steps_of
from examples.finetuning.tuning import METHODS, build_optimizer, prepare
from examples.reproduction import table_3
from examples.reproduction.lib import choice_sets, table_3_report
from examples.reproduction.table_3_memory import memory_rows
from tests.integration.finetune_cases import SMALL, arguments, load, write_folder
from tests.integration.finetune_jobs import COLOURS
from tests.ranks import Pools


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder / "model")


def test_zero_2_on_two_ranks_is_one_process(ranks: Pools, folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    """The script under DeepSpeed, with accumulation, against the loop without it: losses, weights and answers."""
    found = ranks.run(2, "fine_tune", module="tests.integration.finetune_jobs", arguments=arguments(folder, tmp_path))
    recipe = dataclasses.replace(SMALL, epochs=2, update_proj_gap=200, max_length=128)
    model = prepare(load(folder), "fira", recipe)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = build_optimizer(model, "fira", recipe)
    rows = training_rows(tokenizer, read_questions(folder / "train.json"), 128)
    engine = PlainEngine(model, optimizer, schedule(optimizer, recipe, steps_of(len(rows), recipe)), 1.0)
    losses = [float(loss) for loss in fine_tune(engine, rows, recipe, tokenizer.eos_token_id, seed=0)]
    assert found[0]["losses"] == pytest.approx(losses, rel=1e-5)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    for name, param in model.named_parameters():
        change, difference = param.detach() - start[name], found[0]["weights"][name] - param.detach()
        assert difference.norm() <= 1e-4 * change.norm(), name
    questions = read_questions(folder / "test.jsonl")
    right = [
        index == one.answer for index, one in zip(predictions(model, tokenizer, questions, 128), questions, strict=True)
    ]
    assert list(found[0]["accuracy"].values()) == list(found[1]["accuracy"].values()) == [sum(right) / 5]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    assert all(torch.equal(param, found[1]["weights"][name]) for name, param in saved.named_parameters())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["losses"] == found[0]["losses"]


@pytest.mark.parametrize("method", ["fira_lora", "lora", "prefix"])
def test_adapters_train_under_zero_2(ranks: Pools, folder: Path, tmp_path: Path, method: str) -> None:
    command = arguments(folder, tmp_path, method=method, lr=0.3 if method == "prefix" else 0.02, epochs=4)
    found = ranks.run(2, "fine_tune", module="tests.integration.finetune_jobs", arguments=command)
    assert found[0]["losses"][-1] < found[0]["losses"][0]
    assert all(torch.equal(weight, found[1]["weights"][name]) for name, weight in found[0]["weights"].items())
    assert (tmp_path / "out" / "model" / "adapter_config.json").is_file()


def test_wrong_options_stop_with_a_sentence(ranks: Pools, folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps([{"instruction": "Why?", "output": "so", "answer": "so"}]))
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    cases = {
        "--warmup-steps 9 must be at least 0 and below the 6 steps": arguments(folder, tmp_path, warmup_steps=9),
        "has questions without choices": arguments(folder, tmp_path, tests=plain),
        "sets a scheduler": arguments(folder, tmp_path / "b", config={"scheduler": {"type": "WarmupLR"}}),
        "does not divide by 2 processes": arguments(folder, tmp_path / "c", config={"train_batch_size": 3}),
        "does not exist": arguments(folder, tmp_path, train=tmp_path / "missing.json"),
        "does not go with --activation-checkpointing": [
            *arguments(folder, tmp_path, method="prefix"),
            "--activation-checkpointing",
        ],
    }
    for said in ranks.run(
        2, "complaints", module="tests.integration.finetune_jobs", command_lines=list(cases.values())
    ):
        for expected, sentence in zip(cases, said, strict=True):
            assert expected in sentence


def fake_texts() -> Any:
    """Texts whose label is a word of theirs."""
    for number in range(60):
        colour = COLOURS[number % 3]
        yield f"item {number} is {colour}", colour


def test_an_experiment_from_set_to_section(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """Every method once, in this process; the section has each and says what the figures allow."""
    monkeypatch.setattr(choice_sets, "SETS", {"colours": ("Colours (3)", fake_texts, "\nIt is")})
    drawn = choice_sets.load_set("colours", 24, 9, 9)
    bodies = [{one.body for one in part} for part in (drawn.train, drawn.validation, drawn.test)]
    assert sum(map(len, bodies)) == len(set.union(*bodies)) == 42
    with pytest.raises(ValueError, match="has 60 texts, and 70 were asked for"):
        choice_sets.load_set("colours", 50, 10, 10)
    recipe = dataclasses.replace(SMALL, epochs=1, max_length=24)
    scale = table_3.Scale(train=24, validation=9, test=9, rates=(0.01,), recipe=recipe)
    specs = [table_3.Spec("colours", table_3.BEFORE, 0.0, 0)]
    specs += [table_3.Spec("colours", method, 0.01, seed) for method in METHODS for seed in (0, 1)]
    runs = [table_3.run(spec, scale, folder / "model") for spec in specs]
    by_method = {one["method"]: one for one in runs[1:]}
    # 24 bytes an element of the weights in float32 would be AdamW; Fira's states by hand: 5 matrices in 2 layers.
    squares, wides = 3 * (16 * 4 + 2 * 16 * 4 + 1), 2 * (16 * 4 + 2 * 24 * 4 + 1)
    assert by_method["fira"]["state_formula_bytes"] == 4 * 2 * (squares + wides)
    assert by_method["full"]["state_formula_bytes"] == 2 * by_method["full"]["trained_bytes"]
    assert by_method["prefix"]["trained_bytes"] == 4 * 3 * 2 * 2 * 16
    results = {
        "scale": dataclasses.asdict(scale),
        "seeds": 2,
        "model": {},
        "sets": {"colours": {"title": "Colours (3)", "chance": drawn.chance}},
        "chosen": table_3.chosen_rates(runs),
        "runs": runs,
        "memory": memory_rows(),
    }
    text = table_3_report.section(json.loads(json.dumps(results)), tmp_path)
    assert (tmp_path / table_3_report.PLOT).is_file()
    for method in METHODS.values():
        assert f"| {method.title} |" in text
    assert "Fira against LoRA" in text
