"""One training of the study: model, prototype, schedule, losses. It goes on where it was cut short.

python -m examples.reproduction.transfer.train --method normalized --lr 0.01 --width 128 --rank 0.25 [--settings JSON]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from examples.reproduction.lib import data
from examples.reproduction.lib.provenance import ROOT, stamp
from examples.reproduction.lib.train import learning_rate
from examples.reproduction.transfer.prototypes import METHODS
from examples.reproduction.transfer.trials import BATCH, MODELS, VOCABULARY, Trial, settings_of

CHECKPOINTS = ROOT / "runs" / "transfer"
SAVE_SECONDS = 120.0
# Steps of training whose mean loss is one point of the curve.
CURVE = 25
ROWS_AT_ONCE = 64


def build_model(trial: Trial) -> nn.Module:
    """A LLaMA with the weights of the trial's seed."""
    torch.manual_seed(trial.seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=trial.width,
        intermediate_size=MODELS[trial.width][1],
        num_hidden_layers=trial.depth,
        num_attention_heads=trial.width // 32,
        max_position_embeddings=64,
        use_cache=False,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=rows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor) -> float:
    """Mean loss over rows."""
    parts = rows.split(ROWS_AT_ONCE)
    return sum(float(loss_of(model, part)) * len(part) for part in parts) / len(rows)


def train(trial: Trial, checkpoints: Path | None = CHECKPOINTS) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        trial: what to train.
        checkpoints: where a long trial keeps its state every two minutes; None to keep none.

    Returns:
        JSON-able: `key`, `trial`, `provenance`; `validation`, the loss by which rates are chosen, and `test`, that
        which is reported, None where training left the finite numbers; `curve`, mean training losses of 25 steps;
        `state_bytes` of the optimizer; `parameters`; `seconds` of processor time, `optimizer_seconds` of them.
    """
    text = data.load(trial.text, trial.size)
    model = build_model(trial)
    optimizer = METHODS[trial.method](model, trial)
    batches = text.batches(trial.seed, BATCH)
    if len(batches) < trial.steps:
        raise ValueError(f"{trial.steps} steps are more than an epoch of {trial.text}, which has {len(batches)}")
    losses: list[float] = []
    seconds = optimizer_seconds = 0.0
    place = checkpoints / f"{trial.key}.pt" if checkpoints and optimizer.resumable else None
    if place and place.exists():
        kept = torch.load(place, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        losses, seconds, optimizer_seconds = kept["losses"], kept["seconds"], kept["optimizer_seconds"]
    began, saved = time.process_time() - seconds, time.perf_counter()
    for step in range(len(losses), trial.steps):
        loss = loss_of(model, torch.from_numpy(text.train[batches[step]]).long())
        loss.backward()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        before = time.thread_time()
        optimizer.step(learning_rate(step, trial.steps))
        optimizer_seconds += time.thread_time() - before
        model.zero_grad()
        if place and time.perf_counter() - saved > SAVE_SECONDS:
            place.parent.mkdir(parents=True, exist_ok=True)
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            seconds = time.process_time() - began
            torch.save({**kept, "seconds": seconds, "optimizer_seconds": optimizer_seconds}, place.with_suffix(".new"))
            place.with_suffix(".new").replace(place)
            saved = time.perf_counter()
    seconds = time.process_time() - began
    half = len(text.validation) // 2
    scores = [evaluate(model, rows) for rows in (text.validation[:half], text.validation[half:])]
    finite = len(losses) == trial.steps and all(map(math.isfinite, scores))
    if place:
        place.unlink(missing_ok=True)
    return {
        "key": trial.key,
        "trial": dataclasses.asdict(trial),
        "provenance": origin(),
        "validation": round(scores[0], 5) if finite else None,
        "test": round(scores[1], 5) if finite else None,
        "curve": [round(sum(losses[i : i + CURVE]) / CURVE, 4) for i in range(0, len(losses) - CURVE + 1, CURVE)],
        "parameters": sum(param.numel() for param in model.parameters()),
        "state_bytes": optimizer.state_bytes,
        "seconds": round(seconds, 1),
        "optimizer_seconds": round(optimizer_seconds, 1),
    }


@functools.cache
def origin() -> dict[str, Any]:
    """Asked once in a process: what it has imported is what it trains with."""
    return stamp()


def main() -> None:
    """Train one trial and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--width", type=int, choices=MODELS, default=128)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rank", type=float, help="share of the width")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the method, as a JSON object")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", choices=("reviews", "python"), default="reviews")
    args = vars(parser.parse_args())
    print(json.dumps(train(Trial(**{**args, "settings": settings_of(**args["settings"])})), indent=1))


if __name__ == "__main__":
    main()
