"""What a step should take on a card that nobody has measured it on: bytes, operations, launches, and what limits each.

    python -m benchmarks.speed.model [--card h100] [--model 7b] [--ranks 8] [--rank 64 256 1024] [--precision tf32]
    python -m benchmarks.speed.model --results runs/gpu_check/results.jsonl      # measured ceilings, and a verdict

It predicts the step without a refresh that one rank makes of its share under ZeRO-2, float32 weights and gradients,
beside fused AdamW on the same tensors. Every line of `Assumptions` is a guess until a GPU has said otherwise: with the
results of `launch/gpu_check.sh` the ceilings come from the device, and a prediction that is off by more than
`TOLERANCE` is called refuted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.speed.cards import CARDS, Card, measured_card

# A prediction is refuted where it is off by more than this share of what is measured.
TOLERANCE = 0.35
# Bytes that fused AdamW moves for an element: W, M and V both ways, G.
ADAMW_BYTES = 28
PRECISIONS = ("tf32", "bfloat16")


@dataclass(frozen=True)
class Assumptions:
    """What the prediction takes for granted; the names are those of options.

    Attributes:
        tile: rows and columns of the tile of a product, whose operands come from L2 once for each; 0 for the tiles of
            `ds_fira.core.kernels.tiles`.
        rounded: 1 where a step rounds P and C for products in bfloat16 once, 0 where each program does for itself.
        turned_tf32: the share of its rate that a projection keeps in TF32, whose operands are copied to shared memory
            word by word, into conflicting banks, where they are not contiguous along the sum.
        turned_bfloat16: the same in bfloat16, to which G is converted on its way.
        overlapped_tf32: the share of the update's reads and writes of G and W, or of its products where they take less,
            that goes on beside another program of the same multiprocessor; an H100 has room for one.
        overlapped_bfloat16: the same in bfloat16, where it has room for two.
        passes: over R in float32 between the two products: moments and N read and write 6, C 3.
        norm_reads: of G out of L2 for its norms alone; none, where the programs of the product sum them.
        launches: of one batch of matrices, as an interpreter counts them (`benchmarks/speed/launches.py`): seven
            kernels and two allocations; in bfloat16 one of each more.
        rest: launches of a step beside those of its batches: AdamW's kernel, its count and a look at it.
        gap: seconds from one launch to the next on the device, where its kernel is short.
        host: seconds of the host for a launch.
    """

    tile: int = 0
    rounded: int = 1
    turned_tf32: float = 0.45
    turned_bfloat16: float = 0.65
    overlapped_tf32: float = 0.0
    overlapped_bfloat16: float = 0.5
    passes: float = 9.0
    norm_reads: float = 0.0
    launches: float = 9.0
    rest: float = 3.0
    gap: float = 2.4e-6
    host: float = 10e-6

    def turned(self, precision: str) -> float:
        """The share of its rate that a projection keeps."""
        return self.turned_tf32 if precision == "tf32" else self.turned_bfloat16

    def overlapped(self, precision: str) -> float:
        """The share of the update's shorter half that the other one hides."""
        return self.overlapped_tf32 if precision == "tf32" else self.overlapped_bfloat16

    def tile_of(self, product: str, precision: str) -> tuple[int, int]:
        """Rows and columns of the tile of "project" or "update"."""
        from ds_fira.core.kernels.tiles import tiles

        shaped = tiles(product, precision)
        return (self.tile, self.tile) if self.tile else (shaped.rows, shaped.columns)

    def rounds(self, precision: str) -> bool:
        """Whether P and C are read as they are multiplied, in two bytes."""
        return bool(self.rounded) and precision == "bfloat16"


