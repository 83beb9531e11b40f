"""Supervised fine-tuning with trl's SFTTrainer and LoRA adapters, whose factors FiraAdam steps under DeepSpeed.

    pip install trl peft
    deepspeed --num_gpus 2 examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl
    torchrun --standalone --nproc_per_node 2 examples/trl_sft.py ... --max_steps 500 --bf16 true

`rows.jsonl` has one object a line, {"prompt": "...", "completion": "..."}; the loss is on the completions. All
arguments of trl's SFTConfig work, but for --deepspeed, which `configuration` below makes. The adapters' rank is 32 and
Fira's 16, as in the fine-tuning script of the paper's authors. Leave `peft_config` out to train the weights
themselves: FiraAdam saves the memory without adapters.
"""

# No `from __future__ import annotations`: HfArgumentParser reads the types of the dataclass.
import argparse
import dataclasses
import sys
from pathlib import Path
from typing import NoReturn

import torch

import ds_fira  # registers FiraAdam

try:
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import HfArgumentParser
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    print(f"trl_sft.py: error: {error.name} is missing: pip install trl peft datasets", file=sys.stderr)
    sys.exit(2)


@dataclasses.dataclass
class Options:
    """What to fine-tune, and on which rows."""

    data: Path = dataclasses.field(metadata={"help": "JSON lines of prompt and completion, or of messages"})
    model: str = dataclasses.field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "hub name or folder"})
    lora_rank: int = dataclasses.field(default=32, metadata={"help": "of the adapters"})
    rank: int = dataclasses.field(default=16, metadata={"help": "of FiraAdam's projection, below --lora_rank"})
    alpha: float = dataclasses.field(default=1.0, metadata={"help": "scale of FiraAdam's update of the factors"})


def configuration(options: argparse.Namespace) -> dict[str, object]:
    """The DeepSpeed config; trl's arguments fill in what is "auto"."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2},
        "optimizer": {
            "type": "FiraAdam",
            "params": {
                "lr": "auto",
                "betas": "auto",
                "weight_decay": "auto",
                "rank": options.rank,
                "alpha": options.alpha,
                "update_proj_gap": 200,
            },
        },
    }


def parse(arguments: list[str] | None = None) -> tuple[Options, SFTConfig]:
    """The command line; raises `ValueError` where it cannot be used."""
    parser = HfArgumentParser((Options, SFTConfig), allow_abbrev=False)
    given = parser.parse_args(arguments)
    parser.set_defaults(
        output_dir="runs/sft",
        learning_rate=1e-4,
        deepspeed=configuration(given),
        # Without a GPU the Trainer takes itself for one process, whatever the launcher, unless it is told.
        use_cpu=not torch.cuda.is_available(),
    )
    options, training = parser.parse_args_into_dataclasses(arguments)
    if not options.data.is_file():
        raise ValueError(f"--data {options.data} does not exist; give a file of JSON lines with prompt and completion.")
    if options.rank >= options.lora_rank:
        raise ValueError(
            f"--rank {options.rank} is not below --lora_rank {options.lora_rank}, so nothing would be projected; give "
            f"--rank {max(1, options.lora_rank // 2)}."
        )
    return options, training


def stop(error: Exception) -> NoReturn:
    """End every process in good order, with one sentence and the status of a wrong option; all of them know of it."""
    ds_fira.shutdown()
    print(f"trl_sft.py: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Fine-tune and save the adapters, under the deepspeed launcher, torchrun, mpirun, or none."""
    ds_fira.init_distributed()
    try:
        options, training = parse()
        trainer = SFTTrainer(
            model=options.model,
            args=training,
            train_dataset=load_dataset("json", data_files=str(options.data), split="train"),
            peft_config=LoraConfig(
                r=options.lora_rank,
                lora_alpha=2 * options.lora_rank,
                target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
                task_type="CAUSAL_LM",
            ),
        )
    except (OSError, ValueError) as error:
        stop(error)
    try:
        trainer.train()
    except ValueError as error:
        if trainer.state.global_step > 0:
            raise
        stop(error)  # a setting that FiraAdam refuses when DeepSpeed builds it
    trainer.save_model()
    figures = ds_fira.metrics(trainer.model_wrapped)  # a collective call: on every rank
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(
            f"loss {losses[0]:.3f} to {losses[-1]:.3f}; {figures['projected_matrices']} factors projected", flush=True
        )
    # Ends the engine; with the Trainer gone nothing holds its optimizer, and the processes can end in good order.
    trainer.accelerator.free_memory()
    del trainer
    ds_fira.shutdown()


if __name__ == "__main__":
    main()
