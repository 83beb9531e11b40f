"""What the study trains, in the order of its importance; a trial that has a result is not trained again.

python -m examples.reproduction.transfer.study                    everything below, on all processors
python -m examples.reproduction.transfer.study --stage headline   an hour on two cores: the preset's gain
python -m examples.reproduction.transfer.study --list             what is trained and what is missing
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from examples.reproduction.transfer.trials import Trial, Trials, settings_of

WIDTHS = (128, 256)
RANKS = (0.25, 0.03125, 0.125)
SEEDS = (0, 1, 2)
# The preset's laws, stated here apart from the library's: alpha by rank x depth, alpha x c by width, warm-up by depth;
# and its rate of norms, in that of embeddings and head.
ALPHA, RANK_DEPTH, STEP, WIDTH, WARMUP, VECTORS = 0.25, 64, 0.3, 128, 50, 0.1
# What the preset was before: p averages over steps, no warm-up, alpha x c by width x depth.
FORMER_STEP, WIDTH_DEPTH = 0.2, 256
PRESET_RATE, PUBLISHED_RATE = 0.01, 0.01
# A model that was not used to find the law, and a text.
HELD_OUT_WIDTHS, HELD_OUT_TEXT = (192, 384), "python"
LONGER = (1800, 5400)
# Rates of the full-rank methods by width, factors of two about the best.
FULL_RANK = {
    "adam": {128: (0.001, 0.002, 0.004), 256: (0.0005, 0.001, 0.002)},
    "muon": {128: (0.0025, 0.005, 0.01, 0.02), 256: (0.00125, 0.0025, 0.005, 0.01)},
}
LOW_RANK = {
    "galore": {128: (0.01, 0.02, 0.04, 0.08), 256: (0.005, 0.01, 0.02)},
    "apollo": {128: (0.005, 0.01, 0.02, 0.04, 0.08), 256: (0.0025, 0.005, 0.01, 0.02)},
}
# Released Fira's best rate by width and rank, about which it is trained.
FIRA = {(128, 0.25): 0.02, (128, 0.03125): 0.04, (128, 0.125): 0.02, (256, 0.25): 0.005, (256, 0.03125): 0.01}
FIRA |= {(256, 0.125): 0.005, (192, 0.125): 0.01, (384, 0.125): 0.005}

# One thing of the preset changed: the bound of S by element, and how basis and moments go on at a refresh.
MOVING = (
    {"bounded": True, "beta": 0.9},
    {"gap": 10**6},
    {"transport": True},
    {"complement": 0.5},
    {"angle": 0.3},
    {"angle": 1.2},
    {"shrink": 0.001},
    {"beta2": 0.99},
)


def preset(width: int, rank: float, lr: float = PRESET_RATE, **fields: object) -> Trial:
    """The preset: the residual over its own norm, its size, its warm-up and alpha by the laws."""
    trial = Trial(method="normalized", lr=lr, width=width, rank=rank, **fields)
    alpha = lawful_alpha(trial)
    c = round(STEP * WIDTH / width / alpha, 4)
    own = {} if alpha == ALPHA else {"alpha": round(alpha, 4)}
    return trial.change(settings=settings_of(c=c, beta=0.0, warmup=WARMUP * trial.depth, vectors=VECTORS, **own))


def plain(trial: Trial) -> Trial:
    """A trial of the preset with the rate of embeddings and head for norms too, as it was at first."""
    return trial.change(settings=tuple(pair for pair in trial.settings if pair[0] != "vectors"))


def lawful_alpha(trial: Trial) -> float:
    """The preset's alpha."""
    return ALPHA * min(1.0, RANK_DEPTH / (round(trial.rank * trial.width) * trial.depth)) ** 0.5


def former(width: int, rank: float, **fields: object) -> Trial:
    """The preset before this one."""
    trial = preset(width, rank, **fields)
    alpha = lawful_alpha(trial)
    own = {} if alpha == ALPHA else {"alpha": round(alpha, 4)}
    c = round(FORMER_STEP * WIDTH_DEPTH / (width * trial.depth) / alpha, 4)
    return trial.change(settings=settings_of(c=c, **own))


def released(width: int, rank: float, lr: float = PUBLISHED_RATE, **fields: object) -> Trial:
    """Fira as released, at the published settings but for the rate."""
    return Trial(method="fira", lr=lr, width=width, rank=rank, **fields)


def around(trial: Trial, steps: Iterable[int] = (-1, 0, 1)) -> list[Trial]:
    """A trial at its rate and at factors of two about it."""
    return [trial.change(lr=trial.lr * 2.0**step) for step in steps]


