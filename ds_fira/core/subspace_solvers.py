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
rounding 2^-9 of every element at random moves little energy out of it (docs/design.md has the figures). A CPU without
such units may multiply with a sketch of X that has fewer columns (`fold`). Everything of the block's size stays in
float32.

Nothing here waits for the device, except `orthonormal`, once, to learn whether its cheap way succeeded, and `eigh`,
which reads its error code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_fira.core.iteration_plan import (
    BFLOAT16_SPEED,
    OVERSAMPLING,
    STRIP,
    Iteration,
    cheapest,
    fast_bfloat16,
    iteration,
)
from ds_fira.core.orthonormal import orthonormal, spread

SEED = 0
TINY = torch.finfo(torch.float32).tiny
# The Gram matrix is built from blocks of so many columns of X.
BLOCK = 1024


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
    top = torch.linalg.eigh(gram_matrix(x, inverse))[1][..., -rank:].flip(-1)
    return orthonormal(across(top.mT * inverse, x)).mT.contiguous() if long else top.contiguous()


def randomized_basis(
    grad: Tensor, rank: int, previous: Tensor | None = None, strict: bool = False, ordered: bool = True
) -> Tensor:
    """The dominant subspace by block power iteration, in Ritz vectors of falling order or any orthonormal basis of it.

    Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.3: a start of r vectors and more (the previous
    basis and a Gaussian sketch, or the sketch alone), two or three products with XX' with an orthonormalization between
    them, and Rayleigh-Ritz. The basis is that of the last product, so the one product that Rayleigh-Ritz needs is a
    power step too. The sketch beside the previous basis finds directions that are new in this gradient. The seed is
    fixed: equal arguments give equal bits on one machine.

    Where the order does not matter and the rank is large enough (`iteration`), a block of r vectors is made orthonormal
    behind the last product, and that is all: the orthogonal iteration that SOAP (arXiv 2409.11321) makes of an old
    eigenbasis. Its columns stay near their places, as the vectors of the old basis do.

    X'Q comes before X(X'Q), or A is formed first, whichever takes fewer operations; and where A with its
    eigendecomposition takes fewer still, that exact result is given.

    Args:
        grad: (d, k), float32 or float64, finite; or several, (n, d, k).
        rank: r <= min(d, k).
        previous: (d, r), the basis in use, or (n, d, r); None for a cold start.
        strict: whether to multiply with the gradient itself and in its own dtype, even where bfloat16 or a sketch of it
            is faster.
        ordered: whether Ritz vectors are asked for; a cold start gives them in any case.

    Returns:
        (d, r) or (n, d, r), orthonormal.

    Raises:
        torch.linalg.LinAlgError: an eigendecomposition failed.
    """
    x, long = _short(grad)
    s, b = x.shape[-2:]
    exact = strict or x.dtype != torch.float32
    speed = 1.0 if exact or not fast_bfloat16(x.device) else BFLOAT16_SPEED
    folds = speed == 1.0 and not exact and not long and x.device.type == "cpu"
    plan = iteration(s, b, rank, previous is not None, ordered, folds)
    way = cheapest(s, b, plan, x.device.type, speed)
    if way == "exact":
        return gram_basis(grad, rank)
    inverse = _inverse_scale(grad)
    if speed > 1.0:
        # A power of two is exact to multiply with in bfloat16 too, and then nothing is left to scale.
        x = x.bfloat16().mul_(inverse)
        inverse = torch.ones_like(inverse)
    rows = start(x, inverse, plan, previous, long)
    multiply = _product(x, inverse, form_gram=way == "gram")

    def product(columns: int, rows: Tensor) -> Tensor:
        if columns == b or way == "gram":
            return multiply(rows).to(grad.dtype)
        return _product(fold(x, columns, inverse), torch.ones_like(inverse))(rows)

    for columns in plan.columns[:-1]:
        rows = spread(product(columns, rows))
    if plan.ritz:
        rows = ritz_vectors(rows, multiply, rank)
        if long:
            # Orthogonal but for rounding, so their lengths are all that has to go before the product.
            rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=TINY)
    elif not long:
        rows = product(plan.columns[-1], rows)
    if long:
        # The other half of this product was made at the start where there is no Rayleigh-Ritz.
        rows = across(rows * inverse, x).to(grad.dtype)
    return orthonormal(rows).mT.contiguous()


