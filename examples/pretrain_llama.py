"""Pre-train a LLaMA on real text with FiraAdam, configured by a DeepSpeed JSON: a small one, or one of the paper's.

All of these run it, on CPU or GPU::

    bash launch/run.sh examples/pretrain_llama.py           (under deepspeed, torchrun, mpirun or srun)
    deepspeed --num_gpus 2 examples/pretrain_llama.py
    torchrun --standalone --nproc_per_node 2 examples/pretrain_llama.py
    python examples/pretrain_llama.py

It leaves a checkpoint that `transformers` opens, a loss plot and `summary.json` in `--output-dir`.
"""

import argparse
import functools
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import datasets
import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from pretraining import options as command_line
from pretraining import report
from pretraining.batch import settle_batch
from pretraining.data import TrainingData, open_data
from pretraining.loop import DATA_STATE, cosine_schedule, evaluate, train
from pretraining.plan import check_memory, describe, estimate_run, own_memory
from pretraining.sources import DataError
from pretraining.text_data import TextRecipe

import ds_fira
from ds_fira.checkpoint.atomic_save import CheckpointError
from ds_fira.optim.registry import TYPES
from ds_fira.tools.run_report.plots import write_page

STATUS_OF_SIGTERM = 143


def main() -> None:
    """Prepare the text, train, validate, save, and report."""
    options, model_config, deepspeed_config = command_line.parse()
    quiet_libraries()
    try:
        ds_fira.init_distributed(timeout=options.timeout)
    except ValueError as error:
        stop(str(error))
    transformers.set_seed(options.seed)
    plan(options, model_config, deepspeed_config)
    data = training_data(options)
    if options.vocab_size is None:
        model_config.vocab_size = data.facts["vocabulary"]
    # Generation stops at these; LlamaConfig's own defaults belong to another tokenizer.
    model_config.bos_token_id, model_config.eos_token_id = data.tokenizer.bos_token_id, data.tokenizer.eos_token_id
    # On a CPU in bf16 the plain attention takes two thirds of the time of the fused kernel, whose backward is slow.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    model = transformers.AutoModelForCausalLM.from_config(model_config, attn_implementation=attention)
    ds_fira.checkpoint_activations(model, deepspeed_config, method=options.activation_checkpointing)
    parameters = model.num_parameters()  # before ZeRO-3 could take the model apart
    engine = start_engine(model, options, deepspeed_config)
    client_state = load_state(engine, options)
    check_start(engine, data, client_state, options)
    history = report.History()
    try:
        summary = train(engine, data, options, history)
    except DataError as error:
        data.close()
        stop(str(error), engine)
    data.close()
    if summary is None:
        ds_fira.shutdown(engine)
        sys.exit(STATUS_OF_SIGTERM)
    summary |= final_figures(engine, data, options, history)
    summary |= {"parameters": parameters, "model": model_config.to_diff_dict(), "deepspeed_config": deepspeed_config}
    save_model(engine, data, options.output_dir / "model")

    is_first = dist.get_rank() == 0
    ds_fira.shutdown(engine)
    if is_first:
        report.write(options.output_dir, history=history, summary=summary, prompt=options.prompt, seed=options.seed)
        if options.report:
            print(f"plots: {write_page([options.output_dir])}", flush=True)


def quiet_libraries() -> None:
    """Leave the terminal to the progress bar; warnings and errors that concern the user still show."""
    # Every process would print that DeepSpeed calls collectives by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def plan(options: argparse.Namespace, model_config: transformers.LlamaConfig, deepspeed_config: dict[str, Any]) -> None:
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
    model: torch.nn.Module, options: argparse.Namespace, deepspeed_config: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """The engine alone: a reference to the optimizer kept beside it would outlive `ds_fira.shutdown`."""
    scheduler = None if "scheduler" in deepspeed_config else functools.partial(cosine_schedule, options=options)
    try:
        return deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=deepspeed_config, lr_scheduler=scheduler
        )[0]
    except ValueError as error:
        stop(str(error))


def load_state(engine: deepspeed.DeepSpeedEngine, options: argparse.Namespace) -> dict[str, Any] | None:
    """Go on from the newest complete training state as `--resume` says; None where the run starts anew."""
    if options.resume is None:
        return None
    folder = options.output_dir / command_line.STATE
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
    client_state: dict[str, Any] | None,
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


def stop(sentence: str, engine: deepspeed.DeepSpeedEngine | None = None) -> NoReturn:
    """End every process in good order with one sentence; for errors that all of them know of."""
    ds_fira.shutdown(engine)
    sys.exit(f"{Path(sys.argv[0]).name}: error: {sentence}")


def final_figures(
    engine: deepspeed.DeepSpeedEngine, data: TrainingData, options: argparse.Namespace, history: report.History
) -> dict[str, Any]:
    """The figures of the summary that need the engine; a collective call."""
    val_loss = evaluate(engine, data)
    history.validation.append((options.steps, val_loss))
    figures = {
        "optimizer": options.optimizer,
        "zero_stage": engine.zero_optimization_stage(),
        "val_loss": val_loss,
        "val_perplexity": report.perplexity(val_loss),
        "unigram_entropy": data.facts["unigram_entropy"],
        "text": data.facts,
    }
    if options.optimizer in TYPES:
        memory = ds_fira.memory_report(engine)
        figures |= ds_fira.metrics(engine)
        figures |= {
            "optimizer_state_bytes": memory["optimizer_state_bytes"],
            "optimizer_state_bytes_paper_formula": memory["paper_formula_bytes"],
            "optimizer_state_bytes_adamw": memory["adamw_bytes"],
        }
    return figures


def save_model(engine: deepspeed.DeepSpeedEngine, data: TrainingData, folder: Path) -> None:
    """Write model and tokenizer in the Hugging Face form; the first process writes, all take part."""
    model = engine.module
    # Under ZeRO-3 every process holds a part of each parameter, and none the whole.
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=engine.zero_optimization_stage() == 3):
        if dist.get_rank() == 0:
            model.config.use_cache = True
            model.save_pretrained(folder)
            data.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
