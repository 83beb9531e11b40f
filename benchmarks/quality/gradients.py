"""Real gradients for the other benchmarks: a LLaMA is trained on text, and its weights' gradients kept at some steps.

    python -m benchmarks.quality.gradients FOLDER [--models 60m 1b]

The models have the widths of the paper's LLaMA 60M and 1B, but few layers and a small vocabulary, and are trained with
`FiraAdam` on the packaged film reviews (`pretraining.text_data`) in float32. Each batch has more tokens than the
shorter side of a weight, for a gradient has no more rank than its batch has tokens. What is made is kept in FOLDER,
outside the repository, and made again where it is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ds_fira
from benchmarks.communication.partition import LLAMAS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from pretraining.rows import PreparedRows
from pretraining.text_data import TextData, TextRecipe, prepare

SEED = 0
SEQ_LENGTH = 128
VOCAB_SIZE = 2048

# step -> name of a projected weight -> its gradient
Snapshots = dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        model: key of `LLAMAS`, for the widths and the rank.
        layers: decoder layers.
        batch_size: sequences of `SEQ_LENGTH` tokens.
        steps: the steps whose gradients are kept, counted from 1.
        lr: learning rate.
        modules: parts of the names of the weights kept, to save space.
    """

    model: str
    layers: int
    batch_size: int
    steps: tuple[int, ...]
    lr: float
    modules: tuple[str, ...]


RUNS = {
    "60m": Run("60m", 2, 16, (1, 21, 41, 61, 201), 0.005, ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")),
    "1b": Run("1b", 1, 24, (1, 6, 11), 0.001, ("q_proj", "o_proj", "gate_proj", "down_proj")),
}


def text(folder: Path, seq_length: int = SEQ_LENGTH, vocab_size: int = VOCAB_SIZE) -> TextData:
    """The packaged reviews as token sequences, prepared once and kept in `folder`."""
    recipe = TextRecipe(text=None, vocab_size=vocab_size, seq_length=seq_length, seed=SEED)
    folder.mkdir(parents=True, exist_ok=True)
    return TextData.load(prepare(recipe, folder))


def llama(hidden: int, intermediate: int, layers: int, heads: int, vocab_size: int = VOCAB_SIZE) -> LlamaForCausalLM:
    """A LLaMA of the given widths with random weights of the current seed."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def training_batches(data: TextData, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of token ids, int64 of shape (batch_size, seq_length)."""
    rows = PreparedRows(data.train, {"seed": seed}, rank=0, world_size=1)
    rows.batch_size = batch_size
    return rows.batches()


def train(run: Run, folder: Path, device: str = "cpu") -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train, and give (step, gradients by weight) at every kept step."""
    hidden, intermediate, heads, _, rank = LLAMAS[run.model]
    data = text(folder)
    torch.manual_seed(SEED)
    model = llama(hidden, intermediate, run.layers, heads).to(device)
    groups = ds_fira.param_groups(model, rank=rank, alpha=0.25, update_proj_gap=200)
    optimizer = ds_fira.FiraAdam(groups, lr=run.lr)
    projected = {id(param) for group in groups if "rank" in group for param in group["params"]}
    batches = training_batches(data, run.batch_size, SEED)
    for step in range(1, run.steps[-1] + 1):
        ids = next(batches).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        if step in run.steps:
            print(f"{run.model}: step {step}, training loss {loss.item():.3f}", file=sys.stderr, flush=True)
            yield (
                step,
                {
                    name: param.grad.detach().cpu().clone()
                    for name, param in model.named_parameters()
                    if id(param) in projected and any(module in name for module in run.modules)
                },
            )
        optimizer.step()


def snapshots(name: str, folder: Path) -> Snapshots:
    """The gradients of `RUNS[name]`, read from `folder`, or made and written there."""
    path = folder / f"gradients-{name}.pt"
    if path.exists():
        kept = torch.load(path)
        if set(kept) == set(RUNS[name].steps):
            return kept
    kept = dict(train(RUNS[name], folder, "cuda" if torch.cuda.is_available() else "cpu"))
    # In one rename, so that an interrupted run leaves nothing half-made behind.
    scratch = path.with_suffix(".partial")
    torch.save(kept, scratch)
    scratch.rename(path)
    return kept


def main() -> None:
    """Make what is missing, and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=list(RUNS), choices=list(RUNS))
    args = parser.parse_args()
    for name in args.models:
        start = time.perf_counter()
        kept = snapshots(name, args.folder)
        shapes = {weight: tuple(grad.shape) for weight, grad in kept[RUNS[name].steps[0]].items()}
        print(f"{name}: steps {', '.join(map(str, kept))}, {time.perf_counter() - start:.0f} s")
        for weight, shape in shapes.items():
            print(f"    {weight:40}{shape[0]:>6} x{shape[1]:>5}")


if __name__ == "__main__":
    main()
