"""A script that knows the Trainer and nothing of ds_fira: `python -m tests.integration.by_name FOLDER [JSON]`."""

import json
import sys

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from tests.small_models import llama


def main() -> None:
    """Train three steps; prints the optimizer, its groups and the losses."""
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 24, (24, 8))]
    trainer = Trainer(model=llama(), args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    optimizer = trainer.optimizer
    while not hasattr(optimizer, "algorithm"):
        optimizer = optimizer.optimizer
    groups = [
        {name: group.get(name) for name in ("rank", "alpha", "weight_decay", "betas", "eps")}
        for group in optimizer.param_groups
    ]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if args.process_index == 0:
        print("RESULT", json.dumps([type(optimizer).__name__, groups, losses, args.optim]), flush=True)
    trainer.accelerator.free_memory()


if __name__ == "__main__":
    sys.exit(main())
