"""How a subspace is iterated for: how wide the block is, by which products, and whether an exact way costs less.

Pure functions of shape, rank and device type, so that every rank and every resumed run decides alike. Letters as in
`ds_fira.core.subspace_solvers`: X is s x b with s <= b, A = XX'.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Columns beyond the rank that the iteration carries; cut off by Rayleigh-Ritz at its end. Low ranks get as many again,
# up to a block of WIDE columns, for there the spectrum of a gradient is flat and a wide block does more than another
# product (a gradient of 2048 x 2048, rank 128, two warm products: 0.9875 of the energy with 32, 0.9986 with 128).
OVERSAMPLING, WIDE = 32, 256
# Products with XX' after a warm and after a cold start, the one of Rayleigh-Ritz included.
WARM_PRODUCTS, COLD_PRODUCTS = 2, 3
# From which share of the smaller side on a rank does without Rayleigh-Ritz, where any basis of the subspace will do.
# Below it the spectrum is so flat at the rank that a wider block is worth more: at rank 256 of 2048 x 2048 two products
# without it have 0.9855 of the energy, two with it 0.9924; at rank 512 they have 0.9968 and 0.9975.
FOLLOWING_SHARE = 0.25
# In float32, where products are what a refresh costs, X is folded to fewer columns before them: for the first to this
# multiple of the rank, which leaves something of the old basis beside the sketch, and for the last to this multiple of
# s, by half at most. A warm start of 2048 x 2048, rank 512, has 0.9877 of the energy after the last product alone,
# 0.9953 with both; 2048 x 5461 has 0.9982 after two whole products, 0.9947 after two folded ones.
FIRST_COLUMNS, LAST_COLUMNS = 1.5, 4 / 3
# Sizes s up to which the exact way is the cheaper one whatever the rank: it has the fewest calls.
SMALL_SIDE = 256
# A symmetric eigendecomposition in multiples of s^3 operations of a matrix product. Measured on one CPU core: 10 to 17
# for s = 512 to 2048. On a GPU it is dominated by latency; the value there is an estimate.
EIGH_COST = {"cpu": 15.0, "cuda": 400.0}
# The Gram matrix A is built in strips of so many rows, up to the diagonal alone.
STRIP = 256
# How much faster products in bfloat16 are where the device has units for them; measured with AMX on one CPU core.
BFLOAT16_SPEED = 4.0


@dataclass(frozen=True, slots=True)
class Iteration:
    """How the block is iterated.

    Attributes:
        width: its vectors.
        columns: for every product with XX', those that X is folded to before it; b for X itself.
        ritz: whether Rayleigh-Ritz, in the last product, chooses the best `rank` of its directions, in order; else they
            are the basis.
    """

    width: int
    columns: tuple[int, ...]
    ritz: bool = True


def iteration(s: int, b: int, rank: int, warm: bool, ordered: bool, folds: bool = False) -> Iteration:
    """The iteration for a matrix and a rank.

    Args:
        s: the smaller side.
        b: the larger.
        rank: the vectors wanted.
        warm: whether there is a previous basis.
        ordered: whether Ritz vectors are asked for.
        folds: whether X may be folded: where its products are what costs, and the basis lies on the short side.
    """
    if warm and not ordered and rank >= FOLLOWING_SHARE * s:
        fewer = round(FIRST_COLUMNS * rank), max(round(LAST_COLUMNS * s), b // 2)
        return Iteration(rank, tuple(min(columns, b) for columns in fewer) if folds else (b, b), ritz=False)
    width = min(rank + max(OVERSAMPLING, min(rank, WIDE - rank)), s)
    return Iteration(width, (b,) * (WARM_PRODUCTS if warm else COLD_PRODUCTS))


@functools.cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices much faster than float32 ones: AMX on a CPU, tensor cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch tells what a CPU can do from 2.10 on.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))


def operations(s: int, b: int, plan: Iteration, device_type: str, speed: float = 1.0) -> dict[str, float]:
    """Operations, in those of a float32 product, of "exact" (A and eigh), "gram" (A, then AQ) and "direct" iteration.

    Products with X in the iteration count 1 / `speed`; above 1 they are made in bfloat16.
    """
    eigh = EIGH_COST.get(device_type, EIGH_COST["cuda"])
    form = s * s * b * (1.0 + min(1.0, STRIP / s))
    # Orthonormalizations.
    rest = plan.width**2 * (3 + 3 * len(plan.columns)) * s
    if plan.ritz:
        # Rayleigh-Ritz, and the sketch beside or before the first block.
        rest += plan.width**2 * (eigh * plan.width + 3 * s) + 2 * s * b * OVERSAMPLING
    costs = {"exact": form + eigh * s**3, "direct": 4 * s * sum(plan.columns) * plan.width / speed + rest}
    if speed == 1.0:
        # Rounded to bfloat16, A would lose the smaller ones of the wanted directions.
        costs["gram"] = form + len(plan.columns) * 2 * s * s * plan.width + rest
    return costs


def cheapest(s: int, b: int, plan: Iteration, device_type: str, speed: float = 1.0) -> str:
    """The key of `operations` that takes the fewest; the exact way for every small matrix."""
    costs = operations(s, b, plan, device_type, speed)
    return "exact" if s <= SMALL_SIDE else min(costs, key=costs.__getitem__)
