"""`GaLoreAdam`: GaLore over AdamW, so that it can be trained, and compared, under the same ZeRO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ds_fira.core.algorithms import GALORE_ADAM
from ds_fira.optim.base import LowRankOptimizer


class GaLoreAdam(LowRankOptimizer):
    """Adam in a low-rank subspace, and nothing outside it: GaLore (arXiv 2403.03507), with AdamW for the rest.

    What FiraAdam is without the residual: W <- W - lr * alpha * P N, N = M / (sqrt(V) + eps) with bias correction on
    the step size, as `GaLoreAdamW` of PyPI galore-torch 1.0 makes it. Groups, states, sharding, refreshes and
    checkpoints are FiraAdam's; a matrix keeps m r + 2 n r elements.

    Args:
        params: parameters, (name, parameter) pairs, or param groups; groups may set every argument but
            `target_modules`, `check_sync_every`, `record_scaling_factors` and `unpickle_checkpoints` for themselves.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to sqrt(V).
        weight_decay: decoupled, applied after the update.
        rank: subspace rank of the weights to project, in all groups that do not say `rank = None`; not used where some
            group has a rank of its own.
        update_proj_gap: steps from one refresh of the subspace to the next.
        alpha: scale of the back-projection, galore-torch's `scale`; 0.25 in GaLore's paper.
        proj_type: the projected side: "std" the smaller, "reverse_std" the larger, "left", "right".
        subspace: how a basis is computed: "svd" exact, "gram" from the Gram matrix, "randomized" by block iteration.
        refresh_moments: what a refresh does to the moments: "keep" (galore-torch), "rotate" into the new basis or
            "reset".
        stagger: whether matrices refresh on different steps.
        state_dtype: how basis and moments are stored: "float32" (float64 for float64 weights), "bfloat16", "int8".
        matmul_precision: of the products of a step: "float32", "tf32" (on a CPU the same), "bfloat16".
        exact_cuts: inside ZeRO, whether a matrix that a partition cuts is stepped whole on its owner.
        project_full_rank: whether a matrix whose rank is at or above its smaller side is projected, as the released
            code does, though its states are then larger. Else it is stepped unprojected, with lr x alpha.
        target_modules: with a rank, substrings of the names of the modules to project.
        check_sync_every: inside an engine, steps from one comparison of the replicated weights over the ranks to the
            next; 0 for none, None for every 100 at stage 0 and none elsewhere.
        record_scaling_factors: steps from one record of the scaling factors of all linear layers, projected or not, to
            the next (`ds_fira.scaling_factors`); 0 for none.
        unpickle_checkpoints: whether `engine.load_checkpoint` runs what stands in a checkpoint's files, which takes
            trust in whoever wrote it, rather than refuse what needs it.

    Raises:
        ValueError: a value is out of range, there is no rank, nothing is to be projected, or a parameter cannot be.
    """

    algorithm = GALORE_ADAM

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
        subspace: str = "svd",
        refresh_moments: str = "keep",
        stagger: bool = False,
        state_dtype: str = "float32",
        matmul_precision: str = "tf32",
        exact_cuts: bool = False,
        project_full_rank: bool = False,
        target_modules: Sequence[str] | str | None = None,
        check_sync_every: int | None = None,
        record_scaling_factors: int = 0,
        unpickle_checkpoints: bool = False,
        **unknown: Any,
    ) -> None:
        not_settings = ("self", "params", "unknown", "__class__")
        given = {name: value for name, value in locals().items() if name not in (*not_settings, "not_settings")}
        super().__init__(params, **given, **unknown)  # which refuses what is unknown in one sentence
