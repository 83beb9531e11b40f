"""Dominant subspaces of a matrix faster than by its SVD: from its Gram matrix, or by randomized subspace iteration.

Every function takes G turned so that the wanted basis belongs to its rows: the left singular vectors of G or G'.
Letters: X is s x b with s <= b, that matrix or its transposed view; A = XX' is its Gram matrix, s x s. Where G has more
rows than columns, the wanted basis lies on the long side of X; a basis W of the short side gives it as orth(X'W), which
is X'U / sigma without the division by small singular values. Blocks of vectors are kept as rows: their products with X
as it lies in memory are several times as fast in bfloat16 on a CPU as those of columns.

All squares are taken of X divided by a power of two near its largest element, so that no scale of a float32 gradient
over- or underflows; the division goes to a block or a low-rank factor, never to a full-size copy of X. Squaring loses
the singular values below sqrt(eps) of the largest (3e-4 in float32), whose share of the energy is below rounding.

The iteration may multiply with X in bfloat16, where the device has units for it: what it looks for is a subspace, and
rounding 2^-9 of every element at random moves little energy out of it (docs/design.md has the figures). Everything of
the block's size stays in float32.

Nothing here waits for the device, except `orthonormal`, once, to learn whether its cheap way succeeded, and `eigh`,
which reads its error code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

SEED = 0
TINY = torch.finfo(torch.float32).tiny
# Columns beyond the rank that the iteration carries; cut off by Rayleigh-Ritz at its end. Low ranks get as many again,
# up to a block of WIDE columns, for there the spectrum of a gradient is flat and a wide block does more than another
# product (a gradient of 2048 x 2048, rank 128, two warm products: 0.9875 of the energy with 32, 0.9986 with 128).
OVERSAMPLING, WIDE = 32, 256
# Products with XX' after a warm and after a cold start, the one of Rayleigh-Ritz included.
WARM_PRODUCTS, COLD_PRODUCTS = 2, 3
# Sizes s up to which the exact way is the cheaper one whatever the rank: it has the fewest calls.
SMALL_SIDE = 256
# A symmetric eigendecomposition in multiples of s^3 operations of a matrix product. Measured on one CPU core: 10 to 17
# for s = 512 to 2048. On a GPU it is dominated by latency; the value there is an estimate.
EIGH_COST = {"cpu": 15.0, "cuda": 400.0}
# The Gram matrix is built from blocks of so many columns of X, in strips of so many rows.
BLOCK, STRIP = 1024, 256
# How much faster products in bfloat16 are where the device has units for them; measured with AMX on one CPU core.
BFLOAT16_SPEED = 4.0
# Off-diagonal elements that one Cholesky pass may leave in all; rounding alone leaves about a tenth of it.
ORTHONORMAL = 5e-6
# Off-diagonal elements that the first Cholesky pass may leave for the second to remove.
LOST_ORTHOGONALITY = 1e-2


def gram_basis(grad: Tensor, rank: int) -> Tensor:
    """The top singular vectors by an eigendecomposition of the Gram matrix, in falling order.

    Args:
        grad: (d, k), float32 or float64, finite.
        rank: r <= min(d, k).

    Returns:
        (d, r), orthonormal.

    Raises:
        torch.linalg.LinAlgError: the eigendecomposition failed.
    """
    x, long = _short(grad)
    inverse = _inverse_scale(grad)
    top = torch.linalg.eigh(gram_matrix(x, inverse))[1][:, -rank:].flip(1)
    return orthonormal(across(top.t() * inverse, x)).t().contiguous() if long else top.contiguous()


def randomized_basis(grad: Tensor, rank: int, previous: Tensor | None = None, strict: bool = False) -> Tensor:
    """The dominant subspace by block power iteration, in Ritz vectors of falling order.

    Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.3: a start of r vectors and more (the previous
    basis and a Gaussian sketch, or the sketch alone), two or three products with XX' with an orthonormalization between
    them, and Rayleigh-Ritz. The basis is that of the last product, so the one product that Rayleigh-Ritz needs is a
    power step too. The sketch beside the previous basis finds directions that are new in this gradient. The seed is
    fixed: equal arguments give equal bits on one machine.

    X'Q comes before X(X'Q), or A is formed first, whichever takes fewer operations; and where A with its
    eigendecomposition takes fewer still, that exact result is given.

    Args:
        grad: (d, k), float32 or float64, finite.
        rank: r <= min(d, k).
        previous: (d, r), the basis in use; None for a cold start.
        strict: whether to multiply in the gradient's own dtype even where bfloat16 is faster.

    Returns:
        (d, r), orthonormal.

    Raises:
        torch.linalg.LinAlgError: an eigendecomposition failed.
    """
    x, long = _short(grad)
    s, b = x.shape
    speed = 1.0 if strict or x.dtype != torch.float32 or not fast_bfloat16(x.device) else BFLOAT16_SPEED
    width = block_width(s, rank)
    products = COLD_PRODUCTS if previous is None else WARM_PRODUCTS
    way = cheapest(s, b, width, products, x.device.type, speed)
    if way == "exact":
        return gram_basis(grad, rank)
    inverse = _inverse_scale(grad)
    if speed > 1.0:
        # A power of two is exact to multiply with in bfloat16 too, and then nothing is left to scale.
        x = x.bfloat16().mul_(inverse)
        inverse = torch.ones_like(inverse)
    rows = start(x, inverse, width, previous, long)
    multiply = _product(x, inverse, form_gram=way == "gram")
    for _ in range(products - 1):
        rows = spread(multiply(rows).to(grad.dtype))
    image = multiply(rows).to(grad.dtype)
    ritz = torch.linalg.eigh(rows @ image.t())[1][:, -rank:].flip(1)
    basis = ritz.t() @ image
    if long:
        # They are orthogonal but for rounding, so their lengths are all that has to go before the product.
        lengths = torch.linalg.vector_norm(basis, dim=1, keepdim=True).clamp(min=TINY)
        basis = across(basis * (inverse / lengths), x).to(basis.dtype)
    return orthonormal(basis).t().contiguous()


@functools.cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices much faster than float32 ones: AMX on a CPU, tensor cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch tells what a CPU can do from 2.10 on.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))


def block_width(s: int, rank: int) -> int:
    """Vectors of the iterated block."""
    return min(rank + max(OVERSAMPLING, min(rank, WIDE - rank)), s)


def operations(s: int, b: int, width: int, products: int, device_type: str, speed: float = 1.0) -> dict[str, float]:
    """Operations, in those of a float32 product, of "exact" (A and eigh), "gram" (A, then AQ) and "direct" iteration.

    Products with X in the iteration count 1 / `speed`; above 1 they are made in bfloat16.
    """
    eigh = EIGH_COST.get(device_type, EIGH_COST["cuda"])
    form = s * s * b * (1.0 + min(1.0, STRIP / s))
    # Orthonormalizations, Rayleigh-Ritz, and the sketch beside or before the first block.
    rest = width * width * (eigh * width + (6 + 3 * products) * s) + 2 * s * b * OVERSAMPLING
    costs = {"exact": form + eigh * s**3, "direct": products * 4 * s * b * width / speed + rest}
    if speed == 1.0:
        # Rounded to bfloat16, A would lose the smaller ones of the wanted directions.
        costs["gram"] = form + products * 2 * s * s * width + rest
    return costs


def cheapest(s: int, b: int, width: int, products: int, device_type: str, speed: float = 1.0) -> str:
    """The key of `operations` that takes the fewest; the exact way for every small matrix."""
    costs = operations(s, b, width, products, device_type, speed)
    return "exact" if s <= SMALL_SIDE else min(costs, key=costs.__getitem__)


def start(x: Tensor, inverse: Tensor, width: int, previous: Tensor | None, long: bool) -> Tensor:
    """The first block, (width, s): the previous basis on the short side and XO for a Gaussian O, or XO alone."""
    generator = torch.Generator(device=x.device).manual_seed(SEED)
    known = 0 if previous is None else previous.shape[1]
    omega = torch.randn(width - known, x.shape[1], generator=generator, dtype=inverse.dtype, device=x.device)
    sketch = spread(back(omega * inverse, x).to(omega.dtype)) if width > known else omega.new_zeros(0, x.shape[0])
    if previous is None:
        return sketch
    kept = previous.to(inverse.dtype)
    if long:
        return torch.cat([spread(back(kept.t() * inverse, x).to(kept.dtype)), sketch])
    # Only a factor of the first product, so X's dtype will do.
    return torch.cat([kept.to(x.dtype).t(), sketch.to(x.dtype)])


def gram_matrix(x: Tensor, inverse: Tensor) -> Tensor:
    """XX' * inverse^2, (s, s), one triangle computed and mirrored; temporaries of s x 1024."""
    s, b = x.shape
    gram = x.new_zeros(s, s)
    for first in range(0, b, BLOCK):
        part = x[:, first : first + BLOCK] * inverse
        for top in range(0, s, STRIP):
            gram[top : top + STRIP, top:].addmm_(part[top : top + STRIP], part[top:].t())
    for top in range(0, s, STRIP):
        end = top + STRIP
        gram[end:, top:end] = gram[top:end, end:].t()
        # A product of a block with itself is not symmetric to the bit on every CPU.
        block = gram[top:end, top:end]
        block.copy_(block.triu() + block.triu(1).t())
    return gram


