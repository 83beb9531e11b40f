"""AdamW on any tensors, of which one launch takes many; moments are decoded, updated and encoded in the same pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.kernels.moments import adam, shares_of
from ds_fira.core.kernels.rates import adamw_sizes, launch_adamw_sizes, rate
from ds_fira.core.kernels.stored import encoded, load_blocks, moment, parts, store_blocks
from ds_fira.core.kernels.tiles import launch
from ds_fira.core.kernels.views import UNIT, View, table_of
from ds_fira.core.quantization import BLOCK, VALUES, Stored

# Elements of one program of AdamW, in lines of the elements that share a scale.
LINES = 4


# A tensor to step, contiguous; the gradient and the moments, of its size.
Operands = tuple[Tensor, Tensor, Stored, Stored]


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
    operands = (param, grad, {VALUES: exp_avg}, {VALUES: exp_avg_sq})
    _launch_adamw([operands], "plain", step, lr, betas, eps, weight_decay, alpha)


def adamw_together_(
    operands: Sequence[Operands],
    *,
    step: int | Sequence[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    alpha: float = 1.0,
    stochastic: bool = False,
) -> None:
    """`adamw_` of tensors alike in their dtypes by one kernel, the bits of each alone.

    Moments are as `ds_fira.core.quantization` stores them; their noise goes by the step and the place. With counts of
    the steps before and the learning rate in tensors on the device, nothing of the step is the host's: every count is
    advanced there, and no argument of a launch changes from step to step.

    Args:
        operands: of every tensor, as in `adamw_`.
        step: this step's count, from 1, of all; or of each the count before, int64, 0-dim, which is advanced.
        lr: as in `adamw_`; with counts on the device a tensor there.
        betas: as in `adamw_`.
        eps: likewise.
        weight_decay: likewise.
        alpha: likewise.
        stochastic: whether params in bfloat16 are rounded stochastically, by the step and the place.
    """
    exp_avg = operands[0][2]
    form = moment(exp_avg, [View(part, 0) for part in parts(exp_avg)]).form(noisy=True)
    _launch_adamw(operands, form, step, lr, betas, eps, weight_decay, alpha, stochastic)


def _launch_adamw(
    operands: Sequence[Operands],
    form: str,
    step: int | Sequence[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    alpha: float,
    stochastic: bool = False,
) -> None:
    noisy = stochastic and operands[0][0].dtype == torch.bfloat16
    sizes, seed, step_size, decay_factor = None, 0, 0.0, 0.0
    if isinstance(step, int):
        seed, (step_size, decay_factor) = 2 * step, adamw_sizes(step, lr, betas, weight_decay, alpha)
    else:
        sizes = launch_adamw_sizes(step, rate(0.0, lr), betas, weight_decay, alpha)
    kinds: dict[bool, list[tuple[int, Operands]]] = {}
    for place, each in enumerate(operands):
        kinds.setdefault(_is_even(each), []).append((place, each))
    for kind in (True, False):
        if alike := kinds.get(kind):
            unit = UNIT if kind else 1
            _launch_alike(alike, unit, form, noisy, seed, step_size, decay_factor, sizes, shares_of(betas), float(eps))


def _launch_alike(
    operands: Sequence[tuple[int, Operands]], unit: int, form: str, noisy: bool, *numbers: object
) -> None:
    """Step tensors whose places and sizes are whole units, each with its place among all."""
    param, grad, *moments = operands[0][1]
    firsts = _tensors(operands[0][1])
    rows, program = [], 0
    for place, each in operands:
        pairs, numel = zip(_tensors(each), firsts, strict=True), each[0].numel()
        distances = [(tensor.data_ptr() - first.data_ptr()) // first.element_size() for tensor, first in pairs]
        rows += [*(number // unit for number in (*distances, numel)), program, place]
        program += triton.cdiv(numel, LINES * BLOCK)
    table = table_of(param.device, tuple(rows))
    launch(
        _adamw,
        (program,),
        param,
        param,
        grad,
        *(moment(each, [View(part, 0) for part in parts(each)]) for each in moments),
        table,
        len(operands),
        unit,
        *numbers,
        FORM=form,
        NOISY=noisy,
        LINES=LINES,
        BLOCK=BLOCK,
        num_warps=4,
    )


def _is_even(operands: Operands) -> bool:
    """Whether a kernel can read whole 16-byte units of all tensors up to their ends."""
    tensors = _tensors(operands)
    return operands[0].numel() % UNIT == 0 and not any(t.data_ptr() % (UNIT * t.element_size()) for t in tensors)


def _tensors(operands: Operands) -> list[Tensor]:
    """All of them; those of a moment are its values, then its scales."""
    param, grad, *moments = operands
    return [param, grad, *(part for stored in moments for part in parts(stored))]


@triton.jit(do_not_specialize=["seed", "count"])
def _adamw(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    table,
    count,
    unit,
    seed,
    step_size,
    decay_factor,
    sizes,
    shares,
    eps,
    FORM: tl.constexpr,
    NOISY: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The last tensor whose first program is not behind this one.
    WIDTH: tl.constexpr = 9 if FORM == "blocks" else 7
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        behind = tl.load(table + middle * WIDTH + WIDTH - 2) > tl.program_id(0)
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, middle)
    row = table + low * WIDTH
    param += tl.load(row) * unit
    grad += tl.load(row + 1) * unit
    numel = tl.load(row + WIDTH - 3) * unit
    program = tl.program_id(0) - tl.load(row + WIDTH - 2)
    line = program * LINES + tl.arange(0, LINES)
    at = line[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # The mask of every load and store: one that depends on the gradient would move each element by itself. What is not
    # kept is written back as it was read, bit by bit.
    inside = at < numel
    gradient = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    # False for NaN, for infinity, and for a square that overflows.
    kept = inside & (gradient * gradient < float("inf"))
    gradient = tl.where(kept, gradient, 0.0)
    if sizes is not None:
        sizes += 3 * tl.load(row + WIDTH - 1)
        step_size = tl.load(sizes).to(tl.float32)
        decay_factor = tl.load(sizes + 1).to(tl.float32)
        seed = 2 * tl.load(sizes + 2).to(tl.int64)
    avg_at = exp_avg.elements.data + tl.load(row + 2) * unit + at
    sq_at = exp_avg_sq.elements.data + tl.load(row + WIDTH // 2) * unit + at
    if FORM == "blocks":
        avg_scale_at = exp_avg.scale.data + tl.load(row + 3) * unit + line
        sq_scale_at = exp_avg_sq.scale.data + tl.load(row + 5) * unit + line
        line_inside = line * BLOCK < numel
        seed = seed.to(tl.int64)
        before = load_blocks(avg_at, avg_scale_at, exp_avg.tables, inside, line_inside)
        before_sq = load_blocks(sq_at, sq_scale_at, exp_avg_sq.tables, inside, line_inside)
        average, average_sq, quotient = adam(before, before_sq, gradient, kept, shares, eps)
        average = tl.where(kept, average, before)
        average_sq = tl.where(kept, average_sq, before_sq)
        store_blocks(avg_at, avg_scale_at, exp_avg.tables, average, at, seed, inside, line_inside)
        store_blocks(sq_at, sq_scale_at, exp_avg_sq.tables, average_sq, at, seed + 1, inside, line_inside)
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
    value = encoded(value, at, -(seed.to(tl.int64) // 2), value_before.dtype, NOISY)
    value = tl.where(kept, value, value_before)
    tl.store(param + at, value, mask=inside)
