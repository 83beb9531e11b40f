"""Train a causal language model in a loop of your own with accelerate and FiraAdam from a DeepSpeed JSON.

    accelerate launch --config_file ds_configs/accelerate_zero2.yaml examples/accelerate_train.py --model llama_60m
    torchrun --standalone --nproc_per_node 2 examples/accelerate_train.py --deepspeed-config ds_configs/zero2_bf16.json

The first takes the JSON that the YAML names, the second makes the DeepSpeedPlugin itself. docs/ecosystem.md tells how
to pass a FiraAdam object instead, and what to watch.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DummyOptim,
    DummyScheduler,
    InitProcessGroupKwargs,
    set_seed,
)
from huggingface.common import Task, collate, load, refusals_stop
from huggingface.options import filled_config, parse
from pretraining.arguments import stop
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import ds_fira  # registers FiraAdam
from ds_fira.optim.registry import TYPES


def start(options: argparse.Namespace) -> Accelerator:
    """The accelerator with its DeepSpeed config; raises `ValueError` as `filled_config`."""
    config = filled_config(options)
    return Accelerator(
        # A script that fills nothing in needs no plugin: accelerate makes one of the file in the YAML.
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        gradient_accumulation_steps=config.get("gradient_accumulation_steps", 1),
        # One order of the rows for each seed and epoch, so that a resumed run goes on in it.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed),
        # Without a GPU accelerate takes itself for one process, whatever the launcher, unless it is told the backend.
        kwargs_handlers=[] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")],
    )


def prepare(accelerator: Accelerator, options: argparse.Namespace, task: Task) -> tuple[Any, DataLoader, DataLoader]:
    """The DeepSpeed engine and the loaders of its training and validation rows."""
    batch_size = accelerator.deepspeed_plugin.get_value("train_micro_batch_size_per_gpu")
    loader = DataLoader(task.train, batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    validation = DataLoader(task.validation, batch_size, collate_fn=collate)
    # Stand-ins: DeepSpeed builds the optimizer that the JSON names, and the scheduler over the param groups it makes.
    optimizer = DummyOptim(task.model.parameters(), lr=accelerator.deepspeed_plugin.get_value("optimizer.params.lr"))
    schedule = functools.partial(
        get_cosine_schedule_with_warmup, num_warmup_steps=options.warmup_steps, num_training_steps=options.steps
    )
    scheduler = DummyScheduler(optimizer, lr_scheduler_callable=schedule)
    engine, _, _, loader, validation = accelerator.prepare(task.model, optimizer, scheduler, loader, validation)
    return engine, loader, validation


def train(accelerator: Accelerator, options: argparse.Namespace, model: Any, loader: DataLoader) -> list[float]:
    """Train up to `options.steps`; returns the loss of every step, mean over the processes.

    Under accelerate's DeepSpeed, `backward` makes the step, too: of the optimizer, of the scheduler, and back to zero
    gradients. Calls of `optimizer.step` and the like do nothing.
    """
    accumulation = accelerator.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(loader) / accumulation)
    losses: list[float] = []
    while model.global_steps < options.steps:
        epoch, done = divmod(model.global_steps, steps_per_epoch)
        loader.set_epoch(epoch)
        micro_losses = []
        for batch in accelerator.skip_first_batches(loader, done * accumulation):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
            micro_losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            losses.append(accelerator.reduce(torch.stack(micro_losses).mean(), reduction="mean").item())
            micro_losses.clear()
            step = model.global_steps
            accelerator.print(f"step {step}: loss {losses[-1]:.4f}, lr {model.get_lr()[0]:.2e}", flush=True)
            if options.save_every is not None and step % options.save_every == 0:
                accelerator.save_state(str(options.output_dir / f"step_{step}"))
            if step >= options.steps:
                break
    return losses


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, loader: DataLoader) -> float:
    """Mean loss over the validation rows, in nats per token."""
    model.eval()
    losses = []
    for batch in loader:
        loss = model(**batch).loss.float()
        losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch["input_ids"]))))
    model.train()
    return torch.cat(losses).mean().item()


def run(accelerator: Accelerator, options: argparse.Namespace, task: Task) -> None:
    """Train, validate, save the model and the figures."""
    with refusals_stop(accelerator):
        model, loader, validation = prepare(accelerator, options, task)
        if options.resume is not None:
            accelerator.load_state(str(options.resume))
            accelerator.step = 0  # its micro-batches: a state is saved at the end of a step, maybe of another length
    losses, val_loss = train(accelerator, options, model, loader), evaluate(accelerator, model, validation)
    figures = {"losses": losses, "val_loss": val_loss, "val_perplexity": math.exp(val_loss)}
    if accelerator.deepspeed_plugin.get_value("optimizer.type") in TYPES:
        figures |= ds_fira.metrics(model)
    accelerator.unwrap_model(model).save_pretrained(
        options.output_dir / "model",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        task.tokenizer.save_pretrained(options.output_dir / "model")
        (options.output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    accelerator.print(f"validation loss {val_loss:.3f}, perplexity {figures['val_perplexity']:.1f}", flush=True)


def main() -> None:
    """Run under `accelerate launch`, the deepspeed launcher, torchrun, or none."""
    options = parse()
    ds_fira.init_distributed()
    try:
        accelerator = start(options)
        set_seed(options.seed)
        task = load(options.model, options.text, options.seq_length, options.cache_dir, options.text_column)
    except (OSError, ValueError) as error:
        stop(str(error))
    run(accelerator, options, task)
    accelerator.free_memory()  # drops its references to the engine, after which processes can end in good order
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