def headline() -> list[Trial]:
    """The preset and released Fira at every width and rank: each at the published rate, and about its best one."""
    models = [(width, rank) for width in WIDTHS for rank in RANKS]
    found = [make(*model) for model in models for make in (preset, released)]
    return found + [
        trial for model in models for trial in (*around(preset(*model)), *around(released(*model, FIRA[model])))
    ]


def seeds() -> list[Trial]:
    """Preset and released Fira at the rates that hold, at the other seeds."""
    rates = {(128, rank, 600): PUBLISHED_RATE for rank in RANKS[:2]} | {
        (256, rank, 600): FIRA[256, rank] for rank in RANKS[:2]
    }
    rates[128, RANKS[0], LONGER[1]] = PUBLISHED_RATE / 2
    return [
        trial
        for seed in SEEDS[1:]
        for (width, rank, steps), rate in rates.items()
        for trial in (preset(width, rank, steps=steps, seed=seed), released(width, rank, rate, steps=steps, seed=seed))
    ]


def others() -> list[Trial]:
    """Methods of any memory, tuned; the low-rank ones at a quarter of the width."""
    full = [
        Trial(method=method, lr=lr, width=width)
        for method, rates in FULL_RANK.items()
        for width in WIDTHS
        for lr in rates[width]
    ]
    low = [
        Trial(method=method, lr=lr, width=width, rank=RANKS[0])
        for method, rates in LOW_RANK.items()
        for width in WIDTHS
        for lr in rates[width]
    ]
    mini = [
        Trial(method="apollo", lr=lr, width=128, rank=RANKS[0], settings=settings_of(mini=True))
        for lr in LOW_RANK["apollo"][128]
    ]
    columns = around(Trial(method="column_sgd", lr=0.0025, width=128))
    return full + low + mini + columns


def candidates() -> list[Trial]:
    """What was tried in the preset's place, at its rate, by model and length: other sizes, energies, sides, laws."""
    gradient, norm = {"energy": "gradient"}, {"beta": 0.0}
    variants: dict[tuple[int, float, int | None], tuple[dict[str, object], ...]] = {
        (128, 0.25, None): (
            {"power": 1.0},
            {"power": 1.0, "side": "right"},
            gradient,
            {**gradient, "c": 1.6},
            {**norm, "c": 0.8},
            {**norm, "c": 1.2},
            {**norm, "c": 0.8, "warmup": 100},
            {**norm, "c": 1.6, "warmup": 200},
            {**norm, "c": 1.0, "warmup": 300},
        ),
        (128, 0.03125, None): (
            {"power": 1.0},
            {"power": 1.0, "side": "right"},
            {"c": 0.5},
            {"alpha": 0.5, "c": 0.4},
            {"alpha": 0.5, "c": 0.2},
            {"alpha": 0.7071, "c": 0.2828},
            {**gradient, "alpha": 0.25, "c": 0.8, "inner": 0.25},
            {**gradient, "alpha": 0.5, "c": 0.5},
            {**norm, "c": 0.8},
            {**norm, "c": 1.2},
            {**norm, "c": 1.6, "warmup": 200},
        ),
        (128, 0.03125, 4): (
            {"c": 0.4, "rows": True},
            {"c": 1.2, "signal": True},
            {**norm, "c": 0.4},
            {**norm, "c": 0.4, "rows": True},
            {**norm, "c": 0.6},
            {**norm, "c": 0.8},
            {**norm, "c": 0.8, "warmup": 200},
            {**norm, "c": 1.2, "warmup": 100},
            {**norm, "c": 1.2, "warmup": 300},
        ),
        (128, 0.125, 8): (
            {**norm, "alpha": 0.1768, "c": 1.6971, "warmup": 200},
            {**norm, "alpha": 0.1768, "c": 1.6971, "warmup": 100},
        ),
        (256, 0.25, None): (
            {"c": 0.2},
            {**gradient, "alpha": 0.125, "c": 0.6},
            {**norm, "alpha": 0.125, "c": 0.8, "warmup": 200},
            {**norm, "alpha": 0.125, "c": 2.4, "warmup": 200},
            {**norm, "alpha": 0.25, "c": 0.6, "warmup": 200},
        ),
        (256, 0.03125, None): (
            {"power": 1.0},
            {"c": 0.3},
            {"alpha": 0.354, "c": 0.14},
            {"c": 0.2, "limited": True},
            {"c": 0.2, "inner": 0.25},
            {**gradient, "c": 0.25},
            {**norm, "c": 0.2},
            {**norm, "c": 0.4},
            {**norm, "alpha": 0.125, "c": 0.4},
            {**norm, "c": 0.4, "warmup": 200},
            {**norm, "c": 0.6, "warmup": 300},
        ),
    }
    return [
        trial
        for (width, rank, layers), listed in variants.items()
        for trial in (
            former(width, rank, layers=layers),
            *(preset(width, rank, layers=layers).change(settings=settings_of(**settings)) for settings in listed),
            *(
                moved(plain(preset(width, rank)), **change)
                for change in (MOVING if (width, rank, layers) == (128, RANKS[0], None) else ())
            ),
        )
    ]


