"""Gradients for the tests: low-rank structure that drifts, singular values well apart, magnitudes that jump.

Near-equal singular values would make the basis, and so every comparison, depend on the last bit; here neighbours
differ by a fixed ratio. The drift lets the residual grow between refreshes and the jumps set the limiter off, so a
run holds steps with the limiter active and steps without.
"""

import torch

MAGNITUDES = (1.0, 1.1, 2.5, 0.4, 0.5, 3.0, 0.9, 1.0, 0.2, 1.5, 1.6, 0.7, 2.0, 1.0, 0.1, 1.2)


def make_gradients(shape, steps, *, seed=0, ratio=0.75, drift=0.15, scale=0.05, dtype=torch.float32):
    """``steps`` gradients of ``shape`` (m, n), or (E, m, n) with E independent sequences, as a list."""
    if len(shape) == 3:
        experts = [
            make_gradients(
                shape[1:],
                steps,
                seed=seed + 1000 * (e + 1),
                ratio=ratio,
                drift=drift,
                scale=scale * (1 + e),
                dtype=dtype,
            )
            for e in range(shape[0])
        ]
        return [torch.stack(of_one_step) for of_one_step in zip(*experts, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    k = min(m, n)
    singular_values = ratio ** torch.arange(k, dtype=torch.float64)
    left = orthonormal(torch.randn(m, k, generator=generator, dtype=torch.float64))
    right = orthonormal(torch.randn(n, k, generator=generator, dtype=torch.float64))
    gradients = []
    for step in range(steps):
        magnitude = scale * k**0.5 * MAGNITUDES[step % len(MAGNITUDES)]
        gradients.append((magnitude * (left * singular_values) @ right.T).to(dtype))
        left = orthonormal(left + drift * torch.randn(m, k, generator=generator, dtype=torch.float64))
        right = orthonormal(right + drift * torch.randn(n, k, generator=generator, dtype=torch.float64))
    return gradients


def low_rank_gradient(shape, *, true_rank, seed=0, scale=1.0):
    """A float32 (m, n) gradient of exactly ``true_rank`` directions."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    left = orthonormal(torch.randn(m, true_rank, generator=generator, dtype=torch.float64))
    right = orthonormal(torch.randn(n, true_rank, generator=generator, dtype=torch.float64))
    return (scale * (left * 0.6 ** torch.arange(true_rank, dtype=torch.float64)) @ right.T).float()


def make_weight(shape, *, seed=0, scale=0.02, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7))).to(dtype)


def orthonormal(matrix):
    """The orthonormal columns nearest in spirit to ``matrix``: QR with the signs taken out, so that drift is smooth."""
    q, r = torch.linalg.qr(matrix)
    return q * torch.sign(torch.diagonal(r))