@dataclass(frozen=True)
class Share:
    """What one rank steps.

    Attributes:
        batches: (k, m, n) of the matrices that are stepped together.
        adamw_elements: of parameters under AdamW.
    """

    batches: tuple[tuple[int, int, int], ...]
    adamw_elements: int

    @property
    def elements(self) -> int:
        """Of all matrices."""
        return sum(k * m * n for k, m, n in self.batches)

    def low_rank_elements(self, rank: int) -> int:
        """Of R, whose long side is the matrix's longer one."""
        return sum(k * min(rank, m, n) * max(m, n) for k, m, n in self.batches)

    def basis_elements(self, rank: int) -> int:
        """Of P, whose long side is the matrix's shorter one."""
        return sum(k * min(rank, m, n) * min(m, n) for k, m, n in self.batches)

    def operations(self, rank: int) -> float:
        """Of one of the two products."""
        return sum(2.0 * k * m * n * min(rank, m, n) for k, m, n in self.batches)


@dataclass(frozen=True)
class Phase:
    """A part of the step: bytes of memory, operations, launches, and its seconds."""

    name: str
    moved: float
    operations: float
    launches: float
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """Of one step.

    Attributes:
        phases: on the device.
        host: seconds of the host.
        adamw: seconds of fused AdamW on the same tensors.
        floor: seconds that the bytes of G twice and W both ways take alone.
    """

    phases: tuple[Phase, ...]
    host: float
    adamw: float
    floor: float

    @property
    def seconds(self) -> float:
        """Of the step: the device's, or the host's where that is the slower."""
        return max(self.host, sum(phase.seconds for phase in self.phases))

    @property
    def ratio(self) -> float:
        """To fused AdamW."""
        return self.seconds / self.adamw


def predict(share: Share, rank: int, precision: str, card: Card, given: Assumptions = Assumptions()) -> Prediction:
    """The step of a share between refreshes.

    Args:
        share: of one rank.
        rank: of the projection.
        precision: "tf32" or "bfloat16".
        card: the device.
        given: what is taken for granted.
    """
    full, low = 4.0 * share.elements, 4.0 * share.low_rank_elements(rank)
    operations, rounds = share.operations(rank), given.rounds(precision)
    # Bytes of an element of P and C in the products' programs.
    width = 2 if rounds else 4
    rows, columns = given.tile_of("project", precision)
    # Of a tile's edges only that of the rank shrinks with it.
    project = _product_rate(card, precision, (rows, 4), (min(columns, rank), width)) * given.turned(precision)
    rows, columns = given.tile_of("update", precision)
    update = _product_rate(card, precision, (rows, width), (columns, width))
    norms = given.norm_reads * full / card.l2
    between = (given.passes - 0.5 * rounds) * low + 6.0 * rounds * share.basis_elements(rank)
    adamw_bytes = ADAMW_BYTES * float(share.adamw_elements)
    launches = (given.launches + 2 * rounds) * len(share.batches) + given.rest
    # The product's program reads W and G behind its last slice.
    moving, multiplying = 3 * full / card.bandwidth, operations / update
    hidden = given.overlapped(precision) * min(moving, multiplying)
    phases = (
        Phase("project", full + low, operations, 1, max((full + low) / card.bandwidth, operations / project) + norms),
        Phase("moments, P, C", between, 0.0, 2 + rounds, between / card.bandwidth),
        Phase("update", 3 * full, operations, 1, moving + multiplying - hidden),
        Phase("small operations", 0.0, 0.0, launches, launches * given.gap),
        Phase("AdamW's part", adamw_bytes, 0.0, 1, adamw_bytes / card.bandwidth),
    )
    everything = share.elements + share.adamw_elements
    return Prediction(
        phases,
        host=launches * given.host,
        adamw=ADAMW_BYTES * everything / card.bandwidth,
        floor=4 * full / card.bandwidth,
    )


def _product_rate(card: Card, precision: str, rows: tuple[int, int], columns: tuple[int, int]) -> float:
    """Operations per second of tiles whose operands come from L2, each of some rows or columns of so many bytes."""
    each_byte = 2.0 * rows[0] * columns[0] / (rows[0] * rows[1] + columns[0] * columns[1])
    return min(card.products[precision], each_byte * card.l2)


