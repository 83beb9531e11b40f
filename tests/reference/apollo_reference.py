"""APOLLO, algorithm 1 of arXiv 2412.05270, for one matrix in plain torch and float64.

Nothing is taken from ds_fira; the projection of every refresh is given.
"""

import torch

NORM_EPS = 1e-8


def apollo(
    weight,
    gradients,
    projections,
    *,
    left,
    update_proj_gap,
    alpha,
    lr,
    per_channel=True,
    limited=True,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.0,
):
    """The weight after all gradients, both moments, and in which steps the limiter acted.

    Args:
        weight: W, (m, n).
        gradients: of every step.
        projections: P of every refresh, (m, r) on the left and (n, r) on the right.
        left: which side is projected.
        update_proj_gap: steps from a refresh to the next.
        alpha: of the whole update.
        lr: learning rate.
        per_channel: whether each column (left) or row (right) has a factor of its own, or the matrix one.
        limited: whether the norm of the scaled gradient may grow by 1% a step at most.
        betas: of the moments.
        eps: added to sqrt(V).
        weight_decay: decoupled, after the step.
    """
    weight = weight.double().clone()
    first = second = None
    norm_before, acted = None, []
    for step, gradient in enumerate(gradients):
        gradient = gradient.double()
        projection = projections[step // update_proj_gap].double()
        low = projection.T @ gradient if left else gradient @ projection
        first = (1 - betas[0]) * low if first is None else betas[0] * first + (1 - betas[0]) * low
        second = (1 - betas[1]) * low**2 if second is None else betas[1] * second + (1 - betas[1]) * low**2
        adapted = first / (second.sqrt() + eps)
        if per_channel:
            axis = 0 if left else 1
            factor = adapted.norm(dim=axis, keepdim=True) / (low.norm(dim=axis, keepdim=True) + NORM_EPS)
        else:
            factor = adapted.norm() / (low.norm() + NORM_EPS)
        update = factor * gradient
        norm = update.norm().item()
        shrink = max(norm / (norm_before + NORM_EPS), 1.01) / 1.01 if limited and norm_before is not None else 1.0
        acted.append(shrink > 1.0)
        update, norm_before = update / shrink, norm / shrink
        count = step + 1
        weight -= lr * (1 - betas[1] ** count) ** 0.5 / (1 - betas[0] ** count) * alpha * update
        weight -= lr * weight_decay * weight
    return weight, first, second, torch.tensor(acted)
