"""Algorithm 2 of arXiv 2410.01623 with RMSProp for one matrix, in plain torch: the residual is formed in full.

Nothing is taken from ds_fira. float64, but for the basis, an SVD in float32 called as the released code calls it.
"""

import torch

NORM_EPS = 1e-8


def fira_rmsprop(
    weight,
    gradients,
    *,
    rank,
    update_proj_gap,
    alpha,
    lr,
    rho=0.99,
    eps=1e-8,
    weight_decay=0.0,
    gamma=1.01,
    rotate=False,
):
    """The weight after all gradients, its V, and in which steps the limiter acted."""
    weight = weight.double().clone()
    m, n = weight.shape
    left = m < n  # project the smaller side
    basis = square = None
    previous_norm = 0.0
    limited = []
    for step, gradient in enumerate(gradients):
        if step % update_proj_gap == 0:
            u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
            new = (u[:, :rank] if left else vh[:rank].T).double()
            if rotate and basis is not None:
                change = (new.T @ basis) ** 2
                square = change @ square if left else square @ change.T
            basis = new
        gradient = gradient.double()
        # Gradient projection.
        sub_grad = basis.T @ gradient if left else gradient @ basis
        inside = basis @ sub_grad if left else sub_grad @ basis.T
        # The adaptive optimizer, on the projected gradient alone.
        square = (1 - rho) * sub_grad**2 if square is None else rho * square + (1 - rho) * sub_grad**2
        adapted = sub_grad / (square.sqrt() + eps)
        # Fira, on what is outside: the scaling factor of every column (left) or row (right), and the limiter.
        axis = 0 if left else 1
        phi = adapted.norm(dim=axis, keepdim=True) / (sub_grad.norm(dim=axis, keepdim=True) + NORM_EPS)
        residual = phi * (gradient - alpha * inside)
        norm = residual.norm().item()
        shrink = max(norm / (previous_norm + NORM_EPS), gamma) / gamma if previous_norm > 0.0 else 1.0
        limited.append(shrink > 1.0)
        residual, previous_norm = residual / shrink, norm / shrink
        back = basis @ adapted if left else adapted @ basis.T
        weight -= lr * (alpha * back + residual)
        weight -= lr * weight_decay * weight
    return weight, square, limited
