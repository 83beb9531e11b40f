"""`FiraAdam`: Fira over AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.optim.base import LowRankOptimizer


class FiraAdam(LowRankOptimizer):
    """Adam with low-rank states, full-rank updates: Fira (arXiv 2410.01623, Algorithm 1) with AdamW for the rest.

    Param groups with a `rank` are projected; their parameters are 2-D, or 3-D for experts. Groups without one have
    AdamW. Where no group has a rank, the constructor's applies to the weights that `ds_fira.param_groups` would
    project, in all groups or a flat list; each is split into these and the rest. A group added later says it itself.

    AdamW's part is the released code's: eps is added to sqrt(V) before the bias correction, where torch's AdamW adds it
    after it, so that the same number is up to 1 / sqrt(1 - beta2) = 32 times larger here in the first steps, and the
    default is 1e-6, not 1e-8; weight decay follows the step (docs/numerics.md).

    Args:
        params: parameters, (name, parameter) pairs, or param groups; groups may set every argument but
            `target_modules`, `check_sync_every`, `record_scaling_factors` and `unpickle_checkpoints` for themselves.
        lr: learning rate; a tensor of one element is read in every step.
        betas: decay rates of the moments.
        eps: added to sqrt(V).
        weight_decay: decoupled, applied after the update.
        rank: subspace rank of the weights to project, in all groups that do not say `rank = None`; not used where some
            group has a rank of its own.
        update_proj_gap: steps from one refresh of the subspace to the next.
        alpha: scale of the back-projection (released), or of the whole update (paper).
        proj_type: the projected side: "std" the smaller, "reverse_std" the larger, "left", "right".
        gamma: the limiter's largest growth of the residual norm from one step to the next.
        residual_scale: multiplies the scaled residual in the update; 1 is the paper.
        scaling: the scaling factor per "column", per "matrix", or "none" (1).
        limiter: "growth", or "none".
        formulation: "released", the code behind the published figures (PyPI fira 1.0.2), or "paper", Algorithm 1.
        subspace: how a basis is computed: "svd" exact, "gram" from the Gram matrix, "randomized" by block iteration.
        refresh_moments: what a refresh does to the moments: "keep" (the paper), "rotate" into the new basis, "reset".
        refresh_limiter: what it does to the limiter: "keep" the residual norm (the paper), or "reset", so that the
            first step in a new subspace is not limited.
        stagger: whether matrices refresh on different steps.
        state_dtype: how basis and moments are stored: "float32" (float64 for float64 weights), "bfloat16", "int8".
        matmul_precision: of the products of a step: "float32", "tf32" (on a CPU the same), "bfloat16".
        exact_cuts: inside ZeRO, whether a matrix that a partition cuts is stepped whole on its owner, equal to the bit
            to a matrix that is not cut, even where exchanging low-rank data is cheaper.
        project_full_rank: whether a matrix whose rank is at or above its smaller side is projected, as the released
            code does, though its states are then larger. Else it is stepped unprojected, with lr x alpha.
        target_modules: with a rank, substrings of the names of the modules to project.
        check_sync_every: inside an engine, steps from one comparison of the replicated weights over the ranks to the
            next (`ds_fira.engine.deepspeed.weight_sync`); 0 for none, None for every 100 at stage 0 and none elsewhere.
        record_scaling_factors: steps from one record of the scaling factors of all linear layers, projected or not, to
            the next (`ds_fira.scaling_factors`); 0 for none.
        unpickle_checkpoints: whether `engine.load_checkpoint` runs what stands in a checkpoint's files, which takes
            trust in whoever wrote it, rather than refuse what needs it.
        amsgrad: torch's, as are `maximize`, `foreach`, `capturable`, `differentiable` and `fused`; only False and None.
        maximize: see `amsgrad`.
        foreach: see `amsgrad`.
        capturable: see `amsgrad`.
        differentiable: see `amsgrad`.
        fused: see `amsgrad`.

    Raises:
        ValueError: a value is out of range, there is no rank, nothing is to be projected, or a parameter cannot be.
    """

    algorithm = FIRA_ADAM

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        alpha: float = 1.0,
        proj_type: str = "std",
        gamma: float = 1.01,
        residual_scale: float = 1.0,
        scaling: str = "column",
        limiter: str = "growth",
        formulation: str = "released",
        subspace: str = "svd",
        refresh_moments: str = "keep",
        refresh_limiter: str = "keep",
        stagger: bool = False,
        state_dtype: str = "float32",
        matmul_precision: str = "tf32",
        exact_cuts: bool = False,
        project_full_rank: bool = False,
        target_modules: Sequence[str] | str | None = None,
        check_sync_every: int | None = None,
        record_scaling_factors: int = 0,
        unpickle_checkpoints: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        # Every argument by its own name, as a JSON config gives them.
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, **given)
