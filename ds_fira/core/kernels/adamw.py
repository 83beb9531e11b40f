"""AdamW on any tensor, its moments decoded, updated and encoded in the same pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.moments import adam, shares_of
from ds_fira.core.kernels.rates import adamw_sizes, launch_adamw_sizes, rate
from ds_fira.core.kernels.stored import Moment, encoded, load_blocks, moment, parts, store_blocks
from ds_fira.core.kernels.tiles import launch, rounded
from ds_fira.core.kernels.views import View
from ds_fira.core.quantization import BLOCK, Stored

# Elements of one program of AdamW, in lines of the elements that share a scale.
LINES = 4


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    alpha: float = 1.0,
) -> None:
    """One AdamW step as the released code makes it: bias correction on the step size, decay after the update.

    Elements whose gradient is not finite, or has a square that overflows, are left as they are, moments included.
    Computed in float32; param and moments are rounded once each.

    Args:
        param: any shape, contiguous, float32, bfloat16 or float16; changed.
        grad: the same shape, any of these dtypes.
        exp_avg: first moment, the same shape, any of these dtypes; changed.
        exp_avg_sq: second moment, likewise.
        step: this step's count, from 1.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to sqrt(V).
        weight_decay: decoupled, times lr.
        alpha: multiplies the step, not the decay.

    Raises:
        ValueError: a tensor is not contiguous, or not of the parameter's size.
    """
    for name, tensor in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not tensor.is_contiguous() or tensor.numel() != param.numel():
            raise ValueError(
                f"{name} with shape {tuple(tensor.shape)} and strides {tensor.stride()} does not fit a param of "
                f"{param.numel()} elements; give contiguous tensors of one shape."
            )
    views = Moment(View(exp_avg, 0)), Moment(View(exp_avg_sq, 0))
    _launch_adamw(param, grad, views, "plain", step, lr, betas, eps, weight_decay, alpha)


def stored_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Stored,
    exp_avg_sq: Stored,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    alpha: float = 1.0,
) -> None:
    """`adamw_` on moments as `ds_fira.core.quantization` stores them; their noise goes by the step and the place.

    With the count of the steps before and the learning rate in tensors on the device, nothing of the step is the
    host's: the count is advanced there, and no argument of a launch changes from step to step.
    """
    first, second = (moment(stored, [View(part, 0) for part in parts(stored)]) for stored in (exp_avg, exp_avg_sq))
    form = first.form(noisy=True)
    _launch_adamw(param, grad, (first, second), form, step, lr, betas, eps, weight_decay, alpha)


def _launch_adamw(
    param: Tensor,
    grad: Tensor,
    moments: tuple[Moment, Moment],
    form: str,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    alpha: float,
) -> None:
    numel = param.numel()
    if isinstance(step, Tensor):
        sizes = launch_adamw_sizes(step, rate(0.0, lr), betas, weight_decay, alpha)
        seed, step_size, decay_factor = 0, 0.0, 0.0
    else:
        sizes, seed = None, 2 * step
        step_size, decay_factor = adamw_sizes(step, lr, betas, weight_decay, alpha)
    launch(
        _adamw,
        (triton.cdiv(numel, LINES * BLOCK),),
        param,
        param,
        grad,
        *moments,
        numel,
        seed,
        step_size,
        decay_factor,
        sizes,
        shares_of(betas),
        float(eps),
        FORM=form,
        LINES=LINES,
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["seed"])
def _adamw(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    numel,
    seed,
    step_size,
    decay_factor,
    sizes,
    shares,
    eps,
    FORM: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    at = line[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # The mask of every load and store: one that depends on the gradient would move each element by itself. What is not
    # kept is written back as it was read, bit by bit.
    inside = at < numel
    gradient = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    # False for NaN, for infinity, and for a square that overflows.
    kept = inside & (gradient * gradient < float("inf"))
    gradient = tl.where(kept, gradient, 0.0)
    if sizes is not None:
        step_size = tl.load(sizes).to(tl.float32)
        decay_factor = tl.load(sizes + 1).to(tl.float32)
        seed = 2 * tl.load(sizes + 2).to(tl.int64)
    avg_at = exp_avg.elements.data + at
    sq_at = exp_avg_sq.elements.data + at
    if FORM == "blocks":
        line_inside = line * BLOCK < numel
        seed = seed.to(tl.int64)
        before = load_blocks(avg_at, exp_avg.scale.data + line, exp_avg.tables, inside, line_inside)
        before_sq = load_blocks(sq_at, exp_avg_sq.scale.data + line, exp_avg_sq.tables, inside, line_inside)
        average, average_sq, quotient = adam(before, before_sq, gradient, kept, shares, eps)
        average = tl.where(kept, average, before)
        average_sq = tl.where(kept, average_sq, before_sq)
        store_blocks(avg_at, exp_avg.scale.data + line, exp_avg.tables, average, at, seed, inside, line_inside)
        scale_at = exp_avg_sq.scale.data + line
        store_blocks(sq_at, scale_at, exp_avg_sq.tables, average_sq, at, seed + 1, inside, line_inside)
    else:
        before = tl.load(avg_at, mask=inside, other=0.0)
        before_sq = tl.load(sq_at, mask=inside, other=0.0)
        average, average_sq, quotient = adam(
            before.to(tl.float32), before_sq.to(tl.float32), gradient, kept, shares, eps
        )
        seed = seed.to(tl.int64)
        average = encoded(average, at, seed, before.dtype, FORM == "noisy")
        average_sq = encoded(average_sq, at, seed + 1, before_sq.dtype, FORM == "noisy")
        tl.store(avg_at, tl.where(kept, average, before), mask=inside)
        tl.store(sq_at, tl.where(kept, average_sq, before_sq), mask=inside)
    value_before = tl.load(param + at, mask=inside, other=0.0)
    value = (value_before.to(tl.float32) - step_size * quotient) * decay_factor
    value = tl.where(kept, rounded(value, value_before.dtype), value_before)
    tl.store(param + at, value, mask=inside)
