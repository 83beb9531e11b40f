"""Pre-train a LLaMA on real text with FiraAdam, configured by a DeepSpeed JSON: a small one, or one of the paper's.

All of these run it, on CPU or GPU::

    bash launch/run.sh examples/pretrain_llama.py           (under deepspeed, torchrun, mpirun or srun)
    deepspeed --num_gpus 2 examples/pretrain_llama.py
    torchrun --standalone --nproc_per_node 2 examples/pretrain_llama.py
    python examples/pretrain_llama.py

It leaves a checkpoint that `transformers` opens, a loss plot and `summary.json` in `--output-dir`.
"""

import sys
import warnings

import datasets
import deepspeed.comm as dist
import torch
import transformers
from pretraining import options as command_line
from pretraining import report
from pretraining.arguments import FAILED, stop
from pretraining.documents import DataError
from pretraining.finish import final_figures, save_model
from pretraining.loop import train
from pretraining.start import check_start, load_state, plan, start_engine, training_data

import ds_fira
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
        stop(str(error), engine, FAILED)
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


if __name__ == "__main__":
    main()
