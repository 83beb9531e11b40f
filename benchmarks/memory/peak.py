"""Peak memory of one optimizer step beyond what it starts with, counted by torch's allocator, and what stays as state.

    python -m benchmarks.memory.peak [--models 60m 350m] [--json FILE]

For every distinct matrix shape of a LLaMA, and for its embedding under AdamW: the peak of a step without a refresh,
less R and the direction, and both moments and the basis in float32 where states are compressed, as a share of the
matrix; and the peaks of `fira` 1.0.2 and fused AdamW, nothing subtracted. bfloat16 is a weight and a gradient in
bfloat16 (bf16 master weights).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import ds_fira
from benchmarks.common import default_device, device_name, save
from benchmarks.communication.partition import LLAMAS, llama_shapes
from benchmarks.memory.allocation import peak_bytes
from benchmarks.peers import PEERS, make_ds_fira
from ds_fira.core.subspace import low_rank_shape, projection_side
from ds_fira.optim.state_size import state_bytes

VOCABULARY = 32000


def measure(make: Any, shape: tuple[int, int], rank: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Peak bytes of a step after the first one, and bytes of state."""
    param = torch.nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype))
    param.grad = torch.randn(shape, device=device).to(dtype)
    optimizer = make(param, rank)
    optimizer.step()
    return peak_bytes(optimizer.step, device), state_bytes(optimizer)


def low_rank_bytes(shape: tuple[int, int], rank: int) -> int:
    """Bytes of R in float32."""
    a, b = low_rank_shape(shape, rank, projection_side(shape, "std", "released"))
    return 4 * a * b


def ds_fira_row(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, state_dtype: str, device: torch.device
) -> dict[str, Any]:
    """One row of FiraAdam's own figures."""
    held = 2 if state_dtype == "float32" else 4
    peak, state = measure(
        lambda param, r: make_ds_fira(param, r, subspace="gram", state_dtype=state_dtype), shape, rank, dtype, device
    )
    matrix = shape[0] * shape[1] * dtype.itemsize
    beyond = peak - held * low_rank_bytes(shape, rank)
    if state_dtype != "float32":
        beyond -= 4 * min(rank, *shape) * min(shape)  # the basis in float32
    return {
        "shape": shape,
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "state_dtype": state_dtype,
        "peak_bytes": peak,
        "state_bytes": state,
        "beyond_low_rank_share": beyond / matrix,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["60m", "350m"], choices=list(LLAMAS))
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    device = default_device()
    print(device_name(device))
    print(f"{'shape':>14}{'rank':>6}{'weight':>10}{'states':>10}{'beyond R':>10}{'peak MB':>9}{'state MB':>10}")
    rows = []
    for model in args.models:
        rank = LLAMAS[model][4]
        for shape in llama_shapes(model):
            cases = [(torch.float32, name) for name in ("float32", "bfloat16", "int8")] + [(torch.bfloat16, "float32")]
            for dtype, state_dtype in cases:
                row = ds_fira_row(shape, rank, dtype, state_dtype, device)
                rows.append(row)
                print(
                    f"{shape[0]:>8} x{shape[1]:>5}{rank:>5}{row['dtype']:>10}{state_dtype:>10}"
                    f"{row['beyond_low_rank_share']:>10.1%}{row['peak_bytes'] / 1e6:>9.2f}"
                    f"{row['state_bytes'] / 1e6:>10.2f}",
                    flush=True,
                )
            for peer in ("fira", "AdamW"):
                peak, state = measure(PEERS[peer], shape, rank, torch.float32, device)
                rows.append({"peer": peer, "shape": shape, "rank": rank, "peak_bytes": peak, "state_bytes": state})
                print(f"{shape[0]:>8} x{shape[1]:>5}{rank:>5}{peer:>20}{'':>10}{peak / 1e6:>9.2f}{state / 1e6:>10.2f}")
        embedding = (VOCABULARY, LLAMAS[model][0])
        for state_dtype in ("float32", "bfloat16", "int8"):
            peak, state = measure(
                lambda param, _, kept=state_dtype: ds_fira.FiraAdam(
                    [param], lr=1e-3, rank=min(param.shape), state_dtype=kept
                ),
                embedding,
                rank,
                torch.float32,
                device,
            )
            share = peak / (4 * embedding[0] * embedding[1])
            rows.append({"shape": embedding, "state_dtype": state_dtype, "peak_bytes": peak, "state_bytes": state})
            print(
                f"{embedding[0]:>8} x{embedding[1]:>5}{'none':>5}{'float32':>10}{state_dtype:>10}{share:>10.1%}"
                f"{peak / 1e6:>9.2f}{state / 1e6:>10.2f}"
            )
    save(args.json, device, rows=rows)


if __name__ == "__main__":
    main()
