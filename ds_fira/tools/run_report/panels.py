"""The plots of the page: what each shows, in which unit, and the sentence under it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of the page.

    Attributes:
        title: above it.
        unit: of the y axis.
        events: names of series; it is drawn if any run has one of them.
        text: what it shows and what is healthy.
        value: of an event's value.
        log: whether the y axis is logarithmic.
        zero: whether the y axis begins at 0.
        marks: whether refreshes are marked at the bottom.
        stems: whether events with refreshes stand alone instead of lying on a line.
        smooth: whether a running mean is drawn over many values; what jumps at a refresh has none.
    """

    title: str
    unit: str
    events: tuple[str, ...]
    text: str
    value: Callable[[float], float] = float
    log: bool = False
    zero: bool = False
    marks: bool = False
    stems: bool = False
    smooth: bool = False


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _percent(share: float) -> float:
    return 100.0 * share


PANELS = (
    Panel(
        "Loss",
        "loss",
        ("train_loss", "validation_loss"),
        "The loss that the script hands to the engine (of a language model: nats per token), mean over the steps "
        "between two events and over all ranks; dots are validation. Healthy: it falls fast, then ever more slowly, "
        "and validation stays beside training.",
        smooth=True,
    ),
    Panel(
        "Perplexity",
        "exp(loss)",
        ("train_loss", "validation_loss"),
        "The same for a language model: among how many equally likely tokens the model still chooses. Healthy: the "
        "line falls and does not turn up again.",
        value=_perplexity,
        log=True,
        smooth=True,
    ),
    Panel(
        "Learning rate",
        "lr of the first param group",
        ("lr",),
        "What the schedule set at every step. Healthy: the warm-up and the decay that you meant.",
        zero=True,
    ),
    Panel(
        "Gradient norm",
        "2-norm",
        ("grad_norm",),
        "Norm of the whole gradient before clipping. Healthy: level, or falling from a high start; a spike now and "
        "then does no harm, a rise that lasts asks for a smaller learning rate.",
        log=True,
        smooth=True,
    ),
    Panel(
        "Residual norm",
        "2-norm, all matrices",
        ("residual_norm",),
        "Size of what Fira adds to a low-rank step: the scaled part of the gradient outside the subspaces, after the "
        "limiter and before the learning rate. Healthy: it rises by no more than gamma allows, 1 % in a step, and may "
        "fall at a refresh; at 0, Fira does what GaLore does.",
        zero=True,
    ),
    Panel(
        "Limiter",
        "% of matrix steps",
        ("limiter_share",),
        "Share of matrix steps in which the residual had grown by more than gamma (1 %) and was shrunk. Healthy: low "
        "after a refresh, often high between two, where gradients are noisy; unhealthy: near 100 % over many refreshes "
        "while the residual norm creeps up from almost 0.",
        value=_percent,
        zero=True,
    ),
    Panel(
        "Captured energy",
        "% of |G|²",
        ("captured_energy",),
        "Share of the squared gradient that lies in the subspaces; triangles are refreshes. Healthy: up at a refresh, "
        "slowly down until the next. If it drops at once, a shorter update_proj_gap or a larger rank helps.",
        value=_percent,
        zero=True,
        marks=True,
    ),
    Panel(
        "Refresh time",
        "seconds in an interval",
        ("refresh_seconds",),
        "Wall time of new bases on the rank that spent most, each dot an interval with refreshes. Healthy: a few per "
        'cent of the training time together; if more, take subspace = "randomized" or a larger update_proj_gap.',
        zero=True,
        stems=True,
    ),
    Panel(
        "Loss scale",
        "factor",
        ("loss_scale",),
        "fp16 only: what the loss is multiplied with. Healthy: it climbs in steps and halves now and then; halving "
        "again and again means that gradients are not finite.",
        log=True,
    ),
)
