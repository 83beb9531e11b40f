"""Fine-tune a LLaMA on commonsense questions under DeepSpeed, the paper's Table 6, and answer test questions.

    deepspeed --num_gpus 8 examples/finetune_commonsense.py --model /data/llama-7b --train /data/commonsense_170k.json \
        --tests /data/dataset/*/test.json --output-dir runs/commonsense

docs/finetuning.md has the layout of the data and the memory. In `--output-dir` it leaves the model (or adapter) and
`summary.json`, with the accuracy on every test file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from finetuning.choices import Question, predictions, read_questions, training_rows
from finetuning.loop import fine_tune, schedule, steps_of
from finetuning.tuning import METHODS, Recipe, optimizer_block, prepare, trained_parameters
from pretraining.arguments import OneSentenceParser, positive
from pretraining.batch import TOTAL, settle_batch
from pretraining.configs import read_json

import ds_fira

REPOSITORY = Path(__file__).resolve().parent.parent
LOG_EVERY = 10


def build_parser() -> OneSentenceParser:
    """The options; the defaults are the paper's."""
    recipe = Recipe()
    parser = OneSentenceParser(description="Fine-tune a LLaMA on commonsense questions.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder or hub name of a pre-trained model with its tokenizer")
    parser.add_argument("--train", required=True, nargs="+", type=Path, help="JSON or JSONL files to train on")
    parser.add_argument("--tests", nargs="*", type=Path, default=[], help="JSON or JSONL files of questions to answer")
    parser.add_argument("--method", choices=METHODS, default="fira")
    parser.add_argument("--lr", type=float, help=f"for fira default the JSON's, otherwise {recipe.lr}")
    parser.add_argument("--epochs", type=positive, default=recipe.epochs)
    parser.add_argument("--warmup-steps", type=int, default=recipe.warmup_steps)
    parser.add_argument("--max-length", type=positive, default=recipe.max_length, help="tokens of prompt and response")
    parser.add_argument("--batch-size", type=positive, help="sequences per process and pass (default the JSON's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--activation-checkpointing", action="store_true", help="less memory, for a third more time")
    parser.add_argument(
        "--deepspeed-config", type=Path, default=REPOSITORY / "ds_configs" / "finetune_commonsense.json"
    )
    parser.add_argument("--output-dir", type=Path, default=REPOSITORY / "runs" / "commonsense")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="passed by the deepspeed launcher")
    return parser


