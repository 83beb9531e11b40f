"""Fine-tuning on multiple-choice questions: what is learnt, how it is scored, and that DeepSpeed changes nothing."""

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
from examples.pretraining.tokenization import train_tokenizer
from examples.reproduction import table_3
from examples.reproduction.lib import choice_sets, table_3_report
from examples.reproduction.table_3_memory import memory_rows
from tests.integration.finetune_jobs import COLOURS, record
from tests.ranks import Pools

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
SMALL = Recipe(
    rank=4, lora_alpha=8, lr=0.02, warmup_steps=1, batch_size=4, epochs=8, virtual_tokens=3, update_proj_gap=5
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of a few thousand parameters with its tokenizer, and files of questions beside it."""
    path = tmp_path_factory.mktemp("finetune")
    records = [record(number) for number in range(12)]
    texts = [question_of(one).head + one["instruction"] + one["output"] for one in records]
    tokenizer = train_tokenizer(texts * 3, 400)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "train.json").write_text(json.dumps(records))
    (path / "test.jsonl").write_text("\n".join(json.dumps(record(number)) for number in range(20, 25)))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder / "model")


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    )


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


def arguments(folder: Path, tmp_path: Path, **changes: Any) -> list[str]:
    """A command line of the script, in float32 with exact bases, four sequences a step."""
    config = json.loads((ROOT / "ds_configs" / "finetune_commonsense.json").read_text())
    del config["bf16"], config["data_types"]
    config |= {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1} | changes.pop("config", {})
    config["optimizer"]["params"] |= {"rank": 4, "lr": 0.02, "subspace": "svd", "refresh_moments": "keep"}
    config["optimizer"]["params"] |= changes.pop("params", {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    options = {
        "model": folder / "model",
        "train": folder / "train.json",
        "tests": folder / "test.jsonl",
        "deepspeed-config": path,
        "output-dir": tmp_path / "out",
        "epochs": 2,
        "warmup-steps": 1,
        "max-length": 128,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


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