def start(x: Tensor, inverse: Tensor, plan: Iteration, previous: Tensor | None, long: bool) -> Tensor:
    """The first block, (..., width, s), on the short side.

    It is the previous basis and XO for a Gaussian O, or XO alone. A block that has to stay as wide as the basis is the
    previous basis with a Gaussian of norm 1 added to its last vectors, which hold the least. By these a direction that
    the basis is blind to gets into the products, that amplify it by the square of its singular value.
    """
    s, b = x.shape[-2:]
    generator = torch.Generator(device=x.device).manual_seed(SEED)
    options = {"generator": generator, "dtype": inverse.dtype, "device": x.device}
    found = []
    if previous is not None:
        kept = previous.to(inverse.dtype).mT
        kept = spread(back(kept * inverse, x).to(kept.dtype)) if long else kept
        if not plan.ritz:
            noise = torch.randn(max(1, min(plan.width // 4, OVERSAMPLING)), s, **options) / s**0.5
            kept = torch.cat([kept[..., : -len(noise), :], kept[..., -len(noise) :, :] + noise], dim=-2)
        found.append(kept)
    known = 0 if previous is None else previous.shape[-1]
    if plan.width > known:
        omega = torch.randn(plan.width - known, b, **options)
        found.append(spread(back(omega * inverse, x).to(omega.dtype)))
    return torch.cat(found, dim=-2)


def fold(x: Tensor, columns: int, inverse: Tensor) -> Tensor:
    """X S * inverse, (..., s, columns): a count sketch, column j added to column j modulo `columns` with a random sign.

    XSS'X' is XX' on average (Clarkson and Woodruff, STOC 2013), and every column of X is in it. A gradient has many
    more columns than a subspace needs to be found; the signs have a fixed seed.
    """
    b = x.shape[-1]
    generator = torch.Generator(device=x.device).manual_seed(SEED)
    signs = torch.randint(0, 2, (b,), generator=generator, device=x.device).to(x.dtype).mul_(2.0).sub_(1.0) * inverse
    folded = x[..., :columns] * signs[..., :columns]
    for first in range(columns, b, columns):
        part = x[..., first : first + columns]
        folded[..., : part.shape[-1]].addcmul_(part, signs[..., first : first + columns])
    return folded


def ritz_vectors(rows: Tensor, multiply: Callable[[Tensor], Tensor], rank: int) -> Tensor:
    """Rayleigh-Ritz: A times the Ritz vectors of A in the span of the rows, (..., rank, s), in falling order."""
    image = multiply(rows).to(rows.dtype)
    ritz = torch.linalg.eigh(rows @ image.mT)[1][..., -rank:].flip(-1)
    return ritz.mT @ image


def gram_matrix(x: Tensor, inverse: Tensor) -> Tensor:
    """XX' * inverse^2, (..., s, s), one triangle computed and mirrored; temporaries of s x 1024."""
    s, b = x.shape[-2:]
    gram = x.new_zeros(*x.shape[:-1], s)
    for first in range(0, b, BLOCK):
        part = x[..., first : first + BLOCK] * inverse
        for top in range(0, s, STRIP):
            strip, rest = gram[..., top : top + STRIP, top:], part[..., top:, :].mT
            add = strip.addmm_ if x.ndim == 2 else strip.baddbmm_
            add(part[..., top : top + STRIP, :], rest)
    for top in range(0, s, STRIP):
        end = top + STRIP
        gram[..., end:, top:end] = gram[..., top:end, end:].mT
        # A product of a block with itself is not symmetric to the bit on every CPU.
        block = gram[..., top:end, top:end]
        block.copy_(block.triu() + block.triu(1).mT)
    return gram


def across(rows: Tensor, x: Tensor) -> Tensor:
    """Rows of the short side, (w, s), to those of the long one, (w, b), W X, in X's dtype."""
    if rows.dtype != x.dtype:
        rows = rows.to(x.dtype, memory_format=torch.contiguous_format)
    # Where X is a transposed view, the product of the two as they lie in memory is the transpose.
    return rows @ x if x.stride(-1) == 1 else (x.mT @ rows.mT).mT


def back(rows: Tensor, x: Tensor) -> Tensor:
    """Rows of the long side, (w, b), to those of the short one, (w, s), W X', in X's dtype."""
    if x.dtype == torch.bfloat16:
        return rows.to(x.dtype, memory_format=torch.contiguous_format) @ x.mT
    # As columns, in which `orthonormal` works; in float32 it costs the same.
    return (x @ rows.mT).mT


def _product(x: Tensor, inverse: Tensor, form_gram: bool = False) -> Callable[[Tensor], Tensor]:
    if form_gram:
        gram = gram_matrix(x, inverse)
        return lambda rows: rows @ gram
    if x.dtype != inverse.dtype:
        return lambda rows: back(across(rows, x), x)
    return lambda rows: back(across(rows * inverse, x) * inverse, x)


def _short(grad: Tensor) -> tuple[Tensor, bool]:
    """X, and whether the wanted basis lies on its long side."""
    long = grad.shape[-2] > grad.shape[-1]
    return (grad.mT if long else grad), long


def _inverse_scale(grad: Tensor) -> Tensor:
    """A power of two near 1 / max|G|, (..., 1, 1): exact to multiply with, where the product does not underflow."""
    # A transposed view would be copied.
    flat = (grad if grad.is_contiguous() else grad.mT).flatten(-2)
    # Along a dimension torch takes ten times as long on a CPU.
    low, high = (
        (extreme.view(1) for extreme in torch.aminmax(flat))
        if grad.ndim == 2
        else torch.aminmax(flat, dim=-1, keepdim=True)
    )
    exponent = torch.frexp(torch.maximum(high, -low)).exponent
    limit = 126 if grad.dtype == torch.float32 else 1022
    return torch.ldexp(torch.ones_like(high), -exponent.clamp(-limit, limit)).unsqueeze(-1)
