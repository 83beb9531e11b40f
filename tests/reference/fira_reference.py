"""Fira with Adam for one matrix, from Algorithm 1 of arXiv 2410.01623 and from PyPI fira 1.0.2, in plain torch.

Written to be read, not to be fast: the residual S is formed in full, each column has its scale written out, and
nothing is taken from ds_fira. The arithmetic runs in ``dtype`` (float64 unless told). The basis alone comes from an
SVD in float32 (float64 for a float64 gradient), called as fira calls it: the signs of singular vectors are arbitrary,
and the moments survive a refresh, so two programs agree only if they take the same signs.

    formulation="released"   residual G - alpha P R; alpha P N in the update; bias correction on the step size
    formulation="paper"      residual G - P R; bias correction inside N; alpha multiplies the whole update

    residual="normalized"    with D = G - P R, of a column j (left) or row (right), whatever the formulation:
                             q_j = max(|G_j|^2 - |R_j|^2, floor |G_j|^2);  p = beta p + (1 - beta) q
                             S_j = sqrt(m - r) D_j / sqrt(p_j / (1 - beta^t));  update alpha (P N + S), N corrected
    residual="none"          no S: GaLore
"""

import math

import torch

NORM_EPS = 1e-8  # beside |R_j| in the scale and beside |S_prev| in the limiter


def side_of(shape, *, proj_type, formulation):
    """The side of a matrix of shape (m, n): "left" (P is m x r, R = P'G) or "right" (R = G P)."""
    m, n = shape
    if proj_type in ("left", "right"):
        return proj_type
    std = "right" if (m >= n if formulation == "released" else m > n) else "left"
    if proj_type == "reverse_std":
        return "left" if std == "right" else "right"
    return std


