"""Train a causal language model with the Hugging Face Trainer and FiraAdam, from a DeepSpeed JSON or by name.

    deepspeed --num_gpus 2 examples/hf_trainer.py --model llama_60m --bf16 --learning_rate 0.005 --output_dir runs/hf
    torchrun --standalone --nproc_per_node 2 examples/hf_trainer.py ... --resume_from_checkpoint last
    python examples/hf_trainer.py --weights bfloat16 --optim fira_adamw --optim_args rank=128 --output_dir runs/one

Every argument of `TrainingArguments` works. `--deepspeed` is ds_configs/zero2_auto.json unless given: its "auto" values
come from the arguments, FiraAdam's own settings from the file. docs/ecosystem.md tells what to watch. With
`--optim fira_adamw` the settings are in `--optim_args`, and no DeepSpeed is used unless `--deepspeed` names a file.
"""

from __future__ import annotations

import math

import torch
from huggingface.common import collate, load, train
from huggingface.trainer_options import Options, parse
from pretraining.arguments import stop
from transformers import Trainer, TrainingArguments, set_seed

import ds_fira  # registers FiraAdam
from ds_fira.optim.registry import TYPES


def build(options: Options, training: TrainingArguments) -> Trainer:
    """The Trainer with its model and its text; raises as `huggingface.common.load`."""
    set_seed(training.seed)
    text = (options.text, options.seq_length, options.cache_dir, options.text_column)
    task = load(options.model, *text, dtype=getattr(torch, options.weights))
    return Trainer(
        model=task.model,
        args=training,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.tokenizer,
        data_collator=collate,
    )


def run(trainer: Trainer) -> dict[str, float]:
    """Train, validate and save; returns the figures of the last validation.

    Leaves in `output_dir` the model and its tokenizer, the Trainer's checkpoints, its log and the figures.
    """
    result = train(trainer)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)

    config = trainer.args.hf_deepspeed_config if trainer.is_deepspeed_enabled else None
    trained = trainer.optimizer.optimizer if config is None else trainer.model_wrapped
    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    if config is None or config.get_value("optimizer.type") in TYPES:
        metrics |= ds_fira.metrics(trained)
        metrics["optimizer_state_bytes"] = sum(ds_fira.memory_report(trained)["optimizer_state_bytes"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


def main() -> None:
    """Run under the deepspeed launcher, torchrun, mpirun, or none."""
    ds_fira.init_distributed()
    try:
        trainer = build(*parse())
    except (OSError, ValueError) as error:
        stop(str(error))
    run(trainer)
    # Ends the engine; with the Trainer gone nothing holds its optimizer, and the processes can end in good order.
    trainer.accelerator.free_memory()
    del trainer
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