def share_of(model: str, ranks: int, rank: int) -> Share:
    """What the first rank holds of a LLaMA of the paper under ZeRO-2, as the engine plans it.

    Raises:
        ValueError: a partition boundary cuts a matrix, whose step needs other ranks.
    """
    from benchmarks.communication.partition import plan_llama_run
    from ds_fira.core.batches import MAX_BATCH

    batches, adamw = [], 0
    for group in plan_llama_run(model, ranks, rank=rank).groups:
        if group.layout is None:
            adamw += group.partition_size
            continue
        if group.layout.split:
            raise ValueError(f"--ranks {ranks} cuts matrices of {model}; choose 1, 2, 4 or 8.")
        shapes = [matrix.shape for matrix in group.layout.unsplit[0]]
        for first in range(0, len(shapes), MAX_BATCH):
            together = shapes[first : first + MAX_BATCH]
            batches.append((len(together), *together[0]))
    return Share(tuple(batches), adamw)


def measured_steps(lines: Iterable[dict[str, Any]], what: str) -> dict[tuple[int, str], float]:
    """Stage 4's figures of plain float32 states, by rank and precision."""
    return {
        (line["rank"], line["precision"]): line["value"]
        for line in lines
        if line["stage"] == 4 and line["what"] == what and line["value"] is not None
        if (line.get("states"), line.get("kernels")) == ("float32", "auto")
    }


def report(found: Prediction, title: str) -> str:
    """A table of the phases."""
    said = [title, f"  {'':18}{'GB':>8}{'GFLOP':>9}{'launches':>10}{'ms':>8}"]
    for phase in found.phases:
        said.append(
            f"  {phase.name:18}{phase.moved / 1e9:>8.2f}{phase.operations / 1e9:>9.0f}{phase.launches:>10.0f}"
            f"{phase.seconds * 1e3:>8.2f}"
        )
    said.append(
        f"  step {found.seconds * 1e3:.1f} ms, of the host {found.host * 1e3:.1f}; fused AdamW {found.adamw * 1e3:.2f}"
        f"; ratio {found.ratio:.2f}; floor of its bytes {found.floor * 1e3:.1f} ms"
    )
    return "\n".join(said)


def verdict(predicted: float, measured: float) -> str:
    """Whether a prediction holds."""
    off = predicted / measured - 1.0
    return f"{off:+.0%}, {'holds' if abs(off) <= TOLERANCE else 'REFUTED'}"


def main() -> None:
    """Print predictions and what they take for granted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=tuple(CARDS), default="h100")
    parser.add_argument("--model", default="7b")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rank", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--results", type=Path, help="results.jsonl of launch/gpu_check.sh")
    for field in fields(Assumptions):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=float, default=field.default, help="an assumption (default %(default)s)")
    args = parser.parse_args()
    given = Assumptions(**{field.name: getattr(args, field.name) for field in fields(Assumptions)})
    lines = [json.loads(text) for text in args.results.read_text().splitlines()] if args.results else []
    card = measured_card(lines, CARDS[args.card]) if lines else CARDS[args.card]
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TF/s" for name, rate in card.products.items())
    print(f"{args.card}: copy {card.bandwidth / 1e12:.2f} TB/s, L2 {card.l2 / 1e12:.1f} TB/s, {rates} ({card.source})")
    print("assumed: " + ", ".join(f"{field.name} {getattr(given, field.name):g}" for field in fields(given)))
    steps = measured_steps(lines, "step")
    for rank in args.rank:
        share = share_of(args.model, args.ranks, rank)
        for precision in args.precision:
            found = predict(share, rank, precision, card, given)
            print(report(found, f"{args.model} on {args.ranks}, rank {rank}, {precision}"))
            if (rank, precision) in steps:
                measured = steps[rank, precision] / 1e3
                print(f"  measured {measured * 1e3:.1f} ms: {verdict(found.seconds, measured)}")


if __name__ == "__main__":
    main()
