"""How tables name the trials of the study and what they found."""

from __future__ import annotations

import math

from examples.reproduction.transfer.trials import MODELS, Trial

NONE = "-"


def described(trial: Trial) -> str:
    """Model, rank, length and text."""
    layers = trial.layers or MODELS[trial.width][0]
    rank = "" if trial.rank is None else f", rank {round(trial.rank * trial.width)}"
    text = "" if trial.text == "reviews" else f", {trial.text}"
    return f"width {trial.width}, {layers} layers{rank}, {trial.steps} steps{text}"


def name_of(trial: Trial) -> str:
    """The method with its settings."""
    settings = ", ".join(f"{name} {value}" for name, value in trial.settings)
    return f"{trial.method} ({settings})" if settings else trial.method


def shown(perplexity: float | None) -> str:
    """A perplexity for a table."""
    if perplexity is None:
        return NONE
    return f"{perplexity:.2f}" if math.isfinite(perplexity) else "diverged"


def change(ours: float | None, other: float | None) -> str:
    """The difference as a share of the other."""
    return NONE if ours is None or other is None else f"{ours / other - 1:+.1%}"