def rests() -> list[Trial]:
    """The preset with other rates of norms, or of embeddings, head and norms, and with what falls in long trainings."""
    half = [preset(128, rank) for rank in RANKS] + [preset(256, rank) for rank in RANKS[:2]]
    half.append(preset(128, RANKS[0], text=HELD_OUT_TEXT))
    long_ones = [preset(128, RANKS[0], steps=steps) for steps in LONGER]
    wide, deep = preset(256, RANKS[0], steps=LONGER[0]), [preset(128, RANKS[1], layers=4), preset(128, 1 / 8, layers=8)]
    compared = [*half, *long_ones, wide, *deep, *(preset(width, 1 / 8) for width in HELD_OUT_WIDTHS)]
    fira = [released(128, RANKS[0]), released(128, RANKS[0], 0.02), released(256, RANKS[0], PUBLISHED_RATE / 2)]
    return [
        *(plain(trial) for trial in compared),
        *(changed(half[0], vectors=rate) for rate in (0.0, 0.2)),
        *(changed(trial, vectors=VECTORS) for trial in fira),
        changed(half[0], rest=0.5),
        changed(plain(wide), rest=0.5),
        *(changed(plain(half[0]), rest=rest) for rest in (0.25, 2.0)),
        *(changed(plain(trial), rest=0.5) for trial in (*half, *long_ones)),
        *(changed(plain(trial), rest_fade=600) for trial in long_ones),
        changed(plain(long_ones[0]), fade=300),
    ]


def changed(trial: Trial, **settings: object) -> Trial:
    """A trial with some of its settings changed."""
    return trial.change(settings=settings_of(**{**dict(trial.settings), **settings}))


def moved(trial: Trial, **change: object) -> Trial:
    """A trial with the rest of its settings kept."""
    return changed(trial, **change).change(method="moving")


def held_out() -> list[Trial]:
    """Models, lengths and a text from which nothing was chosen."""
    models = [
        trial
        for width in HELD_OUT_WIDTHS
        for trial in (*around(preset(width, 1 / 8)), *around(released(width, 1 / 8, FIRA[width, 1 / 8])))
    ]
    deep = [trial for make in (preset, released) for trial in around(make(128, RANKS[1], layers=4))]
    deep += [trial for make in (preset, released) for trial in around(make(128, 1 / 8, layers=8))]
    text = [
        trial for make in (preset, released) for trial in around(make(128, RANKS[0], text=HELD_OUT_TEXT), (0, -1, 1))
    ]
    longer = [trial for steps in LONGER for trial in around(preset(128, 0.25, steps=steps))]
    longer += around(released(128, 0.25, steps=LONGER[0])) + around(released(128, 0.25, 0.005, steps=LONGER[1]))
    longer += [preset(256, 0.25, steps=LONGER[0]), released(256, 0.25, PUBLISHED_RATE / 2, steps=LONGER[0])]
    # Where twice the preset's rate was no worse.
    above = [preset(128, RANKS[0]), preset(128, 1 / 8), preset(128, RANKS[1], layers=4), preset(128, 1 / 8, layers=8)]
    above += [preset(128, RANKS[0], text=HELD_OUT_TEXT), preset(256, RANKS[0])]
    return deep + text + models + longer + [trial.change(lr=4 * PRESET_RATE) for trial in above]


STAGES = {
    "headline": headline,
    "seeds": seeds,
    "candidates": candidates,
    "others": others,
    "held_out": held_out,
    "rests": rests,
}


def trials(stages: Iterable[str] = tuple(STAGES)) -> list[Trial]:
    """The trials of some stages, in their order."""
    return [trial for stage in stages for trial in STAGES[stage]()]


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, action="append", help="repeatable; all of them by default")
    parser.add_argument("--workers", type=int, help="processes; one per processor by default")
    parser.add_argument("--list", action="store_true", help="say what is missing, and train nothing")
    args = parser.parse_args()
    store = Trials()
    for stage in args.stage or STAGES:
        wanted = STAGES[stage]()
        print(f"{stage}: {len(store.missing(wanted))} of {len({trial.key for trial in wanted})} trials are missing")
        if not args.list:
            store.train(wanted, args.workers)


if __name__ == "__main__":
    main()
