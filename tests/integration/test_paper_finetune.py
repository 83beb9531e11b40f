"""Fine-tuning on multiple-choice questions: what is learnt and how it is scored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from examples.finetuning.choices import (
    IGNORE,
    Question,
    collate,
    encode,
    log_likelihoods,
    predictions,
    question_of,
    read_questions,
    training_rows,
)
from examples.finetuning.loop import PlainEngine, batches, fine_tune, schedule, steps_of
from examples.finetuning.tuning import METHODS, Recipe, build_optimizer, optimizer_block, prepare
from tests.integration.finetune_cases import ROOT, SMALL, load, write_folder
from tests.integration.finetune_jobs import COLOURS, record

TARGETS = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder / "model")


def test_likelihoods_are_those_of_every_row_by_itself(folder: Path, tokenizer: Any) -> None:
    """Token by token from the whole logits of unpadded rows, for responses of different lengths."""
    model = load(folder).eval()
    questions = [
        Question("", "a red item" * n, " colour:", (" red", " the correct answer is blue", " of"), 0) for n in (1, 4)
    ]
    rows = [encode(tokenizer, one, response, 100) for one in questions for response in one.responses]
    expected = []
    for row in rows:
        with torch.no_grad():
            logs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logs[place - 1, row.ids[place]]) for place in range(row.prompt, len(row.ids))))
        assert tokenizer.decode(row.ids[row.prompt :]).endswith(tokenizer.eos_token)
    found, tokens = log_likelihoods(model, collate(rows, tokenizer.eos_token_id))
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert tokens.tolist() == [len(row.ids) - row.prompt for row in rows]
    assert len(set(tokens.tolist())) > 1
    by_hand = [max(range(3), key=lambda i, start=start: expected[start + i]) for start in (0, 3)]
    assert predictions(model, tokenizer, questions, 100, batch_size=2) == by_hand


def test_prefix_tuning_is_the_same_with_padding(folder: Path, tokenizer: Any) -> None:
    """The prefix comes from peft as transformers' cache: it has its effect, and padding has none."""
    torch.manual_seed(0)
    model = prepare(load(folder), "prefix", SMALL).eval()
    rows = training_rows(tokenizer, [Question("", "item " * n, "", (" red",), 0) for n in (1, 9)], 100)
    with torch.no_grad():
        together = log_likelihoods(model, collate(rows, 0))[0]
        alone = torch.cat([log_likelihoods(model, collate([row], 0))[0] for row in rows])
        with model.disable_adapter():
            without = log_likelihoods(model, collate(rows, 0))[0]
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together - without).abs().min() > 1e-3


def test_only_the_response_is_learnt(tokenizer: Any) -> None:
    rows = training_rows(tokenizer, [question_of(record(1)), question_of(record(2) | {"input": "x " * 40})], 400)
    batch = collate(rows, pad=0)
    for place in range(2):
        learnt = batch["labels"][place] != IGNORE
        assert tokenizer.decode(batch["input_ids"][place][learnt]) == (
            f"the correct answer is {COLOURS[place + 1]}{tokenizer.eos_token}"
        )
        assert torch.equal(batch["labels"][place][learnt], batch["input_ids"][place][learnt])
        assert batch["attention_mask"][place].sum() == len(rows[place].ids)


def test_a_long_prompt_loses_the_end_of_its_body(tokenizer: Any) -> None:
    question = Question("head:", "word " * 50, "\ntail:", (" red",), 0)
    whole = encode(tokenizer, question, " red", 400)
    cut = encode(tokenizer, question, " red", 30)
    assert len(cut.ids) == 30 < len(whole.ids)
    text = tokenizer.decode(cut.ids)
    assert text.startswith(f"{tokenizer.bos_token or ''}head:word")
    assert text.endswith(f"tail: red{tokenizer.eos_token}")
    with pytest.raises(ValueError, match="--max-length 5 has no room"):
        encode(tokenizer, question, " red", 5)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_and_leaves_the_rest_alone(folder: Path, tokenizer: Any, method: str) -> None:
    torch.manual_seed(0)
    model = load(folder)
    recipe = dataclasses.replace(SMALL, lr=0.3 if method == "prefix" else SMALL.lr, dropout=0.0)
    model = prepare(model, method, recipe)
    optimizer = build_optimizer(model, method, recipe)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    rows = training_rows(tokenizer, read_questions(folder / "train.json"), 128)
    scheduler = schedule(optimizer, recipe, steps_of(len(rows), recipe))
    engine = PlainEngine(model, optimizer, scheduler, recipe.clipping)
    losses = [float(loss) for loss in fine_tune(engine, rows, recipe, tokenizer.eos_token_id, seed=0)]
    assert len(losses) == 24
    # Three tokens of prefix do little to a model of random weights.
    assert sum(losses[-3:]) / 3 < losses[0] - (0.03 if method == "prefix" else 0.1), losses
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) != param.requires_grad, name


def test_fira_and_lora_touch_the_five_projections_and_nothing_else(folder: Path) -> None:
    model = prepare(load(folder), "fira", SMALL)
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert {name.split(".")[-2] for name in trained} == TARGETS
    assert len(trained) == 5 * 2
    groups = build_optimizer(model, "fira", SMALL).param_groups
    assert [(len(group["params"]), group["rank"], group["alpha"]) for group in groups] == [(10, 4, 2.0)]
    adapted = prepare(load(folder), "lora", SMALL)
    factors = [name for name, param in adapted.named_parameters() if param.requires_grad]
    assert {name.split(".")[-4] for name in factors} == TARGETS
    assert {name.split(".")[-3] for name in factors} == {"lora_A", "lora_B"}
    assert len(factors) == 2 * 5 * 2
    groups = build_optimizer(prepare(load(folder), "fira_lora", SMALL), "fira_lora", SMALL).param_groups
    assert [(len(group["params"]), group["rank"], group["alpha"]) for group in groups] == [(20, 2, 1.0)]


def test_the_recipe_is_the_papers() -> None:
    """Table 6, in the recipe and in the DeepSpeed file."""
    recipe = Recipe()
    assert (recipe.rank, recipe.lora_alpha, recipe.dropout, recipe.lr) == (32, 64, 0.05, 1e-4)
    assert (recipe.warmup_steps, recipe.batch_size, recipe.epochs) == (100, 16, 3)
    assert set(recipe.target_modules) == TARGETS
    config = json.loads((ROOT / "ds_configs" / "finetune_commonsense.json").read_text())
    expected = optimizer_block("fira", recipe)["params"]
    assert {name: config["optimizer"]["params"][name] for name in expected} == expected
    assert config["train_batch_size"] == recipe.batch_size
    assert config["gradient_clipping"] == recipe.clipping


def test_the_schedule_is_linear() -> None:
    recipe = Recipe()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = schedule(optimizer, recipe, steps=500)
    rates = []
    for _ in range(500):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [1e-4 * min(step / 100, (500 - step) / 400) for step in range(500)]
    assert rates == pytest.approx(expected)


def test_every_epoch_has_each_row_once(tokenizer: Any) -> None:
    rows = training_rows(tokenizer, [question_of(record(number)) for number in range(8)], 200)
    seen = list(batches(rows, dataclasses.replace(SMALL, epochs=2), seed=0))
    assert len(seen) == steps_of(8, dataclasses.replace(SMALL, epochs=2)) == 4
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(row.ids for row in first) == sorted(row.ids for row in second) == sorted(row.ids for row in rows)
    assert first != second
