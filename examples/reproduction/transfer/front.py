"""The picture of the front page: losses of kept trainings, and optimizer states of LLaMA 7B on every rank.

python -m examples.reproduction.transfer.front
"""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")  # before pyplot: a training machine has no screen
import matplotlib.pyplot as plt

from ds_fira.tools.estimate import Setup, estimate
from examples.reproduction.lib.provenance import ROOT
from examples.reproduction.lib.tables import DPI, HEIGHT, WIDTH
from examples.reproduction.transfer import study
from examples.reproduction.transfer.labels import described
from examples.reproduction.transfer.report import Report
from examples.reproduction.transfer.train import CURVE
from examples.reproduction.transfer.trials import Trial, Trials

PICTURE = ROOT / "docs" / "front.png"
TITLES = {"adam": "AdamW", "muon": "Muon", "galore": "GaLore", "apollo": "APOLLO", "fira": "Fira, released"}
OURS = "FiraAdam, preset"
# Of the losses: the first steps, alike in all methods, are above.
TICKS = (40, 50, 60, 80, 100, 150, 200)
MODEL, RANKS, GPUS = "llama_7b", (1024, 256), (1, 8, 64)


def curves(report: Report, width: int, rank: float) -> dict[str, tuple[Trial, list[float]]]:
    """The training losses of every method, each at the best of its tried rates, of the preset at its own."""
    families = [Trial(method=name, lr=0.0, width=width) for name in ("adam", "muon")]
    families += [Trial(method=name, lr=0.0, width=width, rank=rank) for name in ("galore", "apollo", "fira")]
    found = {TITLES[family.method]: report.tuned(family) for family in families}
    chosen = {title: best[0] for title, best in found.items() if best is not None}
    chosen[OURS] = study.preset(width, rank)
    return {title: (trial, report.store[trial]["curve"]) for title, trial in chosen.items() if trial in report.store}


def state_gib() -> dict[str, list[float]]:
    """GiB of optimizer states of the largest rank, LLaMA 7B under ZeRO-2 with float32 states, by method."""
    found: dict[str, list[float]] = {"AdamW": []}
    for gpus in GPUS:
        for rank in RANKS:
            made = estimate(MODEL, Setup(gpus=gpus, zero_stage=2), ["AdamW", "Fira"], rank=rank)
            sizes = {name: one.largest.device.optimizer_states / 2**30 for name, one in made.methods.items()}
            found.setdefault(f"FiraAdam, rank {rank}", []).append(sizes["Fira"])
        found["AdamW"].append(sizes["AdamW"])
    return found


def draw(report: Report, width: int, rank: float) -> plt.Figure:
    """Losses on the left, bytes on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(1.7 * WIDTH, HEIGHT), width_ratios=(3, 2))
    for title, (trial, losses) in curves(report, width, rank).items():
        steps = [CURVE * (place + 1) for place in range(len(losses))]
        style = {"color": "black", "linewidth": 2.2} if title == OURS else {"linewidth": 1.2}
        left.plot(steps, [math.exp(loss) for loss in losses], label=f"{title} (lr {trial.lr:g})", **style)
    left.set(
        xlabel="step",
        ylabel="training perplexity",
        yscale="log",
        title=f"LLaMA, {described(study.preset(width, rank))}",
    )
    left.legend(fontsize=8)
    sizes = state_gib()
    for place, (name, values) in enumerate(sizes.items()):
        bars = right.bar([column + 0.27 * (place - 1) for column in range(len(GPUS))], values, 0.25, label=name)
        right.bar_label(bars, fmt="%.2g", fontsize=7)
    right.set(yscale="log", ylabel="GiB on a rank", title="optimizer states, LLaMA 7B, ZeRO-2, float32")
    right.set_xticks(range(len(GPUS)), [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS])
    right.legend(fontsize=8)
    return figure


def main() -> None:
    """Write the picture."""
    figure = draw(Report(Trials()), study.WIDTHS[-1], study.RANKS[0])
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=DPI, metadata={"Software": None})
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
