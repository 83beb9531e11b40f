"""Fira in plain PyTorch, without DeepSpeed: FiraAdam in the place of AdamW, and the optimizer's memory beside it.

    python examples/pytorch_train.py                      # a small transformer learns bytes of Python source
    python examples/pytorch_train.py --text FILE --steps 1000 --rank 32

It runs on a GPU where there is one. In a script of your own one line changes: `FiraAdam(model, ...)` in the place of
`AdamW(model.parameters(), ...)`; weights of linear layers are projected, all others are stepped by AdamW.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import ds_fira

BYTES = 256  # the vocabulary


class Transformer(nn.Module):
    """Predicts the next byte of a text."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(BYTES, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, length, 256) for tokens of shape (batch, length)."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.embedding(tokens) + self.places(torch.arange(length, device=tokens.device))
        return self.head(self.layers(x, mask=mask, is_causal=True))


def batch(text: Tensor, size: int, length: int) -> Tensor:
    """Random pieces of a text, int64 of shape (size, length + 1)."""
    starts = torch.randint(len(text) - length, (size, 1))
    return text[starts + torch.arange(length + 1)].long()


def main() -> None:
    """Train, and print the loss and the optimizer's memory."""
    parser = argparse.ArgumentParser(description="Train a small transformer with FiraAdam in plain PyTorch.")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="any file (default: argparse.py)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="bytes in a row")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16, help="of the projection, below --width")
    parser.add_argument("--lr", type=float, default=0.005)
    options = parser.parse_args()
    if not options.text.is_file() or options.text.stat().st_size <= options.length:
        parser.error(f"--text {options.text} is no file of more than {options.length} bytes; give another")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8)
    model = Transformer(options.width, options.layers, options.length).to(device)
    try:
        optimizer = ds_fira.FiraAdam(model, lr=options.lr, rank=options.rank, alpha=0.25, update_proj_gap=50)
    except ValueError as error:  # a wrong setting, in one sentence
        parser.error(str(error))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)

    for step in range(1, options.steps + 1):
        rows = batch(text, options.batch_size, options.length).to(device)
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    memory, figures = ds_fira.memory_report(optimizer), ds_fira.metrics(optimizer)
    print(
        f"optimizer state: {memory['optimizer_state_bytes'][0]:,} bytes, where AdamW holds {memory['adamw_bytes']:,}; "
        f"{figures['projected_matrices']} matrices, whose subspaces held {figures['captured_energy']:.0%} of |G|^2"
    )


if __name__ == "__main__":
    main()