def settle(options: argparse.Namespace, world_size: int) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the DeepSpeed config that the options ask for.

    Raises:
        ValueError: the config cannot be read, has no FiraAdam, sets a schedule, or its batch does not divide.
    """
    config = read_json(options.deepspeed_config, "--deepspeed-config")
    params = config.get("optimizer", {}).get("params", {})
    if "scheduler" in config:
        raise ValueError(
            f"{options.deepspeed_config} sets a scheduler, but the recipe's depends on the data: remove it"
        )
    if config.get("optimizer", {}).get("type") != "FiraAdam" or not {"lr", "rank"} <= params.keys():
        raise ValueError(
            f"{options.deepspeed_config} has no optimizer FiraAdam with lr and rank, which this recipe trains with"
        )
    if options.method == "prefix" and options.activation_checkpointing:
        raise ValueError("--method prefix does not go with --activation-checkpointing, which drops peft's prefix cache")
    settle_batch(config, world_size, micro=options.batch_size)
    recipe = Recipe(
        lr=options.lr if options.lr is not None else params["lr"] if options.method == "fira" else Recipe().lr,
        epochs=options.epochs,
        warmup_steps=options.warmup_steps,
        max_length=options.max_length,
        batch_size=config[TOTAL],
    )
    if options.method == "fira":
        params["lr"] = recipe.lr
    else:
        config["optimizer"] = optimizer_block(options.method, recipe)
    return recipe, config


def load_model(options: argparse.Namespace, config: dict[str, Any], recipe: Recipe) -> torch.nn.Module:
    """The model to train, in the dtype that the engine computes in.

    Raises:
        OSError: there is no such model.
        ValueError: it is no model that transformers knows, or lacks the projections.
    """
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((low[name] for name in low if config.get(name, {}).get("enabled")), torch.float32)
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation=attention)
    model = prepare(model, options.method, recipe)
    if options.activation_checkpointing or "activation_checkpointing" in config:
        ds_fira.checkpoint_activations(model, config)
    return model


def answer(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: transformers.PreTrainedTokenizerBase,
    questions: Sequence[Question],
    recipe: Recipe,
) -> float:
    """Accuracy over the questions of one file, which the processes share; a collective call."""
    own = questions[dist.get_rank() :: dist.get_world_size()]
    found = predictions(engine.module, tokenizer, own, recipe.max_length) if own else []
    right = torch.tensor(
        sum(index == one.answer for index, one in zip(found, own, strict=True)),
        dtype=torch.float32,
        device=engine.device,
    )
    dist.all_reduce(right)
    return float(right) / len(questions)


def train(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: transformers.PreTrainedTokenizerBase,
    questions: Sequence[Question],
    recipe: Recipe,
    seed: int,
) -> list[float]:
    """The loss of every step, the mean over the processes."""
    rows = training_rows(tokenizer, questions, recipe.max_length)
    steps, losses = steps_of(len(rows), recipe), []
    division = {
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "accumulation": engine.gradient_accumulation_steps(),
    }
    for loss in fine_tune(engine, rows, recipe, tokenizer.eos_token_id, seed, **division):
        dist.all_reduce(loss)
        losses.append(loss / dist.get_world_size())
        if dist.get_rank() == 0 and len(losses) % LOG_EVERY == 0:
            print(f"step {len(losses)} of {steps}: loss {float(losses[-1]):.4f}", flush=True)
    return [float(loss) for loss in losses]


def work(options: argparse.Namespace) -> tuple[deepspeed.DeepSpeedEngine, dict[str, Any]]:
    """Fine-tune and answer; on every process, after torch.distributed has started.

    Raises:
        OSError: there is no such model.
        ValueError: a setting or a file cannot be used; one sentence, the same on every process.
    """
    recipe, config = settle(options, dist.get_world_size())
    questions = [one for path in options.train for one in read_questions(path)]
    tests = {str(path): read_questions(path) for path in options.tests}
    for path, part in tests.items():
        if any(len(one.responses) < 2 for one in part):
            raise ValueError(
                f'{path} has questions without choices: end their instructions with "Answer format: a/b", or add a '
                "field choices"
            )
    steps = steps_of(len(questions), recipe)
    if not 0 <= recipe.warmup_steps < steps:
        raise ValueError(
            f"--warmup-steps {recipe.warmup_steps} must be at least 0 and below the {steps} steps that "
            f"{len(questions)} questions give: change it, or train on more"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = load_model(options, config, recipe)
    engine = deepspeed.initialize(
        model=model,
        model_parameters=trained_parameters(model),
        config=config,
        lr_scheduler=functools.partial(schedule, recipe=recipe, steps=steps),
    )[0]
    summary: dict[str, Any] = {"method": options.method, "recipe": dataclasses.asdict(recipe), "config": config}
    summary["losses"] = train(engine, tokenizer, questions, recipe, options.seed)
    summary["accuracy"] = {path: answer(engine, tokenizer, part, recipe) for path, part in tests.items()}
    if dist.get_rank() == 0:
        for path, share in summary["accuracy"].items():
            print(f"{path}: {100 * share:.1f}%", flush=True)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        engine.module.save_pretrained(options.output_dir / "model")
        tokenizer.save_pretrained(options.output_dir / "model")
        (options.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return engine, summary


def main() -> None:
    """Start, work, end."""
    options = build_parser().parse_args()
    transformers.utils.logging.disable_progress_bar()
    try:
        ds_fira.init_distributed()
        transformers.set_seed(options.seed)
        engine, _ = work(options)
    except (OSError, ValueError) as error:
        stop(str(error))
    ds_fira.shutdown(engine)


def stop(sentence: str) -> NoReturn:
    """End every process in good order with one sentence; for errors that all of them know of."""
    ds_fira.shutdown()
    sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(sentence.split())}")


if __name__ == "__main__":
    main()
