"""The training loop of the pre-training example: schedule, steps, validation, progress bar."""

import argparse
import math
import sys
import time
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import ds_fira
from ds_fira.checkpoint.atomic_save import prune

from .data import TrainingData
from .options import STATE
from .progress import preparation_bar, progress_bar
from .report import History, perplexity

LOG_EVERY = 10
# Steps from the first log on, before a machine's speed is trusted; those before it are slow and would mislead.
PROBE_STEPS = 20
# Key of the data's state in DeepSpeed's checkpoint.
DATA_STATE = "data"


def cosine_schedule(optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> LambdaLR:
    """Linear warm-up, then a cosine down to `min_lr_ratio` of the peak; one function serves any number of groups.

    It reads `options.steps` at every step, because a time budget may change it; the warm-up keeps its share.
    """
    warmup_share = options.warmup_steps / options.steps

    def factor(step: int) -> float:
        warmup = round(warmup_share * options.steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, options.steps - warmup))
        return options.min_lr_ratio + (1 - options.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def train(
    engine: deepspeed.DeepSpeedEngine, data: TrainingData, options: argparse.Namespace, history: History
) -> dict[str, Any] | None:
    """Run the training steps, fill `history`, and return the size and the speed of the run.

    On SIGTERM, to any process, it saves the training state and returns None.
    """
    start, world_size = engine.global_steps, dist.get_world_size()
    micro_steps, batch_size = engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()
    batches = data.batches()
    tokens_per_step = batch_size * micro_steps * world_size * options.seq_length
    running = torch.zeros((), device=engine.device)
    began = time.perf_counter()
    history.validation.append((start, evaluate(engine, data, options.eval_batches)))
    evaluating = time.perf_counter() - began

    step, logged, requested = start, start, options.steps
    probe_step, probe_time, stepping = None, 0.0, 0.0
    with training_bar(options.steps, start) as bar, ds_fira.Termination() as termination:
        while step < options.steps:
            for _ in range(micro_steps):
                ids = next(batches).to(engine.device)
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                running += loss.detach()
            step += 1
            bar.update()
            stepping = time.perf_counter() - began - evaluating
            if step % LOG_EVERY == 0 or step == options.steps:
                dist.all_reduce(running)
                mean = running.item() / (world_size * micro_steps * (step - logged))
                history.train.append((step, mean))
                running.zero_()
                logged = step
                bar.set_postfix_str(
                    f"loss {mean:.3f}, perplexity {perplexity(mean):.0f}, lr {engine.get_lr()[0]:.1e}, "
                    f"{(step - start) * tokens_per_step / stepping:,.0f} tokens/s",
                    refresh=False,
                )
                if probe_step is None:
                    probe_step, probe_time = step, stepping
                elif options.time_budget is not None and step - probe_step >= PROBE_STEPS:
                    seconds_per_step = (stepping - probe_time) / (step - probe_step)
                    affordable = step + int((options.time_budget - stepping) / seconds_per_step)
                    fit_to_budget(options, bar, affordable=max(affordable, step), requested=requested)
            if step % options.eval_every == 0 and step < options.steps:
                pause = time.perf_counter()
                history.validation.append((step, evaluate(engine, data, options.eval_batches)))
                write_above(bar, f"step {step}: validation loss {history.validation[-1][1]:.3f}")
                evaluating += time.perf_counter() - pause
            terminated = termination.requested()
            if terminated or (options.save_every is not None and step % options.save_every == 0):
                save_state(engine, data, options)
            if terminated:
                write_above(bar, f"SIGTERM: saved the training state of step {step}; --resume auto goes on from it")
                return None

    tokens = (step - start) * tokens_per_step
    waiting = torch.tensor(data.waiting_seconds, device=engine.device)
    dist.all_reduce(waiting, op=dist.ReduceOp.MAX)
    return {
        "steps": step,
        "steps_requested": requested,
        "tokens": tokens,
        "tokens_per_second": tokens / stepping if tokens else 0.0,
        "seconds": time.perf_counter() - began,
        "data_wait_share": waiting.item() / stepping if tokens else 0.0,  # of the process that waited longest
        "world_size": world_size,
    }


def save_state(engine: deepspeed.DeepSpeedEngine, data: TrainingData, options: argparse.Namespace) -> None:
    """Save the training state, then delete old ones; a collective call."""
    folder = options.output_dir / STATE
    engine.save_checkpoint(str(folder), client_state={DATA_STATE: data.state_dict()})
    if options.keep_checkpoints is not None and dist.get_rank() == 0:
        prune(folder, options.keep_checkpoints)


def fit_to_budget(options: argparse.Namespace, bar: tqdm, *, affordable: int, requested: int) -> None:
    """Set `options.steps` to the affordable ones, never more than requested; the first process decides for all.

    A machine may be slow for a while only, so a later call can raise the number again.
    """
    decision = [min(requested, affordable)]
    dist.broadcast_object_list(decision, src=0)
    if decision[0] < options.steps == requested:
        write_above(
            bar, f"slow here: at this speed {decision[0]} steps fit into {options.time_budget:.0f} s of training"
        )
    options.steps = bar.total = decision[0]


def write_above(bar: tqdm, line: str) -> None:
    """Print a line above the bar; on the first process, since tqdm's own `write` prints on all."""
    if not bar.disable:
        bar.write(line, file=sys.stderr)


def training_bar(steps: int, start: int) -> tqdm:
    """The bar of the optimizer steps."""
    return progress_bar(
        total=steps,
        initial=start,
        bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
    )


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, data: TrainingData, batches: int | None = None) -> float:
    """Mean validation loss in nats per token over all processes, on `batches` of each or on everything."""
    total = torch.zeros(2, device=engine.device)  # sum of losses, sequences
    engine.eval()
    with preparation_bar("validating", data.validation_length(batches), unit=" batches") as bar:
        for ids in data.validation_batches(batches):
            ids = ids.to(engine.device)
            loss = engine(input_ids=ids, labels=ids).loss
            total += torch.stack([loss * len(ids), torch.full_like(loss, len(ids))])
            bar.update()
    engine.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()
