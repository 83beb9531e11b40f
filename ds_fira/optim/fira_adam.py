"""`FiraAdam`, Fira over AdamW; and its relatives `GaLoreAdam` and `ApolloAdam`, which ZeRO shards in the same way."""

from __future__ import annotations

from ds_fira.core.algorithms import APOLLO_ADAM, FIRA_ADAM, GALORE_ADAM
from ds_fira.optim.base import LowRankOptimizer


class FiraAdam(LowRankOptimizer):
    """Adam with low-rank states, full-rank updates: Fira (arXiv 2410.01623, Algorithm 1) with AdamW for the rest.

    Param groups with a `rank` are projected; their parameters are 2-D, or 3-D for experts. Groups without one have
    AdamW. Where no group has a rank, the constructor's applies to the weights of linear layers: of a model as
    `ds_fira.param_groups` finds them, of (name, parameter) pairs by their names, of parameters without names to every
    matrix. Each group is split into these and the rest. A group added later says itself whether it has a rank.

    AdamW's part is the released code's: eps is added to sqrt(V) before the bias correction, where torch's AdamW adds it
    after it, so that the same number is up to 1 / sqrt(1 - beta2) = 32 times larger here in the first steps, and the
    default is 1e-6, not 1e-8; weight decay follows the step (docs/numerics.md).

    Raises:
        ValueError: a value is out of range, there is no rank, or a parameter cannot be projected.
    """

    algorithm = FIRA_ADAM


class GaLoreAdam(LowRankOptimizer):
    """Adam in a low-rank subspace, and nothing outside it: GaLore (arXiv 2403.03507), with AdamW for the rest.

    What FiraAdam is without the residual: W <- W - lr * alpha * P N, N = M / (sqrt(V) + eps) with bias correction on
    the step size, as `GaLoreAdamW` of PyPI galore-torch 1.0 makes it; alpha is its `scale`, 0.25 in GaLore's paper.
    Groups, states, sharding, refreshes and checkpoints are FiraAdam's; a matrix keeps m r + 2 n r elements.

    Raises:
        ValueError: a value is out of range, there is no rank, or a parameter cannot be projected.
    """

    algorithm = GALORE_ADAM


class ApolloAdam(LowRankOptimizer):
    """Gradients scaled as Adam would: APOLLO (arXiv 2412.05270, algorithm 1), with AdamW for the rest.

    W <- W - lr * alpha * phi * G: Adam runs on R = P'G alone, a random projection, and phi = |N_j| / |R_j| scales each
    column (or row) of G by what Adam made of that of R; with `scaling = "matrix"` one factor scales all of G. Bias
    correction is on the step size, and the norm-growth limiter as FiraAdam's, as `APOLLOAdamW` of PyPI apollo-torch
    1.0.3 has them; alpha is the square root of its `scale`. APOLLO-Mini is `rank = 1, scaling = "matrix"` and alpha =
    sqrt(128) = 11.3. Every rank draws the rows of P that it works with in every step: a matrix keeps 2 n r + 1
    elements, no refresh decomposes anything, and none sends a gradient or a basis.

    Raises:
        ValueError: a value is out of range, there is no rank, or a parameter cannot be projected.
    """

    algorithm = APOLLO_ADAM
