"""One training run, in one process and without DeepSpeed: what is compared here is optimizers.

python -m examples.reproduction.lib.train --size tiny --method Fira --lr 0.01 [--settings '{"rank": 8}']
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ds_fira
from examples.reproduction.lib import data, methods
from examples.reproduction.lib.provenance import stamp
from examples.reproduction.lib.spec import SIZES, Run, Size, settings_of

# Appendix A.2: warm-up over the first tenth of the steps, then a cosine down to a tenth of the peak.
WARM_UP_SHARE, FINAL_SHARE = 0.1, 0.1
VALIDATIONS = 6
# ReLoRA (arXiv 2307.05695): full-rank training first, then low-rank parts that are merged and started anew, each with
# a short warm-up of its own.
RELORA_FULL_SHARE, RELORA_PARTS, RELORA_WARM_UP = 0.25, 4, 10


def learning_rate(step: int, steps: int) -> float:
    """The share of the peak at a step, counted from 0."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def restarts(steps: int) -> list[int]:
    """The steps at which ReLoRA merges; at the first one its low-rank training begins."""
    first = round(RELORA_FULL_SHARE * steps)
    return [first + round(part * (steps - first) / RELORA_PARTS) for part in range(RELORA_PARTS)]


class Training:
    """Model, optimizer and text of a run.

    Args:
        run: what to train.
        size: of model and training.
        text: prepared for the size.
        device: to train on.
    """

    def __init__(self, run: Run, size: Size, text: data.Text, device: torch.device) -> None:
        torch.manual_seed(run.seed)
        self.run, self.size, self.text, self.device = run, size, text, device
        self.model: nn.Module = methods.build_model(run, size).to(device)
        if run.method == "LoRA":
            self.model = methods.add_adapters(run, size, self.model)
        self.optimizer = methods.build_optimizer(run, size, self.model)
        self.optimizer_seconds = 0.0
        self.restarts = restarts(size.steps) if run.method == "ReLoRA" else []

    def set_learning_rate(self, step: int) -> None:
        """The schedule, and ReLoRA's short warm-ups."""
        factor = learning_rate(step, self.size.steps)
        since = min((step - start for start in self.restarts if start <= step), default=None)
        if since is not None:
            factor *= min(1.0, (since + 1) / RELORA_WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.lr * factor

    def restart(self, step: int) -> None:
        """ReLoRA's change from full-rank training, or from one low-rank part to the next."""
        if step == self.restarts[0]:
            self.model = methods.add_adapters(self.run, self.size, self.model)
            self.optimizer = methods.build_optimizer(self.run, self.size, self.model)
        else:
            methods.merge_adapters(self.model)
            for param in methods.adapter_parameters(self.model):
                self.optimizer.state.pop(param, None)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, in nats."""
        rows = rows.to(self.device)
        logits = self.model(input_ids=rows).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def step(self, step: int, rows: np.ndarray) -> tuple[float, float]:
        """One optimizer step; the mean loss of the batch and the norm of its gradient before clipping."""
        if step in self.restarts:
            self.restart(step)
        self.set_learning_rate(step)
        self.model.train()
        ids = torch.from_numpy(self.text.train[rows]).long()
        parts = ids.split(self.size.micro_batch or len(ids))
        total = 0.0
        for part in parts:
            loss = self.loss(part) * (len(part) / len(ids))
            loss.backward()
            total += float(loss.detach())
        params = [param for param in self.model.parameters() if param.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(params, math.inf if self.run.clip is None else self.run.clip))
        began = time.thread_time()
        self.optimizer.step()
        self.optimizer_seconds += time.thread_time() - began
        self.optimizer.zero_grad()
        return total, norm

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation rows."""
        self.model.eval()
        parts = self.text.validation.split(4 * (self.size.micro_batch or self.size.batch))
        return sum(float(self.loss(part)) * len(part) for part in parts) / len(self.text.validation)


def train(run: Run, size: Size, device: torch.device | None = None) -> dict[str, Any]:
    """Train and validate.

    Returns:
        JSON-able: `key`, `run`, `size`, `provenance`; `train_loss` and `grad_norm` of every step; `validation`, pairs
        of step and loss, the last at the end; `val_loss`; `state_bytes` of the optimizer, `parameters`,
        `trainable_parameters`; `seconds` of processor time on a CPU (which other processes do not lengthen), of
        wall time on a GPU, and `optimizer_seconds` of the optimizer's steps; `scaling_factors`, if recorded.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    key, text = run.key(size), data.load(run.text, size)
    size = run.stretched(size)
    training = Training(run, size, text, device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    every = max(1, size.steps // VALIDATIONS)
    losses, norms, validation, validating = [], [], [], 0.0
    parameters = sum(param.numel() for param in training.model.parameters())
    batches = training.text.batches(run.seed, size.batch)
    if len(batches) < size.steps:
        raise ValueError(
            f"{size.steps} steps need {size.steps * size.batch} rows, the text has {len(training.text.train)}"
        )
    began = clock()
    for step in range(size.steps):
        loss, norm = training.step(step, batches[step])
        losses.append(round(loss, 4))
        norms.append(float(f"{norm:.4g}"))
        if not math.isfinite(loss):
            break
        if (step + 1) % every == 0 or step + 1 == size.steps:
            pause = clock()
            validation.append((step + 1, round(training.validate(), 5)))
            validating += clock() - pause
    finished = len(losses) == size.steps and math.isfinite(validation[-1][1])
    result = {
        "key": key,
        "run": dataclasses.asdict(run),
        "size": size.name,
        "provenance": origin(),
        "text": {name: training.text.facts[name] for name in ("source", "tokens", "unigram_entropy")},
        "parameters": parameters,
        "trainable_parameters": sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        "state_bytes": methods.state_bytes(training.optimizer),
        # A run that left the finite numbers has no perplexity; its curve tells where it ended.
        "val_loss": validation[-1][1] if finished else None,
        "validation": validation,
        "train_loss": [loss if math.isfinite(loss) else None for loss in losses],
        "grad_norm": [norm if math.isfinite(norm) else None for norm in norms],
        "seconds": round(clock() - began - validating, 2),
        "optimizer_seconds": round(training.optimizer_seconds, 2),
    }
    if run.record:
        result["scaling_factors"] = factors_of(training.optimizer)
    return result


@functools.cache
def origin() -> dict[str, Any]:
    """Asked once in a process: what it has imported is what it trains with."""
    return stamp()


def factors_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The record of scaling factors, JSON-able."""
    found = ds_fira.scaling_factors(optimizer)
    return {
        name: {
            key: [float(f"{number:.5g}") for number in value.tolist()] if isinstance(value, Tensor) else value
            for key, value in record.items()
        }
        for name, record in found.items()
    }


def main() -> None:
    """Train one run and print its result, without its curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, help="instead of the size's")
    parser.add_argument("--method", choices=("Adam", "Fira", "GaLore", "LoRA", "ReLoRA"), default="Fira")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--settings", type=json.loads, default={}, help="of the optimizer, as a JSON object")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", choices=("reviews", "python"), default="reviews")
    parser.add_argument("--architecture", choices=tuple(methods.LINEAR), default="llama")
    parser.add_argument("--clip", type=float)
    args = vars(parser.parse_args())
    size, steps = SIZES[args.pop("size")], args.pop("steps")
    if steps:
        size = dataclasses.replace(size, steps=steps)
    result = train(Run(**{**args, "settings": settings_of(**args["settings"])}), size)
    print(
        json.dumps({name: value for name, value in result.items() if name not in ("train_loss", "grad_norm")}, indent=1)
    )


if __name__ == "__main__":
    main()