def spread(rows: Tensor) -> Tensor:
    """Rows of the same span, roughly orthonormal: one pass of shifted Cholesky-QR, which cannot break down.

    Between two products the rows only have to stay apart. The shift (Fukaya et al., SIAM J. Sci. Comput. 42, 2020)
    bounds how much a direction that is lost in rounding is blown up.
    """
    gram, norms = _unit_gram(rows)
    gram.diagonal().add_(rows.shape[0] * torch.finfo(rows.dtype).eps)
    return _solve(gram, rows * norms)


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows of the same span: Cholesky-QR once or twice, or Householder where that broke down.

    Householder gives orthonormal rows of any block, a rank-deficient one too. Its signs are made those of the
    Cholesky way, a positive diagonal of R.
    """
    gram, norms = _unit_gram(rows)
    result = _solve(gram, rows * norms)
    gram = result @ result.t()
    left = float((gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).abs().amax())
    if left < LOST_ORTHOGONALITY and (left > ORTHONORMAL or rows.dtype == torch.float64):
        result = _solve(gram, result)
    if left < LOST_ORTHOGONALITY:
        return result
    q, triangle = torch.linalg.qr(rows.t())
    return (q * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(q.dtype)).t()


def across(rows: Tensor, x: Tensor) -> Tensor:
    """Rows of the short side, (w, s), to those of the long one, (w, b), W X, in X's dtype."""
    rows = rows.to(x.dtype)
    # Where X is a transposed view, the product of the two as they lie in memory is the transpose.
    return rows @ x if x.stride(1) == 1 else (x.t() @ rows.t()).t().contiguous()


