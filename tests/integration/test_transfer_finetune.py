"""The fine-tuning of the study of transfer: every method learns with its real optimizer, and is scored as it should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ds_fira
from ds_fira.optim.presets import PRESETS
from examples.finetuning.choices import Question, predictions
from examples.finetuning.tuning import prepare
from examples.pretraining.tokenization import train_tokenizer
from examples.reproduction.lib.choice_sets import ChoiceSet
from examples.reproduction.transfer.finetune import PRESET, make_optimizer, recipe_of, scores, train
from examples.reproduction.transfer.trials import Trials
from examples.reproduction.transfer.tunings import BEFORE, METHODS, Tuning, tunings

WIDTH, LAYERS, RANK = 32, 2, 4
WORDS = (("fine", 1), ("dull", 0), ("warm", 1), ("flat", 0))
# Rates at which the model of this size learns within the steps.
RATES = {"preset": 0.05, "preset_at_once": 0.01, "preset_all": 0.01, "fira": 0.03, "galore": 0.03}
RATES |= {"lora": 0.03, "full": 0.005}


def question(number: int) -> Question:
    word, answer = WORDS[number % len(WORDS)]
    return Question("", f"a {word} film {number % 7}", "\nThis movie is", (" bad", " good"), answer, ends=False)


@pytest.fixture(scope="module")
def questions() -> ChoiceSet:
    made = tuple(question(number) for number in range(96))
    return ChoiceSet("words", made[:80], made[80:88], made[88:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with tied embeddings, as the pre-trained one has.

    Its random weights are large, as the trained ones are: a frozen head of small ones could tell nothing apart.
    """
    path = tmp_path_factory.mktemp("finetune") / "model"
    texts = [one.body + one.tail + one.responses[one.answer] for one in map(question, range(28))]
    tokenizer = train_tokenizer(texts * 4, 400)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def small(method: str, lr: float) -> Tuning:
    return Tuning(method=method, lr=lr, steps=20, batch=4, rank=RANK, gap=8, warmup=2)


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_and_its_result_is_kept(
    folder: Path, questions: ChoiceSet, tmp_path: Path, method: str
) -> None:
    before = train(small(BEFORE, 0.0), folder, questions)
    tuning = small(method, RATES[method])
    result = train(tuning, folder, questions)
    assert result["test"][1] < before["test"][1] / 2
    assert result["losses"][-1] < result["losses"][0] / 2
    assert len(result["losses"]) == 10
    store = Trials(tmp_path)
    store.add(json.loads(json.dumps(result)))
    assert Trials(tmp_path)[tuning]["test"] == result["test"]
    assert Trials(tmp_path).missing([tuning, small(method, 1.0)]) == [small(method, 1.0)]


def test_the_preset_gives_what_the_fine_tuning_leaves_out(folder: Path) -> None:
    """Its laws at this width, depth and rank, its rate where none is given, and nothing of the published settings."""
    model = prepare(load(folder), METHODS["preset"], recipe_of(small("preset", 0.01)))
    optimizer = make_optimizer(model, small("preset", 0.01))
    group = next(group for group in optimizer.param_groups if group.get("rank") is not None)
    plain = ds_fira.FiraAdam(load(folder), rank=RANK, preset=PRESET)
    own = next(group for group in plain.param_groups if group.get("rank") is not None)
    assert {name: group[name] for name in PRESETS[PRESET].rows} == {name: own[name] for name in PRESETS[PRESET].rows}
    assert group["alpha"] * group["residual_scale"] == pytest.approx(0.3 * 128 / WIDTH)
    assert (group["residual_beta"], group["residual_warmup"]) == (0.0, 50 * LAYERS)
    at_once = make_optimizer(model, small("preset_at_once", 0.01))
    assert {group.get("residual_warmup", 0) for group in at_once.param_groups} == {0}
    assert group["update_proj_gap"] == 8


def test_what_each_method_trains(folder: Path) -> None:
    counts = {}
    for method in METHODS:
        tuning = small(method, 0.01)
        model = prepare(load(folder), METHODS[method], recipe_of(tuning))
        make_optimizer(model, tuning)
        counts[method] = sum(param.numel() for param in model.parameters() if param.requires_grad)
    everything = sum(param.numel() for param in load(folder).parameters())
    matrices = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * 48)
    assert counts["full"] == counts["preset_all"] == everything
    assert counts["preset"] == counts["preset_at_once"] == counts["fira"] == counts["galore"] == matrices
    assert counts["lora"] == LAYERS * RANK * (4 * 2 * WIDTH + 3 * (WIDTH + 48))


def test_scores_are_those_of_rows_by_themselves(folder: Path, questions: ChoiceSet) -> None:
    model, tokenizer = load(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    mixed = [*questions.test, dataclasses.replace(questions.test[0], body="a warm film " * 3)]
    accuracy, nats = scores(model, tokenizer, mixed, 64)
    expected = predictions(model, tokenizer, mixed, 64)
    assert accuracy == sum(found == one.answer for found, one in zip(expected, mixed, strict=True)) / len(mixed)
    alone = [scores(model, tokenizer, [one], 64)[1] for one in mixed]
    assert nats == pytest.approx(sum(alone) / len(alone), abs=1e-4)
    with pytest.raises(ValueError, match="not of one token each"):
        scores(model, tokenizer, [dataclasses.replace(mixed[0], responses=(" bad", " a good film"))], 64)


def test_every_fine_tuning_has_a_key_of_its_own() -> None:
    keys = [tuning.key for tuning in tunings()]
    assert len(set(keys)) == len(keys)
