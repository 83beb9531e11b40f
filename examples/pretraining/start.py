"""Before the first step: the batch settled, the memory checked, the text opened, the training state loaded.

What is wrong ends every process in good order with one sentence.
"""

import argparse
import functools
import sys

import deepspeed
import deepspeed.comm as dist
import torch
import transformers

import ds_fira
from ds_fira.checkpoint.atomic_save import CheckpointError

from .arguments import stop
from .batch import settle_batch
from .data import TrainingData, open_data
from .documents import DataError
from .loop import DATA_STATE, cosine_schedule
from .options import STATE
from .plan import check_memory, describe, estimate_run, own_memory
from .rows import State
from .text_data import TextRecipe


def plan(
    options: argparse.Namespace, model_config: transformers.LlamaConfig, deepspeed_config: dict[str, object]
) -> None:
    """Settle the batch and check the memory; end here for `--dry-run`."""
    try:
        settle_batch(deepspeed_config, dist.get_world_size(), micro=options.batch_size, total=options.total_batch_size)
        checkpointing = options.activation_checkpointing != "none"
        found = estimate_run(model_config, deepspeed_config, options.seq_length, checkpointing)
        if not options.dry_run:
            check_memory(found)
            return
    except ValueError as error:
        stop(str(error))
    available = own_memory()
    if dist.get_rank() == 0:
        name = options.model or "LLaMA"
        print(describe(found, available, name, deepspeed_config, options.steps, options.seq_length), flush=True)
    ds_fira.shutdown()
    sys.exit(0)


def training_data(options: argparse.Namespace) -> TrainingData:
    """The data, prepared by the first process while the others wait.

    Where it cannot be used, every process ends with the same sentence.
    """
    recipe = TextRecipe(
        text=options.data,
        vocab_size=options.vocab_size,
        seq_length=options.seq_length,
        seed=options.seed,
        validation_text=options.validation_data,
        validation_tokens=options.validation_tokens,
        tokenizer=options.tokenizer,
        text_column=options.text_column,
        streaming=options.streaming,
    )
    if dist.get_rank() == 0:
        print("Preparing the text (about half a minute the first time, then cached) ...", flush=True)
    try:
        return open_data(recipe, options.cache_dir, lanes=options.lanes, block_rows=options.block_rows)
    except DataError as error:
        stop(str(error))


def start_engine(
    model: torch.nn.Module, options: argparse.Namespace, deepspeed_config: dict[str, object]
) -> deepspeed.DeepSpeedEngine:
    """The engine alone: a reference to the optimizer kept beside it would outlive `ds_fira.shutdown`."""
    scheduler = None if "scheduler" in deepspeed_config else functools.partial(cosine_schedule, options=options)
    try:
        return deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=deepspeed_config, lr_scheduler=scheduler
        )[0]
    except ValueError as error:
        stop(str(error))


def load_state(engine: deepspeed.DeepSpeedEngine, options: argparse.Namespace) -> State | None:
    """Go on from the newest complete training state as `--resume` says; None where the run starts anew."""
    if options.resume is None:
        return None
    folder = options.output_dir / STATE
    try:
        loaded, client_state = engine.load_checkpoint(str(folder))
    except CheckpointError as error:
        stop(str(error), engine)
    if loaded is not None:
        return client_state
    if options.resume == "last":
        stop(f"--resume found no complete training state in {folder}", engine)
    if dist.get_rank() == 0:
        print(f"No complete training state in {folder}: starting anew ...", flush=True)
    return None


def check_start(
    engine: deepspeed.DeepSpeedEngine,
    data: TrainingData,
    client_state: State | None,
    options: argparse.Namespace,
) -> None:
    """Start the data where the training state left it; stop where it cannot, or where nothing is left to do."""
    # A run that was killed behind its last step has its last validation, model and report still to make.
    if engine.global_steps > options.steps or (engine.global_steps == options.steps and options.resume != "auto"):
        stop(f"the training state is at step {engine.global_steps} already: raise --steps {options.steps}", engine)
    try:
        if client_state is not None:
            if DATA_STATE not in client_state:
                raise DataError("the training state does not say where in the data it stopped: start a new run")
            data.load_state_dict(client_state[DATA_STATE])
            if dist.get_rank() == 0:
                print("Going back to the place in the data where the run stopped ...", flush=True)
        data.start(engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps())
    except DataError as error:
        data.close()
        stop(str(error), engine)