def back(rows: Tensor, x: Tensor) -> Tensor:
    """Rows of the long side, (w, b), to those of the short one, (w, s), W X', in X's dtype."""
    return rows.to(x.dtype, memory_format=torch.contiguous_format) @ x.t()


def _unit_gram(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of the normalized rows, and the inverse norms, (w, 1); rows of small norm keep their digits."""
    gram = rows @ rows.t()
    norms = gram.diagonal().clamp(min=torch.finfo(rows.dtype).tiny).rsqrt()
    return gram.mul_(norms).mul_(norms.unsqueeze(1)), norms.unsqueeze(1)


def _solve(gram: Tensor, rows: Tensor) -> Tensor:
    """L^-1 W for the Cholesky factor L of a Gram matrix; not finite where that does not exist."""
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor, rows, upper=False)


def _product(x: Tensor, inverse: Tensor, form_gram: bool) -> Callable[[Tensor], Tensor]:
    if form_gram:
        gram = gram_matrix(x, inverse)
        return lambda rows: rows @ gram
    if x.dtype != inverse.dtype:
        return lambda rows: back(across(rows, x), x)
    return lambda rows: back(across(rows * inverse, x) * inverse, x)


def _short(grad: Tensor) -> tuple[Tensor, bool]:
    """X, and whether the wanted basis lies on its long side."""
    long = grad.shape[0] > grad.shape[1]
    return (grad.t() if long else grad), long


def _inverse_scale(grad: Tensor) -> Tensor:
    """A power of two near 1 / max|G|, 0-dim: exact to multiply with, where the product does not underflow."""
    # A transposed view would be copied.
    low, high = torch.aminmax(grad if grad.is_contiguous() else grad.t())
    exponent = torch.frexp(torch.maximum(high, -low)).exponent
    limit = 126 if grad.dtype == torch.float32 else 1022
    return torch.ldexp(torch.ones((), dtype=grad.dtype, device=grad.device), -exponent.clamp(-limit, limit))
