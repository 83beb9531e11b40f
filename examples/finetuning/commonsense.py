"""Fine-tune a LLaMA on commonsense questions under DeepSpeed, the paper's Table 6, and answer test questions.

    deepspeed --num_gpus 8 examples/finetuning/commonsense.py --model /data/llama-7b \
        --train /data/commonsense_170k.json --tests /data/dataset/*/test.json --output-dir runs/commonsense

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
from typing import Any

# The packages of the examples, whatever the working folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from pretraining.arguments import stop

import ds_fira
from finetuning.choices import Question, predictions, read_questions, training_rows
from finetuning.loop import fine_tune, schedule, steps_of
from finetuning.options import build_parser, load_model, settle
from finetuning.tuning import Recipe, trained_parameters

LOG_EVERY = 10


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


if __name__ == "__main__":
    main()
