"""AdamW for what is not projected, as the released code makes it, on torch's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ds_fira.core import kernels, quantization
from ds_fira.core.quantization import Stored

# Elements of a parameter stepped at once: they stay in cache between the finite test and the update.
ADAMW_BLOCK = 2**18
# The same where both moments have to be decoded first.
DECODED_BLOCK = 2**16
# The same on a GPU, where moments have to be decoded: large enough to fill it, small beside the parameter.
DEVICE_BLOCK = 2**21
# torch's fused kernel rounds what is left over of its vectors (64 bytes) differently from the rest, so nothing is left.
FUSED_BYTES = 64


def step_adamw_(
    param: Tensor, grad: Tensor, exp_avg: Stored, exp_avg_sq: Stored, *, dtype: torch.dtype, step: int, **settings: Any
) -> None:
    """`adamw_` on a parameter of any shape and strides, block by block, its moments stored in any `state_dtype`.

    Args:
        param: updated.
        grad: the same shape.
        exp_avg: first moment, of the same shape, as `ds_fira.core.quantization` stores it.
        exp_avg_sq: second moment, likewise.
        dtype: in which the step is computed.
        step: this step's count, from 1; rounds bfloat16 and 8-bit moments too.
        **settings: `lr`, `betas`, `eps`, `weight_decay` and `alpha` of `adamw_`.
    """
    flat = param.view(-1) if param.is_contiguous() else param.reshape(-1)
    slope = grad.reshape(-1)
    compressed = exp_avg[quantization.VALUES].dtype != dtype
    block, advance_ = DECODED_BLOCK if compressed else ADAMW_BLOCK, adamw_
    if kernels.usable(flat):
        # A kernel reads every element once: blocks are only for what is decoded first.
        block, advance_ = DEVICE_BLOCK if compressed else max(1, flat.numel()), kernels.adamw_
    for start in range(0, flat.numel(), block):
        stop = min(start + block, flat.numel())
        stored = [quantization.part(moment, start, stop) for moment in (exp_avg, exp_avg_sq)]
        moments = [quantization.read(moment, dtype) for moment in stored]
        advance_(flat[start:stop], slope[start:stop], *moments, step=step, **settings)
        for place, (moment, value) in enumerate(zip(stored, moments, strict=True)):
            quantization.write_(moment, value, seed=2 * step + place, start=start)
    if not param.is_contiguous():
        param.copy_(flat.view(param.shape))


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

    Elements whose gradient is not finite, or has a square that overflows, are left as they are, moments included: one
    bad batch must not stay in the moments for good. Elementwise and rounded alike wherever a fragment begins and ends,
    so it is the same to the bit on any fragment of a parameter.

    Args:
        param: 1-D, of any floating dtype; computed in the moments' dtype and rounded once.
        grad: the same shape.
        exp_avg: first moment, same shape.
        exp_avg_sq: second moment, same shape.
        step: this step's count, from 1.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to sqrt(V); where the sum is zero the element makes no step.
        weight_decay: decoupled, times lr.
        alpha: multiplies the step, not the decay.
    """
    value, slope = param.to(exp_avg.dtype), grad.to(exp_avg.dtype)
    moments = (exp_avg, exp_avg_sq)
    # The norm is the quick test; it can also overflow where every single square is finite.
    usable = None if bool(torch.isfinite(torch.linalg.vector_norm(slope))) else slope.square().isfinite()
    tensors = (value, slope, *moments)
    if usable is not None:
        tensors = tuple(tensor[usable] for tensor in tensors)
    _fused_adamw_(tensors, step=step, lr=lr * alpha, betas=betas, eps=eps, keep=1.0 - lr * weight_decay)
    if usable is not None:
        for tensor, part in zip((value, *moments), (tensors[0], *tensors[2:]), strict=True):
            tensor[usable] = part
    if value is not param:
        param.copy_(value)


def _fused_adamw_(
    tensors: tuple[Tensor, ...], *, step: int, lr: float, betas: tuple[float, float], eps: float, keep: float
) -> None:
    """Torch's fused Adam, then decay, on (param, grad, M, V), 1-D; all but the gradient are updated.

    torch divides by sqrt(V) / sqrt(1 - beta2^t) + eps where the released code has (sqrt(V) + eps) / sqrt(1 - beta2^t):
    the same with another eps.
    """
    # With eps = 0 it would divide zero by zero where no gradient has been.
    before = tensors[0].clone() if eps < torch.finfo(tensors[0].dtype).tiny else None
    size = tensors[0].numel()
    even = size - size % (FUSED_BYTES // tensors[0].element_size())
    _fused_adam_(tuple(tensor[:even] for tensor in tensors), step=step, lr=lr, betas=betas, eps=eps)
    if even < size:
        padded = tuple(tensor.new_zeros(FUSED_BYTES // tensor.element_size()) for tensor in tensors)
        for whole, tensor in zip(padded, tensors, strict=True):
            whole[: size - even] = tensor[even:]
        _fused_adam_(padded, step=step, lr=lr, betas=betas, eps=eps)
        for whole, tensor in zip(padded, tensors, strict=True):
            tensor[even:] = whole[: size - even]
    if before is not None:
        tensors[0].copy_(torch.where(tensors[3] == 0.0, before, tensors[0]))
    if keep != 1.0:
        tensors[0].mul_(keep)


def _fused_adam_(tensors: tuple[Tensor, ...], *, step: int, lr: float, betas: tuple[float, float], eps: float) -> None:
    if tensors[0].numel() == 0:
        return
    value, grad, exp_avg, exp_avg_sq = tensors
    adamw(
        [value],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        # The function counts this step itself.
        [torch.full((), step - 1.0, device=value.device)],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=0.0,
        eps=eps / (1.0 - betas[1] ** step) ** 0.5,
        maximize=False,
    )