class FiraReference:
    """One (m, n) matrix. ``step(gradient)`` changes ``weight``; ``limited`` tells, step by step, what the limiter did.

    ``history_floor``: a residual norm below this share of |phi * G| counts as none (see DESIGN: known faults).
    """

    def __init__(
        self,
        weight,
        *,
        rank,
        update_proj_gap=200,
        alpha=1.0,
        proj_type="std",
        formulation="released",
        scaling="column",
        limiter=None,
        gamma=1.01,
        residual_scale=1.0,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.0,
        dtype=torch.float64,
        history_floor=1e-5,
        residual="scaled",
        residual_beta=0.9,
        residual_floor=2e-3,
        residual_warmup=0,
    ):
        limiter = limiter or ("growth" if residual == "scaled" else "none")
        assert formulation in ("released", "paper")
        assert scaling in ("column", "matrix", "none")
        assert limiter in ("growth", "none")
        assert residual in ("scaled", "normalized", "none")
        assert (residual, scaling) != ("normalized", "none")
        assert weight.dim() == 2
        self.dtype, self.weight = dtype, weight.detach().to(dtype).clone()
        m, n = weight.shape
        self.rank = min(rank, m, n)
        self.side = side_of((m, n), proj_type=proj_type, formulation=formulation)
        self.update_proj_gap, self.alpha, self.formulation = update_proj_gap, alpha, formulation
        self.scaling, self.limiter, self.gamma, self.residual_scale = scaling, limiter, gamma, residual_scale
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.history_floor = history_floor
        self.residual, self.residual_beta, self.residual_floor = residual, residual_beta, residual_floor
        self.residual_avg_sq, self.residual_warmup = 0.0, residual_warmup
        self.steps, self.refresh_step, self.residual_norm = 0, -1, 0.0
        self.basis = self.exp_avg = self.exp_avg_sq = None
        self.limited, self.residual_share, self.refreshes = [], [], []

    def refresh(self, gradient):
        matrix = gradient if gradient.dtype == torch.float64 else gradient.float()
        left_vectors, _, right_vectors_t = torch.linalg.svd(matrix, full_matrices=False)
        basis = left_vectors[:, : self.rank] if self.side == "left" else right_vectors_t[: self.rank, :].T
        self.basis = basis.to(self.dtype)
        self.refresh_step = self.steps
        self.refreshes.append(self.steps)

    def refresh_is_due(self):
        if self.basis is None:
            return True
        latest_multiple = (self.steps // self.update_proj_gap) * self.update_proj_gap
        return self.refresh_step < latest_multiple

    def project(self, full):
        return self.basis.T @ full if self.side == "left" else full @ self.basis

    def project_back(self, low):
        return self.basis @ low if self.side == "left" else low @ self.basis.T

    def scale(self, normalised, low_rank_gradient):
        """phi, shaped to multiply an (m, n) matrix: one per column (left), one per row (right), or one for all."""
        if self.scaling == "none":
            return torch.ones(1, 1, dtype=self.dtype)
        if self.scaling == "matrix":
            return (normalised.norm() / (low_rank_gradient.norm() + NORM_EPS)).reshape(1, 1)
        along = 0 if self.side == "left" else 1
        return normalised.norm(dim=along, keepdim=True) / (low_rank_gradient.norm(dim=along, keepdim=True) + NORM_EPS)

    def normalize(self, residual, gradient, low_rank_gradient):
        """S and its norm, as the squares tell it, from D; p_hat is averaged over the steps made."""
        along = 0 if self.side == "left" else 1
        square = gradient.square().sum(along, keepdim=True)
        fresh = square - low_rank_gradient.square().sum(along, keepdim=True)
        fresh = torch.maximum(fresh, self.residual_floor * square)
        count = residual.shape[along] - self.rank
        if self.scaling == "matrix":
            fresh, count = fresh.sum(), count * fresh.numel()
        self.residual_avg_sq = self.residual_beta * self.residual_avg_sq + (1 - self.residual_beta) * fresh
        average = self.residual_avg_sq / (1 - self.residual_beta**self.steps)
        phi = torch.where(average > 0, (count / average).sqrt(), 0.0)
        return phi * residual, (phi.square() * fresh).sum().sqrt().item(), (phi * gradient).norm().item()

    def limit(self, residual, norm, beside):
        """The norm-growth limiter. ``beside`` is |phi * G|, which tells a real residual from rounding."""
        shrink = 1.0
        if self.limiter == "growth" and self.residual_norm > 0.0:
            shrink = max(norm / (self.residual_norm + NORM_EPS), self.gamma) / self.gamma
        self.limited.append(shrink > 1.0)
        self.residual_share.append(norm / beside if beside > 0.0 else 0.0)
        self.residual_norm = norm / shrink if norm > self.history_floor * beside else 0.0
        return residual / shrink

    def step(self, gradient):
        as_given, gradient = gradient.detach(), gradient.detach().to(self.dtype)
        if not torch.isfinite(gradient).all():
            return
        usable = bool((gradient != 0).any())
        if self.basis is None and not usable:
            self.decay()
            return
        if usable and self.refresh_is_due():
            self.refresh(as_given)

        low = self.project(gradient)  # R
        if self.exp_avg is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(low), torch.zeros_like(low)
        beta1, beta2 = self.betas
        self.steps += 1
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * low
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * low * low
        correction = math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        normalised = self.exp_avg / (self.exp_avg_sq.sqrt() + self.eps)  # N

        if self.formulation == "paper":
            normalised = correction * normalised
            residual = gradient - self.project_back(low)
        else:
            residual = gradient - self.alpha * self.project_back(low)
        if self.residual == "normalized":
            residual = self.limit(*self.normalize(gradient - self.project_back(low), gradient, low))
            corrected = normalised if self.formulation == "paper" else correction * normalised
            self.weight -= self.lr * self.alpha * (self.project_back(corrected) + self.residual_size() * residual)
            self.decay()
            return
        phi = self.scale(normalised, low)
        residual = phi * residual if self.residual == "scaled" else 0.0 * residual
        residual = self.limit(residual, residual.norm().item(), (phi * gradient).norm().item())

        if self.formulation == "paper":
            update = self.alpha * (self.project_back(normalised) + self.residual_size() * residual)
            self.weight -= self.lr * update
        else:
            update = self.alpha * self.project_back(normalised) + self.residual_size() * residual
            self.weight -= self.lr * correction * update
        self.decay()

    def residual_size(self):
        """What multiplies S; it grows over the first ``residual_warmup`` steps."""
        return self.residual_scale * min(1.0, self.steps / max(1, self.residual_warmup))

    def decay(self):
        self.weight -= self.lr * self.weight_decay * self.weight


class FiraStackReference:
    """A (E, m, n) tensor as E independent matrices, with the attributes of FiraReference stacked where asked."""

    def __init__(self, weight, **settings):
        self.experts = [FiraReference(expert, **settings) for expert in weight]

    @property
    def weight(self):
        return torch.stack([expert.weight for expert in self.experts])

    def step(self, gradient):
        for expert, expert_gradient in zip(self.experts, gradient, strict=True):
            expert.step(expert_gradient)


class AdamWReference:
    """fira 1.0.2 on a parameter without a rank: eps outside the square root, decay after the update.

    An element whose gradient is not finite keeps its weight and its moments.
    """

    def __init__(self, weight, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, dtype=torch.float64):
        self.dtype, self.weight = dtype, weight.detach().to(dtype).clone()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.weight), torch.zeros_like(self.weight)

    def step(self, gradient):
        gradient = gradient.detach().to(self.dtype)
        finite = torch.isfinite(gradient)
        safe = torch.where(finite, gradient, torch.zeros_like(gradient))
        beta1, beta2 = self.betas
        self.steps += 1
        self.exp_avg = torch.where(finite, beta1 * self.exp_avg + (1 - beta1) * safe, self.exp_avg)
        self.exp_avg_sq = torch.where(finite, beta2 * self.exp_avg_sq + (1 - beta2) * safe * safe, self.exp_avg_sq)
        step_size = self.lr * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        moved = self.weight - step_size * self.exp_avg / (self.exp_avg_sq.sqrt() + self.eps)
        moved = moved - self.lr * self.weight_decay * moved
        self.weight = torch.where(finite, moved, self.weight)
