"""Adam's moments stored in float32, bfloat16 or int8, as plain tensors.

A stored moment is a dict of tensors: "" holds the values and, for int8, "_scale" the scales of their blocks. Zeros in
every tensor are the zero moment. A reader decodes it to float32, the arithmetic is done there, and a writer encodes it
again. Writing back what was read changes no bit, so a moment that is not updated does not drift.

bfloat16: relative steps of 2^-8 to 2^-7. int8: blocks of 256 consecutive elements in row-major order share a float32
scale, and a code names a point of the dynamic map (Dettmers et al. 2022, arXiv 2110.02861), whose points lie evenly in
each decade, half as many in every decade further down. Two things differ from the paper:

 - The second moment uses the squares of the map's points. Adam divides by sqrt(V), which so has the map's spacing, and
   V reaches down to 1e-13 of its block's largest element; the map itself ends at 3e-7. What is positive stays positive.
 - A scale has the sign of the block's largest element. The signed map holds 1 but not -1: with an unsigned scale, a
   block whose largest element is negative would shrink by 0.7% each time it is written.

Rounding is stochastic where a seed is given, and V needs it. With beta2 = 0.999 a step changes V by a thousandth, less
than half the distance of neighbouring values, and rounded to nearest V stays where it is however small the gradients
have become.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fira.core.rounding import noise_of, rounded

Stored = dict[str, Tensor]
STATE_DTYPES = ("float32", "bfloat16", "int8")
VALUES = ""
SCALE = "_scale"
# Elements that share a scale in int8, as in the paper's optimizers.
BLOCK = 256
# Elements encoded at once, a multiple of BLOCK: bounds the temporaries. On a CPU they stay in cache; elsewhere few
# large kernels are better.
CPU_CHUNK = 2**14
DEVICE_CHUNK = 2**22
# Smaller scales are raised to this one. Under it the smallest positive value of a block, 1e-13 times the scale, would
# be subnormal, and would not come back as the same code. Its square root is far below any eps.
MIN_SCALE = 2.0**-80
# How near a point of the map, in shares of the distance to the next one, counts as on it. A decoded value comes back
# from the division by its scale with an error of up to 1.7e-5.
SNAP = 2.0**-15
# Position of 0 in the sorted signed map; codes count from it, so that code 0 is the value 0.
SIGNED_ZERO = 127


def require_library(state_dtype: str, where: str = "FiraAdam") -> None:
    """Import what a state dtype needs, which takes seconds for int8 and nothing for the others.

    Raises:
        ValueError: it is not installed; one sentence with the setting, the value, the remedy.
    """
    if state_dtype != "int8":
        return
    try:
        import bitsandbytes.functional  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{where}: state_dtype = 'int8' needs the package bitsandbytes ({error}); "
            "pip install ds_fira[int8], or choose state_dtype = 'bfloat16'."
        ) from error


def allocate(
    shape: tuple[int, ...],
    batch: tuple[int, ...],
    state_dtype: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    signed: bool,
) -> Stored:
    """The zero moment of one matrix, or of a batch of them.

    Args:
        shape: of the moment.
        batch: () or (k,), the leading dimensions of every tensor.
        state_dtype: one of `STATE_DTYPES`.
        dtype: what float32 storage holds: float32, or float64 for a parameter of float64.
        device: of the tensors.
        signed: True for the first moment, False for the second, which is never negative.

    Returns:
        Suffixes to append to the state's key, with their tensors: values of `(*batch, *shape)` in `dtype`, bfloat16,
        int8 (signed) or uint8; for int8 also scales of `(*batch, blocks)` in float32.

    Raises:
        ValueError: as in `require_library`.
    """
    assert state_dtype in STATE_DTYPES, state_dtype
    require_library(state_dtype)
    coded = torch.int8 if signed else torch.uint8
    kept = {"float32": dtype, "bfloat16": torch.bfloat16, "int8": coded}[state_dtype]
    stored = {VALUES: torch.zeros((*batch, *shape), dtype=kept, device=device)}
    if state_dtype == "int8":
        blocks = -(-torch.Size(shape).numel() // BLOCK)
        stored[SCALE] = torch.zeros((*batch, blocks), dtype=torch.float32, device=device)
    return stored


def part(stored: Stored, start: int, stop: int) -> Stored:
    """Flat views of elements start to stop of one matrix's stored moment, in row-major order.

    Args:
        stored: contiguous, without batch dimensions.
        start: a multiple of 256.
        stop: a multiple of 256 or the number of elements, so that no block is cut.

    Raises:
        ValueError: the range cuts a block.
    """
    flat = stored[VALUES].view(-1)
    if start % BLOCK or (stop % BLOCK and stop != flat.numel()):
        raise ValueError(f"elements {start} to {stop} of {flat.numel()} cut a block of {BLOCK}.")
    views = {VALUES: flat[start:stop]}
    if SCALE in stored:
        views[SCALE] = stored[SCALE][start // BLOCK : -(-stop // BLOCK)]
    return views


def elements(stored: Stored, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of any elements start to stop of one matrix's stored moment, 1-D, in row-major order.

    Args:
        stored: contiguous, without batch dimensions.
        start: the first element.
        stop: one past the last.
        dtype: of the result, float32 or float64.
    """
    first = start - start % BLOCK
    last = min(-(-stop // BLOCK) * BLOCK, stored[VALUES].numel())
    return read(part(stored, first, last), dtype)[start - first : stop - first]


def read(stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of one matrix's stored moment, in the shape of its values.

    Args:
        stored: contiguous, without batch dimensions.
        dtype: of the result, float32 or float64.

    Returns:
        The stored tensor itself where it has this dtype, which may then be updated in place; else a new one.

    Raises:
        ValueError: as in `require_library`.
    """
    values = stored[VALUES]
    if SCALE not in stored:
        return values.to(dtype)
    points = tables_of(values).stored_order
    from bitsandbytes.functional import dequantize_blockwise

    # The library's kernels know uint8 only; a code is an index, whatever its sign.
    codes = values.view(torch.uint8)
    return dequantize_blockwise(codes, absmax=stored[SCALE], code=points, blocksize=BLOCK).to(dtype)


def write_(stored: Stored, value: Tensor, *, seed: int | Tensor | None, start: int = 0) -> None:
    """Store the values of one matrix's moment; nothing to do for the tensor that `read` gave of float32 storage.

    The noise of stochastic rounding is a function of the seed and of an element's place in the matrix. So a run that
    is repeated repeats it, processes agree on it, and a matrix written in parts is the same as one written whole.

    Args:
        stored: contiguous, without batch dimensions; changed.
        value: the same number of elements, finite, at least 0 for the second moment.
        seed: for stochastic rounding, different in every step and for every moment: an int, or an int64 tensor of 0
            dimensions, which is not read by the host. None rounds to nearest.
        start: the place of the first element in the whole matrix, where `stored` is a `part`.

    Raises:
        ValueError: as in `require_library`.
    """
    values = stored[VALUES]
    if value is values:
        return
    if values.dtype in (torch.float32, torch.float64):
        values.copy_(value.reshape(values.shape))
        return
    flat = value.reshape(-1)
    size = CPU_CHUNK if values.device.type == "cpu" else DEVICE_CHUNK
    for first in range(0, flat.numel(), size):
        stop = min(first + size, flat.numel())
        target, chunk = part(stored, first, stop), flat[first:stop].float()
        noise = None if seed is None else noise_of(stop - first, start + first, seed, chunk.device)
        if SCALE in stored:
            _encode_(target[VALUES], target[SCALE], chunk, noise)
        else:
            target[VALUES].copy_(rounded(chunk, noise))


def _encode_(values: Tensor, scale: Tensor, chunk: Tensor, noise: Tensor | None) -> None:
    """Encode whole blocks, the last of which may be short."""
    blocks = chunk.numel() // BLOCK
    scaled = torch.empty_like(chunk)
    parts = [(slice(0, blocks * BLOCK), BLOCK, slice(0, blocks))]
    parts.append((slice(blocks * BLOCK, None), chunk.numel() - blocks * BLOCK, slice(blocks, None)))
    for elements, width, rows in parts:
        if chunk[elements].numel():
            block = chunk[elements].view(-1, width)
            low, high = block.amin(1), block.amax(1)
            largest = torch.where(high >= -low, high, low)
            divisor = torch.where(largest.abs() < MIN_SCALE, MIN_SCALE, largest)
            torch.div(block, divisor.unsqueeze(1), out=scaled[elements].view(-1, width))
            scale[rows] = divisor

    signed, tables = values.dtype == torch.int8, tables_of(values)
    # The code of the largest point that is not above the element: by the element's leading bits, then one comparison.
    codes = tables.by_bits.index_select(0, (scaled.view(torch.int32) >> 16).bitwise_and_(2**16 - 1))
    codes += scaled >= tables.above.index_select(0, codes)
    share = scaled.sub_(tables.points.index_select(0, codes)).mul_(tables.density.index_select(0, codes))
    codes += share > (0.5 if noise is None else noise.to(torch.float32).mul_(2.0**-16 * (1.0 - 2.0 * SNAP)).add_(0.5))
    if not signed:
        torch.maximum(codes, chunk > 0.0, out=codes)
    values = values.view(torch.uint8)
    values.copy_(codes)
    if signed:
        values.sub_(SIGNED_ZERO)
    for elements, width, rows in parts:
        if values[elements].numel():
            # A block of zeros, given or rounded to, has no scale: it is read as zeros, and written back as it is.
            scale[rows] *= values[elements].view(-1, width).amax(1) > 0


class Tables(NamedTuple):
    """The 8-bit map on one device; its codes are positions in ascending order, 0 to 255."""

    points: Tensor  # (256,) float32, ascending
    above: Tensor  # (256,) float32, the next point; infinity after the last
    density: Tensor  # (256,) float32, 1 / distance to the next point; 0 after the last
    by_bits: Tensor  # (65536,) int32, for the leading 16 bits of a float32 the code at or below all that share them
    stored_order: Tensor  # (256,) float32, the points in the order of the stored bytes


def tables_of(values: Tensor) -> Tables:
    """The map of codes, int8 (signed) or uint8, on their device.

    Raises:
        ValueError: as in `require_library`.
    """
    return _tables(values.dtype == torch.int8, values.device)


@cache
def _tables(signed: bool, device: torch.device) -> Tables:
    require_library("int8")
    from bitsandbytes.functional import create_dynamic_map

    points = create_dynamic_map(signed=signed)
    if not signed:
        points = points.square()
    above = torch.cat([points[1:], points.new_full((1,), torch.inf)])
    density = 1.0 / (above - points)
    # A float32 is sign and magnitude: the lowest of those that begin alike has zeros in the other bits, or, if
    # negative, ones. No two points of the map begin alike, so one comparison completes the search.
    bits = torch.arange(2**16, dtype=torch.int32)
    lowest = (bits << 16).add_(torch.where(bits >= 2**15, 2**16 - 1, 0).int()).view(torch.float32)
    by_bits = torch.bucketize(lowest, points, right=True, out_int32=True).sub_(1).clamp_(0, 255)
    stored_order = points.roll(-SIGNED_ZERO) if signed else points
    return Tables(*(table.to(device) for table in (points, above, density, by_bits, stored_order)))
