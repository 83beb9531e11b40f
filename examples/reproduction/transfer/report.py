"""docs/transfer.md from the trials that are there: which settings hold at every width, depth, rank and length.

python -m examples.reproduction.transfer.report
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import matplotlib

matplotlib.use("Agg")  # before pyplot: a training machine has no screen
import matplotlib.pyplot as plt
from scipy import stats

from examples.reproduction.lib.alone import FIGURES
from examples.reproduction.lib.provenance import ROOT, stamp_line
from examples.reproduction.lib.tables import HEIGHT, WIDTH, save_figure, table
from examples.reproduction.transfer import finetune_report, study
from examples.reproduction.transfer.labels import NONE, change, described, name_of, shown
from examples.reproduction.transfer.trials import Trial, Trials

PAGE = ROOT / "docs" / "transfer.md"
# What the preset should reach, and the difference that it allows.
PUBLISHED = "At least 5% below released Fira at its published rate"
TUNED = "At least 3% below released Fira at its best rate"
ITSELF = "Within 1% of itself at its best rate"
GOALS = {PUBLISHED: -0.05, TUNED: -0.03, ITSELF: 0.01}


class Report:
    """Reads perplexities of the trials: rates are chosen by the validation rows, the test rows are reported."""

    def __init__(self, store: Trials) -> None:
        self.store = store

    def test(self, trial: Trial) -> float | None:
        """Perplexity on the test rows; infinity where training diverged, None where it was not trained."""
        if trial not in self.store:
            return None
        loss = self.store[trial]["test"]
        return math.inf if loss is None else math.exp(loss)

    def tuned(self, trial: Trial) -> tuple[Trial, bool] | None:
        """The trial at its best rate by validation loss, and whether that rate has a worse neighbour on both sides."""
        family = sorted((one for one in self.family(trial)), key=lambda one: one.lr)
        if not family:
            return None
        best = min(family, key=lambda one: self.store[one]["validation"] or math.inf)
        return best, best not in (family[0], family[-1])

    def family(self, trial: Trial) -> list[Trial]:
        """The trained trials that differ from this one in the rate alone."""
        found = (parsed(result["trial"]) for result in self.store.found.values())
        return [one for one in found if one.change(lr=0.0) == trial.change(lr=0.0)]

    def cell(self, trial: Trial) -> str:
        """A perplexity for a table."""
        return shown(self.test(trial))

    def best(self, tuned: tuple[Trial, bool]) -> str:
        """What `tuned` gives, for a table."""
        trial, inside = tuned
        alone = len(self.family(trial)) == 1
        return f"{self.cell(trial)} ({trial.lr:g}{'' if inside else ' alone' if alone else ', an edge'})"

    def gains(self) -> str:
        """The preset beside released Fira, at the published rate and tuned."""
        rows = []
        for trial in gain_trials():
            preset, released = trial, fira_like(trial)
            ours, theirs = self.tuned(preset), self.tuned(released)
            if self.test(preset) is None or theirs is None:
                continue
            published, best = self.test(released), self.test(theirs[0])
            rows.append(
                (
                    described(trial),
                    shown(published),
                    self.best(theirs),
                    f"**{self.cell(preset)}**",
                    self.best(ours),
                    change(self.test(preset), published),
                    change(self.test(preset), best),
                    change(self.test(preset), self.test(ours[0])) if len(self.family(preset)) > 1 else NONE,
                )
            )
        head = [
            "model, rank, steps",
            "Fira, lr 0.01",
            "Fira tuned (lr)",
            "preset, lr 0.01",
            "preset tuned (lr)",
            "to Fira",
            "to Fira tuned",
            "to itself tuned",
        ]
        return table(head, rows)

    def goals(self) -> str:
        """In how many comparisons each goal is met, and where not; a best rate at the edge of its grid is none."""
        found: dict[str, list[tuple[str, bool]]] = {goal: [] for goal in GOALS}
        for trial in gain_trials():
            ours, published = self.test(trial), self.test(fira_like(trial))
            own, theirs = self.tuned(trial), self.tuned(fira_like(trial))
            if ours is None or theirs is None or own is None:
                continue
            pairs = {PUBLISHED: published}
            pairs |= {TUNED: self.test(theirs[0])} if theirs[1] else {}
            pairs |= {ITSELF: self.test(own[0])} if own[1] else {}
            for goal, other in pairs.items():
                if other is not None:
                    found[goal].append((described(trial), ours <= other * (1 + GOALS[goal])))
        lines = []
        for goal, met in found.items():
            missed = [place for place, holds in met if not holds]
            where = f"; not at {'; '.join(missed)}" if missed else ""
            lines.append(f"- {goal}: in {len(met) - len(missed)} of {len(met)}{where}.")
        return "\n".join([*lines, ""])

    def others(self) -> str:
        """The preset at a quarter of the width, untuned, beside methods of any memory, each at its best rate."""
        rows = []
        for family in dict.fromkeys(trial.change(lr=0.0) for trial in study.others()):
            best, ours = self.tuned(family), study.preset(family.width, study.RANKS[0])
            if best is None or self.test(ours) is None:
                continue
            state = self.store[ours]["state_bytes"] / self.store[best[0]]["state_bytes"]
            gain = change(self.test(ours), self.test(best[0]))
            rows.append((name_of(family), described(family), self.best(best), self.cell(ours), gain, f"{state:.2f}"))
        head = [
            "method",
            "model, rank, steps",
            "tuned (lr)",
            "preset, lr 0.01",
            "preset to it",
            "preset's states to its",
        ]
        return table(head, rows)

    def rates(self, trials: Iterable[Trial]) -> str:
        """All rates of some families."""
        families = list(dict.fromkeys(trial.change(lr=0.0) for trial in trials))
        rows = []
        for family in families:
            found = sorted(self.family(family), key=lambda one: one.lr)
            if found:
                cells = "; ".join(f"{one.lr:g}: {self.cell(one)}" for one in found)
                state = self.store[found[0]]["state_bytes"] / 1e6
                rows.append((name_of(family), described(family), cells, f"{state:.2f}"))
        return table(["method", "model, rank, steps", "test perplexity by lr", "state MB"], rows)

    def paired(self) -> str:
        """Differences over seeds, with a 95% interval of Student's t."""
        rows = []
        for trial in gain_trials():
            tuned = self.tuned(fira_like(trial))
            for other in dict.fromkeys((fira_like(trial), *(tuned or ())[:1])):
                pairs = [
                    (self.test(trial.change(seed=seed)), self.test(other.change(seed=seed))) for seed in study.SEEDS
                ]
                logs = [math.log(ours / theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
                if len(logs) > 1:
                    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
                    half = float(stats.t.ppf(0.975, len(logs) - 1)) * error
                    interval = f"{math.expm1(mean - half):+.1%} to {math.expm1(mean + half):+.1%}"
                    rows.append(
                        (described(trial), f"{other.lr:g}", len(logs), f"**{math.expm1(mean):+.1%}**", interval)
                    )
        return table(["model, rank, steps", "Fira's lr", "seeds", "preset to Fira", "95% interval"], rows)

    def candidates(self, trials: Iterable[Trial], compared: Callable[[Trial], Trial]) -> str:
        """What was tried in the preset's place, at its rate.

        Args:
            trials: what was tried.
            compared: of the preset what they are compared with.
        """
        rows = []
        for place, listed in groupby(
            sorted(trials, key=lambda trial: (trial.width, -trial.rank, trial.layers or 0, trial.steps, trial.text)),
            key=lambda trial: (trial.width, trial.rank, trial.layers, trial.steps, trial.text),
        ):
            reference = compared(study.preset(*place[:2], layers=place[2], steps=place[3], text=place[4]))
            for trial in dict.fromkeys([reference, *listed]):
                if self.test(trial) is not None:
                    difference = change(self.test(trial), self.test(reference))
                    rate = "" if trial.lr == reference.lr else f", lr {trial.lr:g}"
                    rows.append((described(trial), name_of(trial) + rate, self.cell(trial), difference))
        return table(["model, rank, steps", "variant", "test perplexity", "to the first"], rows)

    def plot(self, key: str, label: str) -> str:
        """Perplexity of every family, tuned, over a figure of the results."""
        figure, axes = plt.subplots(1, len(study.WIDTHS), figsize=(2 * WIDTH, HEIGHT))
        wanted = [trial.change(lr=0.0) for trial in (*study.headline(), *study.others())]
        for width, panel in zip(study.WIDTHS, axes, strict=True):
            families = dict.fromkeys(trial for trial in wanted if trial.width == width)
            found = [(family, self.tuned(family)) for family in families]
            known = [(family.method, best[0]) for family, best in found if best is not None]
            for method, group in groupby(sorted(known, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
                trials = [trial for _, trial in group]
                scale = 1e6 if key == "state_bytes" else 1.0
                horizontal = [self.store[trial][key] / scale for trial in trials]
                panel.plot(horizontal, [self.test(trial) for trial in trials], "o", label=method)
            panel.set(xlabel=label, ylabel="test perplexity, tuned", title=f"width {width}")
            panel.legend(fontsize=7)
        return save_figure(figure, FIGURES, f"transfer_{key}", f"Perplexity over {label}")


def parsed(fields: dict) -> Trial:
    """A trial from its record."""
    settings = tuple((name, value) for name, value in fields["settings"])
    return Trial(**{**fields, "settings": settings})


def gain_trials() -> list[Trial]:
    """The preset wherever it is compared, at its rate."""
    wanted = [*study.headline(), *study.held_out()]
    found = (trial for trial in wanted if trial.method == "normalized")
    return list(dict.fromkeys(trial.change(lr=study.PRESET_RATE) for trial in found))


def fira_like(trial: Trial) -> Trial:
    """Released Fira at the published settings on the same model, rank, text and length."""
    return dataclasses.replace(trial, method="fira", settings=(), lr=study.PUBLISHED_RATE)


def page(store: Trials) -> str:
    """The whole page; its plots are written."""
    report = Report(store)
    results = list(store.found.values())
    hours = sum(result["seconds"] for result in results) / 3600
    sections: Sequence[str] = (
        "# Settings that transfer\n",
        "Written by `python -m examples.reproduction.transfer.report` from `examples/reproduction/results/transfer/`, "
        f"where {len(results)} trainings stand with settings, seed, commit and curve ({hours:.1f} hours of processor "
        "time). "
        "`python -m examples.reproduction.transfer.study` trains what is missing.\n",
        "LLaMAs of 1,024 tokens of vocabulary on film reviews, batches of 16 x 64 tokens, warm-up over a tenth, cosine "
        "to a tenth, gap 50, float32, seed 0 unless said. Embeddings, head and norms have Adam at the rate itself, but "
        "for norms in the preset. Rates are chosen by one half of the held-out rows; the other half is reported. "
        "*Fira* is the released method at its published settings (alpha 0.25).\n",
        "## The preset beside released Fira\n",
        "The preset: each column of the residual divided by its own norm (beta 0), no limiter; alpha = 0.25 x min(1, "
        "sqrt(64 / (rank x depth))), alpha x c = 0.3 x 128 / width, c growing over the first 50 steps a layer; norms "
        f"at {study.VECTORS:g} x lr. It stands at lr 0.01 everywhere, untuned.\n",
        report.gains(),
        "What was to be reached, at seed 0, where a best rate has a worse one on both sides:\n",
        report.goals(),
        "Over seeds, paired:\n",
        report.paired(),
        "## The preset beside other methods\n",
        "Every method at the best of the rates that were tried, the preset at its own:\n",
        report.others(),
        "## Every rate\n",
        report.rates([*study.headline(), *study.others(), *study.held_out()]),
        report.plot("state_bytes", "MB of optimizer state"),
        report.plot("seconds", "seconds of processor time"),
        "## Candidates\n",
        f"In the preset's place, lr {study.PRESET_RATE:g}, all with norms at that rate too; what is not named is alpha "
        "0.25 and c 1:\n",
        report.candidates(study.candidates(), study.plain),
        "## The rate of norms, and long trainings\n",
        "*vectors* is the rate of norms in that of embeddings and head, 1 where it is not named; *rest* is the rate of "
        "all three in lr. *rest_fade* and *fade* are steps behind which that rate, or the residual alone, falls by the "
        "root of the step. The first of each model is the preset.\n",
        report.candidates(study.rests(), lambda preset: preset),
        finetune_report.section(),
    )
    first = max(results, key=lambda result: result["provenance"]["date"])
    return "\n".join([*sections, stamp_line(first["provenance"]), ""])


def main() -> None:
    """Write the page."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(Trials()))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
